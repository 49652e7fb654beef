//! Conversations to text: Hugging Face's chat templates, rendered as transformers renders them
//! (`utils/chat_template_utils.py`).

mod python_json;
mod python_time;

use std::{
    ops::Range,
    path::{Path, PathBuf},
};

use minijinja::{
    Environment, Error as JinjaError, ErrorKind,
    syntax::SyntaxConfig,
    value::{Kwargs, Serde},
};
use regex::Regex;
use serde_json::{Map, Value, json};

use crate::{
    error::{Error, Result},
    tokenizer::special_token,
};

/// What a template writes around the content of a `{% generation %}` block. Unicode reserves these code
/// points for such internal use: no text holds them.
const GENERATION_START: char = '\u{fdd0}';
const GENERATION_END: char = '\u{fdd1}';

/// A checkpoint's chat template.
pub struct ChatTemplate {
    /// The file it comes from.
    path: PathBuf,
    source: String,
    environment: Environment<'static>,
    /// `bos_token`, `eos_token` and the others, which templates write.
    special_tokens: Map<String, Value>,
    marks_generation: bool,
}

/// A conversation as text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RenderedChat {
    /// All of it.
    pub text: String,
    /// What the assistant says, as byte ranges of the text, in order.
    pub assistant: Vec<Range<usize>>,
}

impl ChatTemplate {
    /// The template of a tokenizer's configuration, where it has one; `file` is the content of
    /// `chat_template.jinja`, which wins.
    pub(crate) fn from_tokenizer_config(
        path: &Path,
        config: &Value,
        file: Option<String>,
    ) -> Result<Option<ChatTemplate>> {
        let source = match (file, config.get("chat_template")) {
            (Some(source), _) => source,
            (None, Some(Value::String(source))) => source.clone(),
            (None, Some(Value::Array(named))) => {
                let default = named
                    .iter()
                    .find(|template| template.get("name") == Some(&json!("default")))
                    .or(named.first());
                match default
                    .and_then(|template| template.get("template"))
                    .and_then(Value::as_str)
                {
                    Some(source) => source.to_owned(),
                    None => return Ok(None),
                }
            }
            _ => return Ok(None),
        };
        let special_tokens = [
            "bos_token",
            "eos_token",
            "unk_token",
            "pad_token",
            "sep_token",
            "cls_token",
            "mask_token",
        ]
        .into_iter()
        .filter_map(|key| Some((key.to_owned(), json!(special_token(config, key)?))))
        .collect();
        ChatTemplate::new(path, source, special_tokens).map(Some)
    }

    fn new(
        path: &Path,
        source: String,
        special_tokens: Map<String, Value>,
    ) -> Result<ChatTemplate> {
        let marked = mark_generation(&source);
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build()
            .map_err(|error| Error::file(path, error.to_string()))?;
        environment.set_syntax(syntax);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function(
            "raise_exception",
            |message: String| -> std::result::Result<String, JinjaError> {
                Err(JinjaError::new(ErrorKind::InvalidOperation, message))
            },
        );
        environment.add_function("strftime_now", |format: &str| {
            python_time::strftime_now(format)
                .map_err(|message| JinjaError::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_filter("tojson", |value: minijinja::Value, options: Kwargs| {
            python_json::dumps(&value, &options)
        });
        environment
            .add_template_owned("chat_template", marked.clone())
            .map_err(|error| {
                Error::file(
                    path,
                    format!("has a chat template that cannot be read: {error}"),
                )
            })?;
        let marks_generation = marked != source;
        Ok(ChatTemplate {
            path: path.to_owned(),
            source,
            environment,
            special_tokens,
            marks_generation,
        })
    }

    /// The template itself.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Renders `messages`, a JSON list of objects with `role` and `content`, and `tools` where given. With
    /// `add_generation_prompt` the text ends where the assistant's answer begins.
    ///
    /// # Errors
    /// When the template refuses the messages.
    pub fn render(
        &self,
        messages: &Value,
        tools: Option<&Value>,
        add_generation_prompt: bool,
    ) -> Result<String> {
        Ok(self
            .render_marked(messages, tools, add_generation_prompt)?
            .replace([GENERATION_START, GENERATION_END], ""))
    }

    /// Renders a whole conversation and finds what the assistant says in it: what the template marks by
    /// `{% generation %}`, or else what each assistant message adds behind its generation prompt.
    ///
    /// # Errors
    /// When the template refuses the messages, or an earlier turn's text depends on a later one's, so that
    /// its place cannot be told.
    pub fn render_with_spans(
        &self,
        messages: &Value,
        tools: Option<&Value>,
    ) -> Result<RenderedChat> {
        if self.marks_generation {
            return self.split_marks(&self.render_marked(messages, tools, false)?);
        }
        let text = self.render(messages, tools, false)?;
        let list = messages
            .as_array()
            .ok_or_else(|| self.bad("the messages are not a list"))?;
        let mut assistant = Vec::new();
        for (i, message) in list.iter().enumerate() {
            if message.get("role") != Some(&json!("assistant")) {
                continue;
            }
            let before = self.render(&json!(list[..i]), tools, true)?;
            let with = if i + 1 == list.len() {
                text.clone()
            } else {
                self.render(&json!(list[..=i]), tools, false)?
            };
            if !with.starts_with(&before) || !text.starts_with(&with) {
                return Err(self.bad(format!(
                    "the chat template writes message {} otherwise when more messages follow, so its tokens cannot be told apart",
                    i + 1
                )));
            }
            assistant.push(before.len()..with.len());
        }
        Ok(RenderedChat { text, assistant })
    }

    fn render_marked(
        &self,
        messages: &Value,
        tools: Option<&Value>,
        add_generation_prompt: bool,
    ) -> Result<String> {
        let mut context = self.special_tokens.clone();
        context.insert("messages".into(), messages.clone());
        context.insert("tools".into(), tools.cloned().unwrap_or(Value::Null));
        context.insert("documents".into(), Value::Null);
        context.insert("add_generation_prompt".into(), json!(add_generation_prompt));
        let render = || {
            self.environment
                .get_template("chat_template")?
                .render(minijinja::Value::from(Serde(&context)))
        };
        render().map_err(|error| {
            let reason = error
                .detail()
                .map_or_else(|| error.to_string(), str::to_owned);
            self.bad(format!(
                "the chat template refuses these messages: {reason}"
            ))
        })
    }

    fn split_marks(&self, marked: &str) -> Result<RenderedChat> {
        let mut text = String::with_capacity(marked.len());
        let mut assistant = Vec::new();
        let mut start = None;
        for c in marked.chars() {
            match (c, start) {
                (GENERATION_START, None) => start = Some(text.len()),
                (GENERATION_END, Some(begin)) => {
                    assistant.push(begin..text.len());
                    start = None;
                }
                (GENERATION_START | GENERATION_END, _) => {
                    return Err(self.bad("the chat template nests generation blocks"));
                }
                _ => text.push(c),
            }
        }
        Ok(RenderedChat { text, assistant })
    }

    fn bad(&self, message: impl Into<String>) -> Error {
        Error::file(&self.path, message)
    }
}

/// Replaces transformers' `{% generation %}` and `{% endgeneration %}` by blocks that every Jinja has, with
/// the marks between them, so that whitespace is trimmed around them as around the originals.
fn mark_generation(source: &str) -> String {
    // The expressions are constants of this program.
    let tag = |name: &str| Regex::new(&format!(r"\{{%([-+]?)\s*{name}\s*([-+]?)%\}}"));
    let (Ok(start), Ok(end)) = (tag("generation"), tag("endgeneration")) else {
        return source.to_owned();
    };
    let source = start.replace_all(
        source,
        format!("{{%$1 if true %}}{{{{ '{GENERATION_START}' }}}}{{% if true $2%}}"),
    );
    end.replace_all(
        &source,
        format!("{{%$1 endif %}}{{{{ '{GENERATION_END}' }}}}{{% endif $2%}}"),
    )
    .into_owned()
}

#[cfg(test)]
mod tests;
