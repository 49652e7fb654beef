//! From a record to a row of tokens: the tokenizer, the chat template, and which tokens are targets.

use std::ops::Range;

use fuselora_transformer::tokenizer::Tokenizer;
use serde_json::{Value, json};

use super::{Record, Row};
use crate::mistake;

/// A text, and the byte ranges of it that are to be learned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Passage {
    /// All of it.
    pub text: String,
    /// The ranges, in order.
    pub learned: Vec<Range<usize>>,
}

/// What the data needs of a model's tokenizer.
pub trait Encode: Sync {
    /// The tokens of a passage, each with whether it ends in a learned range; `add_special_tokens` lets the
    /// tokenizer add those that it puts around plain text (a chat template writes its own).
    ///
    /// # Errors
    /// Whatever the tokenizer reports.
    fn encode(
        &self,
        passage: &Passage,
        add_special_tokens: bool,
    ) -> anyhow::Result<Vec<(u32, bool)>>;

    /// The token that ends a text.
    fn eos_token_id(&self) -> Option<u32>;

    /// Whether the model has a chat template.
    fn has_chat_template(&self) -> bool;

    /// What the chat template makes of a conversation, the assistant's turns to be learned.
    ///
    /// # Errors
    /// Where there is no template, it refuses the conversation, or its text does not show where the
    /// assistant speaks.
    fn render_chat(&self, messages: &[Value], tools: Option<&Value>) -> anyhow::Result<Passage>;
}

impl Encode for Tokenizer {
    fn encode(
        &self,
        passage: &Passage,
        add_special_tokens: bool,
    ) -> anyhow::Result<Vec<(u32, bool)>> {
        Ok(self.encode_spans(&passage.text, &passage.learned, add_special_tokens)?)
    }

    fn eos_token_id(&self) -> Option<u32> {
        self.eos_token_ids().first().copied()
    }

    fn has_chat_template(&self) -> bool {
        self.chat_template().is_some()
    }

    fn render_chat(&self, messages: &[Value], tools: Option<&Value>) -> anyhow::Result<Passage> {
        let template = self.chat_template().ok_or_else(|| {
            mistake!(
                "the row has `messages` and the model has no chat template: take an instruct model, or give \
                 `prompt` and `completion`"
            )
        })?;
        let chat = template.render_with_spans(&json!(messages), tools)?;
        Ok(Passage {
            text: chat.text,
            learned: chat.assistant,
        })
    }
}

/// How records become rows.
pub struct Encoding<'a> {
    /// The model's tokenizer; without one, only tokenized rows are readable.
    pub tokenizer: Option<&'a dyn Encode>,
    /// Whether prompts and completions become turns of the model's chat template where it has one.
    pub chat_template: bool,
    /// Whether only completions and assistant turns are targets, and not what stands before them.
    pub mask_prompt: bool,
    /// Whether `text` rows get the token that ends a text, for a model to learn where to stop; without it the
    /// text is measured as it is.
    pub end_text: bool,
}

impl Encoding<'_> {
    /// The row of a record.
    ///
    /// # Errors
    /// A [`mistake::Mistake`] where the record needs a tokenizer or a chat template that the model lacks, or
    /// where the template's rendering does not show which text is the assistant's.
    pub fn row(&self, record: Record) -> anyhow::Result<Row> {
        let is_text = matches!(record, Record::Text(_));
        let (passage, plain) = match record {
            Record::Tokens { input_ids, labels } => return Ok(Row::from_labels(input_ids, labels)),
            Record::Text(text) => {
                let all = 0..text.len();
                (
                    Passage {
                        text,
                        learned: vec![all],
                    },
                    true,
                )
            }
            Record::Messages { messages, tools } => (
                self.tokenizer()?.render_chat(&messages, tools.as_ref())?,
                false,
            ),
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
        let encoded = tokenizer.encode(&passage, plain)?;
        let (mut ids, mut learned): (Vec<u32>, Vec<bool>) = encoded
            .into_iter()
            .map(|(id, learned)| (id, learned || !self.mask_prompt))
            .unzip();
        // A chat template closes its turns itself; plain text needs the token that tells a model to stop.
        let ends = plain && (self.end_text || !is_text);
        if ends && let Some(eos) = tokenizer.eos_token_id() {
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

    /// A prompt and its completion, and whether they are plain text: two turns of a chat where the model has
    /// a template, else one text.
    fn pair(&self, prompt: String, completion: String) -> anyhow::Result<(Passage, bool)> {
        if self.uses_chat_template() {
            let messages = [
                json!({"role": "user", "content": prompt}),
                json!({"role": "assistant", "content": completion}),
            ];
            return Ok((self.tokenizer()?.render_chat(&messages, None)?, false));
        }
        let text = prompt.clone() + &completion;
        let completion = prompt.len()..text.len();
        Ok((
            Passage {
                text,
                learned: vec![completion],
            },
            true,
        ))
    }
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
        fn encode(
            &self,
            passage: &Passage,
            add_special_tokens: bool,
        ) -> anyhow::Result<Vec<(u32, bool)>> {
            let bos = add_special_tokens.then_some((BOS, false));
            let learned = |at| passage.learned.iter().any(|range| range.contains(&at));
            let bytes = passage
                .text
                .bytes()
                .enumerate()
                .map(|(at, byte)| (byte.into(), learned(at)));
            Ok(bos.into_iter().chain(bytes).collect())
        }

        fn eos_token_id(&self) -> Option<u32> {
            Some(EOS)
        }

        fn has_chat_template(&self) -> bool {
            self.template
        }

        fn render_chat(&self, messages: &[Value], _: Option<&Value>) -> anyhow::Result<Passage> {
            let mut passage = Passage {
                text: String::new(),
                learned: Vec::new(),
            };
            for message in messages {
                let (role, content) = (
                    message["role"].as_str().unwrap(),
                    message["content"].as_str().unwrap(),
                );
                passage.text += &format!("<{role}>");
                let start = passage.text.len();
                passage.text += &format!("{content};");
                if role == "assistant" {
                    passage.learned.push(start..passage.text.len());
                }
            }
            Ok(passage)
        }
    }

    /// The whole row and its targets as text, with `^` and `$` for the special tokens.
    fn encoded(line: &str, template: bool, mask_prompt: bool) -> (String, String) {
        let tokenizer = Bytes { template };
        let encoding = Encoding {
            tokenizer: Some(&tokenizer),
            chat_template: true,
            mask_prompt,
            end_text: true,
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
    fn a_text_without_tokenizer_is_a_mistake() {
        let encoding = Encoding {
            tokenizer: None,
            chat_template: true,
            mask_prompt: true,
            end_text: true,
        };
        let message = encoding
            .row(Record::Text("a".into()))
            .unwrap_err()
            .to_string();
        assert!(message.contains("no tokenizer"), "{message}");
    }
}
