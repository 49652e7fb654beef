//! One line of a JSONL file, in any of the forms that fine-tuning data comes in.

use serde_json::{Map, Value};

use crate::mistake;

/// The label that Hugging Face data sets use for "no target here".
const IGNORED_LABEL: i64 = -100;

/// A row as written, before it is tokenized.
#[derive(Clone, Debug, PartialEq)]
pub enum Record {
    /// `text`: plain text; every token is a target.
    Text(String),
    /// `prompt` and `completion`, or the two fields that the user named.
    Completion {
        /// What the model is given.
        prompt: String,
        /// What it is to answer.
        completion: String,
    },
    /// `instruction`, `output` and perhaps `input`, as in the Alpaca data set.
    Instruction {
        /// The task.
        instruction: String,
        /// What the task is about; may be empty.
        input: String,
        /// What the model is to answer.
        output: String,
    },
    /// `messages` in the form of chat templates, and perhaps `tools`; the assistant's turns are targets.
    Messages {
        /// Objects with `role` and what the chat template reads, mostly `content`.
        messages: Vec<Value>,
        /// Tool definitions for the chat template.
        tools: Option<Value>,
    },
    /// `input_ids` and perhaps `labels`, tokenized already.
    Tokens {
        /// Token ids.
        input_ids: Vec<u32>,
        /// The label of each token, not shifted; `None` is -100.
        labels: Vec<Option<u32>>,
    },
}

/// The fields that the user named as prompt and completion (`--prompt-field`, `--completion-field`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FieldNames {
    /// The field that holds the prompt, in place of `prompt`.
    pub prompt: Option<String>,
    /// The field that holds the completion, in place of `completion`.
    pub completion: Option<String>,
    /// The field that names the row's adapter, where rows have several.
    pub adapter: Option<String>,
}

impl FieldNames {
    /// The name of the row's adapter, where rows have one.
    ///
    /// # Errors
    /// A [`mistake::Mistake`] where the field is not a string.
    pub fn adapter_of(&self, line: &str) -> anyhow::Result<Option<String>> {
        let Some(field) = &self.adapter else {
            return Ok(None);
        };
        let row = object(line)?;
        match row.get(field) {
            None => Ok(None),
            Some(_) => text(&row, field).map(Some),
        }
    }
}

impl Record {
    /// Parses one line. The fields present decide the form; `fields`, where set, decides alone.
    ///
    /// # Errors
    /// A [`mistake::Mistake`] that says what the line lacks; the caller adds file and line number.
    pub fn parse(line: &str, fields: &FieldNames) -> anyhow::Result<Record> {
        let row = object(line)?;
        if fields.prompt.is_some() || fields.completion.is_some() {
            let prompt = fields.prompt.as_deref().unwrap_or("prompt");
            let completion = fields.completion.as_deref().unwrap_or("completion");
            return Ok(Record::Completion {
                prompt: text(&row, prompt)?,
                completion: answer(&row, completion)?,
            });
        }
        let has = |name| row.contains_key(name);
        if has("messages") {
            messages(&row)
        } else if has("input_ids") {
            tokens(&row)
        } else if has("prompt") || has("completion") {
            Ok(Record::Completion {
                prompt: text(&row, "prompt")?,
                completion: answer(&row, "completion")?,
            })
        } else if has("instruction") {
            let input = if has("input") {
                text(&row, "input")?
            } else {
                String::new()
            };
            Ok(Record::Instruction {
                instruction: text(&row, "instruction")?,
                input,
                output: answer(&row, "output")?,
            })
        } else if has("text") {
            Ok(Record::Text(answer(&row, "text")?))
        } else {
            Err(mistake!(
                "the row has {}; it needs `text`, `prompt` and `completion`, `messages`, `instruction` and `output`, \
                 or `input_ids` (name other fields with --prompt-field and --completion-field)",
                field_list(&row)
            ))
        }
    }
}

fn object(line: &str) -> anyhow::Result<Map<String, Value>> {
    match serde_json::from_str(line) {
        Ok(Value::Object(row)) => Ok(row),
        Ok(other) => {
            let kind = kind_of(&other);
            Err(mistake!(
                "a row must be one JSON object on a line of its own, and this is {kind}"
            ))
        }
        Err(error) => Err(mistake!(
            "malformed JSON at column {}: {}",
            error.column(),
            reason(&error)
        )),
    }
}

fn messages(row: &Map<String, Value>) -> anyhow::Result<Record> {
    let Some(messages) = row["messages"].as_array() else {
        return Err(mistake!(
            "`messages` must be an array, and is {}",
            kind_of(&row["messages"])
        ));
    };
    for (index, message) in messages.iter().enumerate() {
        let role = message.get("role").and_then(Value::as_str);
        let spoken = message.get("content").is_some_and(Value::is_string)
            || message.get("tool_calls").is_some();
        if role.is_none() || !spoken {
            return Err(mistake!(
                "message {} must be an object with the strings `role` and `content`",
                index + 1
            ));
        }
    }
    if !messages
        .iter()
        .any(|message| message["role"] == "assistant")
    {
        return Err(mistake!(
            "no message has the role `assistant`, so there is nothing to learn"
        ));
    }
    let tools = row.get("tools").filter(|tools| !tools.is_null()).cloned();
    Ok(Record::Messages {
        messages: messages.clone(),
        tools,
    })
}

/// `input_ids` and `labels` (all tokens where absent). Positions that `attention_mask` excludes are padding
/// and are left out.
fn tokens(row: &Map<String, Value>) -> anyhow::Result<Record> {
    let input_ids = integers(row, "input_ids")?;
    let column = |name| match row.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(_) => {
            let values = integers(row, name)?;
            if values.len() != input_ids.len() {
                let (got, wanted) = (values.len(), input_ids.len());
                return Err(mistake!(
                    "`{name}` has {got} entries for {wanted} `input_ids`"
                ));
            }
            Ok(Some(values))
        }
    };
    let labels = column("labels")?.unwrap_or_else(|| input_ids.clone());
    let mask = column("attention_mask")?.unwrap_or_else(|| vec![1; input_ids.len()]);
    let kept = |index: &usize| mask[*index] != 0;
    let token_id = |name: &str, value: i64| {
        u32::try_from(value).map_err(|_| mistake!("`{name}` holds {value}, which is no token id"))
    };
    Ok(Record::Tokens {
        input_ids: (0..input_ids.len())
            .filter(kept)
            .map(|index| token_id("input_ids", input_ids[index]))
            .collect::<anyhow::Result<_>>()?,
        labels: (0..input_ids.len())
            .filter(kept)
            .map(|index| match labels[index] {
                IGNORED_LABEL => Ok(None),
                label => token_id("labels", label).map(Some),
            })
            .collect::<anyhow::Result<_>>()?,
    })
}

fn integers(row: &Map<String, Value>, name: &str) -> anyhow::Result<Vec<i64>> {
    row[name]
        .as_array()
        .and_then(|values| values.iter().map(Value::as_i64).collect())
        .ok_or_else(|| mistake!("`{name}` must be an array of integers"))
}

/// A string field that may be empty.
fn text(row: &Map<String, Value>, name: &str) -> anyhow::Result<String> {
    match row.get(name) {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(other) => Err(mistake!(
            "`{name}` must be a string, and is {}",
            kind_of(other)
        )),
        None => Err(mistake!(
            "the field `{name}` is missing; the row has {}",
            field_list(row)
        )),
    }
}

/// A string field that the model is to learn.
fn answer(row: &Map<String, Value>, name: &str) -> anyhow::Result<String> {
    let text = text(row, name)?;
    if text.trim().is_empty() {
        return Err(mistake!("`{name}` is empty, so there is nothing to learn"));
    }
    Ok(text)
}

fn field_list(row: &Map<String, Value>) -> String {
    if row.is_empty() {
        return "no fields".to_string();
    }
    let names: Vec<String> = row.keys().map(|name| format!("`{name}`")).collect();
    names.join(", ")
}

fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// What serde_json has to say, without its "at line 1 column 7": the line is the file's, not the parser's.
fn reason(error: &serde_json::Error) -> String {
    let message = error.to_string();
    match message.rfind(" at line ") {
        Some(end) => message[..end].to_string(),
        None => message,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Record {
        Record::parse(line, &FieldNames::default()).unwrap()
    }

    fn complaint(line: &str) -> String {
        Record::parse(line, &FieldNames::default())
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn every_form_is_recognised() {
        assert_eq!(parse(r#"{"text": "a"}"#), Record::Text("a".into()));
        assert_eq!(
            parse(r#"{"prompt": "", "completion": "b"}"#),
            Record::Completion {
                prompt: "".into(),
                completion: "b".into()
            }
        );
        assert_eq!(
            parse(r#"{"instruction": "do", "output": "done", "text": "ignored"}"#),
            Record::Instruction {
                instruction: "do".into(),
                input: "".into(),
                output: "done".into()
            }
        );
        assert!(matches!(
            parse(r#"{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}"#),
            Record::Messages { messages, tools: None } if messages.len() == 2
        ));
        assert_eq!(
            parse(r#"{"input_ids": [1, 2, 3], "labels": [-100, 2, 4]}"#),
            Record::Tokens {
                input_ids: vec![1, 2, 3],
                labels: vec![None, Some(2), Some(4)]
            }
        );
        assert_eq!(
            parse(r#"{"input_ids": [1, 2]}"#),
            Record::Tokens {
                input_ids: vec![1, 2],
                labels: vec![Some(1), Some(2)]
            }
        );
        assert_eq!(
            parse(r#"{"input_ids": [0, 1, 2], "attention_mask": [0, 1, 1]}"#),
            Record::Tokens {
                input_ids: vec![1, 2],
                labels: vec![Some(1), Some(2)]
            }
        );
    }

    #[test]
    fn named_fields_decide_alone() {
        let fields = FieldNames {
            prompt: Some("question".into()),
            completion: Some("answer".into()),
            adapter: None,
        };
        let line = r#"{"question": "q", "answer": "a", "text": "t"}"#;
        let wanted = Record::Completion {
            prompt: "q".into(),
            completion: "a".into(),
        };
        assert_eq!(Record::parse(line, &fields).unwrap(), wanted);
        let error = Record::parse(r#"{"question": "q", "reply": "a"}"#, &fields)
            .unwrap_err()
            .to_string();
        assert_eq!(
            error,
            "the field `answer` is missing; the row has `question`, `reply`"
        );
    }

    #[test]
    fn complaints_say_what_is_wrong() {
        let cases = [
            (
                r#"{"text": "a""#,
                "malformed JSON at column 12: EOF while parsing an object",
            ),
            (
                r#"[{"text": "a"}]"#,
                "one JSON object on a line of its own, and this is an array",
            ),
            ("{}", "the row has no fields; it needs `text`"),
            (r#"{"question": "q"}"#, "the row has `question`; it needs"),
            (r#"{"text": 3}"#, "`text` must be a string, and is a number"),
            (r#"{"text": " "}"#, "`text` is empty"),
            (r#"{"prompt": "p"}"#, "the field `completion` is missing"),
            (
                r#"{"prompt": "p", "completion": ""}"#,
                "`completion` is empty",
            ),
            (r#"{"instruction": "p"}"#, "the field `output` is missing"),
            (
                r#"{"messages": "hi"}"#,
                "`messages` must be an array, and is a string",
            ),
            (
                r#"{"messages": [{"role": "user"}]}"#,
                "message 1 must be an object",
            ),
            (
                r#"{"messages": [{"role": "user", "content": "q"}]}"#,
                "no message has the role `assistant`",
            ),
            (
                r#"{"input_ids": [1.5]}"#,
                "`input_ids` must be an array of integers",
            ),
            (r#"{"input_ids": [-1]}"#, "`input_ids` holds -1"),
            (r#"{"input_ids": [1], "labels": [-7]}"#, "`labels` holds -7"),
            (
                r#"{"input_ids": [1, 2], "labels": [1]}"#,
                "`labels` has 1 entries for 2 `input_ids`",
            ),
        ];
        for (line, expected) in cases {
            let message = complaint(line);
            assert!(message.contains(expected), "{line}: {message}");
        }
    }
}
