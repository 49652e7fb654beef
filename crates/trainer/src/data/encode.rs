//! From a record to a row of tokens: the tokenizer, the chat template, and which tokens are targets.

use std::ops::Range;

use serde_json::{Value, json};

use super::{Record, Row};
use crate::mistake;

/// A token and the bytes of the text that it stands for (an empty range for a token that the tokenizer
/// added, such as the beginning-of-sequence token).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Token {
    /// The token's id.
    pub id: u32,
    /// Byte offsets into the text.
    pub span: Range<usize>,
}

/// What the data needs of a model's tokenizer.
pub trait Encode: Sync {
    /// The tokens of `text`, with byte offsets; `add_special_tokens` lets the tokenizer add those that it
    /// puts around plain text (a chat template writes its own).
    ///
    /// # Errors
    /// Whatever the tokenizer reports.
    fn encode(&self, text: &str, add_special_tokens: bool) -> anyhow::Result<Vec<Token>>;

    /// The token that ends a text.
    fn eos_token_id(&self) -> Option<u32>;

    /// Whether the model has a chat template.
    fn has_chat_template(&self) -> bool;

    /// The text that the chat template makes of a conversation, ending with the opening of the assistant's
    /// turn where `add_generation_prompt` is set.
    ///
    /// # Errors
    /// Where the template refuses the conversation.
    fn render_chat(
        &self,
        messages: &[Value],
        tools: Option<&Value>,
        add_generation_prompt: bool,
    ) -> anyhow::Result<String>;
}

/// How records become rows.
pub struct Encoding<'a> {
    /// The model's tokenizer; without one, only tokenized rows are readable.
    pub tokenizer: Option<&'a dyn Encode>,
    /// Whether prompts and completions become turns of the model's chat template where it has one.
    pub chat_template: bool,
    /// Whether only completions and assistant turns are targets, and not what stands before them.
    pub mask_prompt: bool,
}

impl Encoding<'_> {
    /// The row of a record.
    ///
    /// # Errors
    /// A [`mistake::Mistake`] where the record needs a tokenizer or a chat template that the model lacks, or
    /// where the template's rendering does not show which text is the assistant's.
    pub fn row(&self, record: Record) -> anyhow::Result<Row> {
        let (text, targets, add_special_tokens) = match record {
            Record::Tokens { input_ids, labels } => return Ok(Row::from_labels(input_ids, labels)),
            Record::Text(text) => {
                let all = 0..text.len();
                (text, vec![all], true)
            }
            Record::Messages { messages, tools } => {
                let (text, targets) = self.chat(&messages, tools.as_ref())?;
                (text, targets, false)
            }
            Record::Completion { prompt, completion } => self.pair(prompt, completion)?,
            Record::Instruction {
                instruction,
                input,
                output,
            } if self.uses_chat_template() => {
                let gap = if input.is_empty() { "" } else { "\n\n" };
                self.pair(format!("{instruction}{gap}{input}"), output)?
            }
            Record::Instruction {
                instruction,
                input,
                output,
            } => self.pair(alpaca_prompt(&instruction, &input), output)?,
        };
        let tokenizer = self.tokenizer()?;
        let tokens = tokenizer.encode(&text, add_special_tokens)?;
        let mut ids: Vec<u32> = tokens.iter().map(|token| token.id).collect();
        let mut learned: Vec<bool> = tokens
            .iter()
            .map(|token| !self.mask_prompt || targets.iter().any(|span| overlap(span, &token.span)))
            .collect();
        // A chat template closes its turns itself; plain text needs the token that tells a model to stop.
        if add_special_tokens && let Some(eos) = tokenizer.eos_token_id() {
            if ids.last() != Some(&eos) {
                ids.push(eos);
                learned.push(true);
            } else if let Some(last) = learned.last_mut() {
                *last = true;
            }
        }
        Ok(Row::from_learned(ids, &learned))
    }

    fn uses_chat_template(&self) -> bool {
        self.chat_template && self.tokenizer.is_some_and(Encode::has_chat_template)
    }

    fn tokenizer(&self) -> anyhow::Result<&dyn Encode> {
        self.tokenizer.ok_or_else(|| {
            mistake!("the row is text and the model has no tokenizer: add its tokenizer.json, or give rows with `input_ids`")
        })
    }

    /// A prompt and its completion: two turns of a chat where the model has a template, or one text.
    fn pair(
        &self,
        prompt: String,
        completion: String,
    ) -> anyhow::Result<(String, Vec<Range<usize>>, bool)> {
        if self.uses_chat_template() {
            let messages = [
                json!({"role": "user", "content": prompt}),
                json!({"role": "assistant", "content": completion}),
            ];
            let (text, targets) = self.chat(&messages, None)?;
            return Ok((text, targets, false));
        }
        let text = prompt.clone() + &completion;
        let target = prompt.len()..text.len();
        Ok((text, vec![target], true))
    }

    /// The rendered conversation, and where in it the assistant speaks: from the end of its opening, which
    /// the template writes as generation prompt, to the end of its turn.
    fn chat(
        &self,
        messages: &[Value],
        tools: Option<&Value>,
    ) -> anyhow::Result<(String, Vec<Range<usize>>)> {
        let tokenizer = self.tokenizer()?;
        if !tokenizer.has_chat_template() {
            return Err(mistake!(
                "the row has `messages` and the model has no chat template: take an instruct model, or give `prompt` and `completion`"
            ));
        }
        let text = tokenizer.render_chat(messages, tools, false)?;
        if !self.mask_prompt {
            let all = 0..text.len();
            return Ok((text, vec![all]));
        }
        let mut targets = Vec::new();
        for (index, message) in messages.iter().enumerate() {
            if message["role"] != "assistant" {
                continue;
            }
            let before = tokenizer.render_chat(&messages[..index], tools, true)?;
            let with_turn = tokenizer.render_chat(&messages[..=index], tools, false)?;
            if !(with_turn.starts_with(&before) && text.starts_with(&with_turn)) {
                return Err(mistake!(
                    "the model's chat template rewrites message {} once others follow, so its tokens cannot be told apart: \
                     split the conversation so that each row has one assistant turn, or learn all tokens with --mask-prompt=false",
                    index + 1
                ));
            }
            targets.push(before.len()..with_turn.len());
        }
        Ok((text, targets))
    }
}

fn overlap(a: &Range<usize>, b: &Range<usize>) -> bool {
    a.start.max(b.start) < a.end.min(b.end)
}

/// The prompt of the Stanford Alpaca data set, for models without a chat template.
fn alpaca_prompt(instruction: &str, input: &str) -> String {
    if input.is_empty() {
        return format!(
            "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n\
             ### Instruction:\n{instruction}\n\n### Response:\n"
        );
    }
    format!(
        "Below is an instruction that describes a task, paired with an input that provides further context. \
         Write a response that appropriately completes the request.\n\n\
         ### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::FieldNames;

    const BOS: u32 = 1;
    const EOS: u32 = 2;

    /// A token per byte; the template writes `<role>content;`.
    struct Bytes {
        template: bool,
    }

    impl Encode for Bytes {
        fn encode(&self, text: &str, add_special_tokens: bool) -> anyhow::Result<Vec<Token>> {
            let bos = add_special_tokens.then_some(Token {
                id: BOS,
                span: 0..0,
            });
            let bytes = text.bytes().enumerate().map(|(at, byte)| Token {
                id: byte.into(),
                span: at..at + 1,
            });
            Ok(bos.into_iter().chain(bytes).collect())
        }

        fn eos_token_id(&self) -> Option<u32> {
            Some(EOS)
        }

        fn has_chat_template(&self) -> bool {
            self.template
        }

        fn render_chat(
            &self,
            messages: &[Value],
            _: Option<&Value>,
            add_generation_prompt: bool,
        ) -> anyhow::Result<String> {
            let turn = |m: &Value| {
                format!(
                    "<{}>{};",
                    m["role"].as_str().unwrap(),
                    m["content"].as_str().unwrap()
                )
            };
            let opening = if add_generation_prompt {
                "<assistant>"
            } else {
                ""
            };
            Ok(messages.iter().map(turn).collect::<String>() + opening)
        }
    }

    /// The whole row and its targets as text, with `^` and `$` for the special tokens.
    fn encoded(line: &str, template: bool, mask_prompt: bool) -> (String, String) {
        let tokenizer = Bytes { template };
        let encoding = Encoding {
            tokenizer: Some(&tokenizer),
            chat_template: true,
            mask_prompt,
        };
        let row = encoding
            .row(Record::parse(line, &FieldNames::default()).unwrap())
            .unwrap();
        let read = |id: u32| match id {
            BOS => '^',
            EOS => '$',
            byte => char::from_u32(byte).unwrap(),
        };
        (
            row.tokens().iter().map(|&id| read(id)).collect(),
            row.targets().iter().flatten().map(|&id| read(id)).collect(),
        )
    }

    #[test]
    fn plain_text_is_learned_whole_and_ends() {
        let row = encoded(r#"{"text": "abc"}"#, true, true);
        assert_eq!(row, ("^abc$".into(), "abc$".into()));
    }

    #[test]
    fn completions_alone_are_learned() {
        let line = r#"{"prompt": "Q:", "completion": "yes"}"#;
        assert_eq!(
            encoded(line, false, true),
            ("^Q:yes$".into(), "yes$".into())
        );
        assert_eq!(encoded(line, false, false).1, "Q:yes$");
        assert_eq!(
            encoded(line, true, true),
            ("<user>Q:;<assistant>yes;".into(), "yes;".into())
        );
        assert_eq!(encoded(line, true, false).1, "user>Q:;<assistant>yes;");
    }

    #[test]
    fn each_assistant_turn_is_learned() {
        let line = r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]}"#;
        let (text, targets) = encoded(line, true, true);
        assert_eq!(text, "<user>a;<assistant>b;<user>c;<assistant>d;");
        assert_eq!(targets, "b;d;");
    }

    #[test]
    fn instructions_become_turns_or_the_alpaca_prompt() {
        let line = r#"{"instruction": "Add", "input": "1 2", "output": "3"}"#;
        assert_eq!(
            encoded(line, true, true).0,
            "<user>Add\n\n1 2;<assistant>3;"
        );
        let (text, targets) = encoded(line, false, true);
        assert!(
            text.ends_with("### Instruction:\nAdd\n\n### Input:\n1 2\n\n### Response:\n3$"),
            "{text}"
        );
        assert_eq!(targets, "3$");
    }

    #[test]
    fn a_token_across_the_boundary_belongs_to_the_completion() {
        assert!(overlap(&(2..5), &(1..3)));
        assert!(!overlap(&(2..5), &(1..2)));
        assert!(!overlap(&(2..5), &(0..0)));
    }

    #[test]
    fn what_the_model_lacks_is_said() {
        let row = |template, line| {
            let tokenizer = Bytes { template };
            let encoding = Encoding {
                tokenizer: Some(&tokenizer),
                chat_template: true,
                mask_prompt: true,
            };
            encoding
                .row(Record::parse(line, &FieldNames::default()).unwrap())
                .unwrap_err()
                .to_string()
        };
        let message = row(
            false,
            r#"{"messages": [{"role": "assistant", "content": "b"}]}"#,
        );
        assert!(message.contains("no chat template"), "{message}");
        let encoding = Encoding {
            tokenizer: None,
            chat_template: true,
            mask_prompt: true,
        };
        let message = encoding
            .row(Record::Text("a".into()))
            .unwrap_err()
            .to_string();
        assert!(message.contains("no tokenizer"), "{message}");
    }
}
