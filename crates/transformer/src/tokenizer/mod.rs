//! Text to token ids and back: the tokenizer that a checkpoint ships, from `tokenizer.json` or a GGUF file.

mod gguf;
mod stream;

use std::{
    ops::Range,
    path::{Path, PathBuf},
};

use serde_json::Value;
use tokenizers::processors::template::TemplateProcessing;

pub use gguf::TokenizerFiles;
pub use stream::TextStream;

use crate::{
    chat_template::ChatTemplate,
    checkpoint::{Checkpoint, read_json},
    error::{Error, Result},
    gguf::GgufFile,
};

/// A checkpoint's tokenizer, with the special tokens and the chat template that belong to it.
pub struct Tokenizer {
    path: PathBuf,
    inner: tokenizers::Tokenizer,
    bos: Option<u32>,
    eos: Vec<u32>,
    pad: Option<u32>,
    chat_template: Option<ChatTemplate>,
}

impl Tokenizer {
    /// The tokenizer of a checkpoint: of its folder, or of the GGUF file.
    ///
    /// # Errors
    /// When it is missing, corrupt, or of a kind that cannot be read.
    pub fn open(checkpoint: &Checkpoint) -> Result<Tokenizer> {
        match checkpoint.gguf() {
            Some(gguf) => Tokenizer::from_gguf(gguf),
            None => Tokenizer::from_folder(checkpoint.path()),
        }
    }

    /// Reads `tokenizer.json`, and where they are there `tokenizer_config.json`, `generation_config.json`,
    /// `config.json` and `chat_template.jinja`.
    ///
    /// # Errors
    /// When `tokenizer.json` is missing, or one of the files is corrupt.
    pub fn from_folder(folder: &Path) -> Result<Tokenizer> {
        let path = folder.join("tokenizer.json");
        if !path.is_file() {
            return Err(Error::file(
                folder,
                "holds no tokenizer.json, the only tokenizer format that is read",
            ));
        }
        let optional = |name: &str| {
            let path = folder.join(name);
            if path.is_file() {
                read_json(&path)
            } else {
                Ok(Value::Null)
            }
        };
        let config = optional("tokenizer_config.json")?;
        let mut generation = optional("generation_config.json")?;
        if generation.get("eos_token_id").is_none_or(Value::is_null) {
            generation = optional("config.json")?;
        }
        let inner = tokenizers::Tokenizer::from_file(&path).map_err(|error| {
            Error::file(&path, format!("is no tokenizer that can be read: {error}"))
        })?;
        let template = folder.join("chat_template.jinja");
        let template = if template.is_file() {
            Some(
                std::fs::read_to_string(&template)
                    .map_err(|source| Error::io(&template, source))?,
            )
        } else {
            None
        };
        Tokenizer::assemble(path, inner, &config, &generation, template)
    }

    /// Builds the tokenizer that a GGUF file's metadata describe.
    ///
    /// # Errors
    /// When they are incomplete, or name a tokenizer that cannot be rebuilt.
    pub fn from_gguf(gguf: &GgufFile) -> Result<Tokenizer> {
        let files = TokenizerFiles::from_gguf(gguf)?;
        let inner =
            tokenizers::Tokenizer::from_bytes(files.tokenizer.to_string()).map_err(|error| {
                Error::file(
                    gguf.path(),
                    format!("holds no tokenizer that can be read: {error}"),
                )
            })?;
        Tokenizer::assemble(
            gguf.path().to_owned(),
            inner,
            &files.config,
            &files.generation,
            None,
        )
    }

    fn assemble(
        path: PathBuf,
        mut inner: tokenizers::Tokenizer,
        config: &Value,
        generation: &Value,
        template: Option<String>,
    ) -> Result<Tokenizer> {
        let token =
            |key: &str| special_token(config, key).and_then(|token| inner.token_to_id(token));
        let bos = token("bos_token");
        let mut eos = match generation.get("eos_token_id") {
            Some(Value::Array(ids)) => ids.iter().filter_map(id).collect(),
            Some(one) => id(one).into_iter().collect(),
            None => Vec::new(),
        };
        let eos_token = token("eos_token");
        if let Some(id) = eos_token.filter(|id| !eos.contains(id)) {
            eos.push(id);
        }
        let pad = token("pad_token").or(eos.first().copied());
        let chat_template = ChatTemplate::from_tokenizer_config(&path, config, template)?;
        apply_added_ends(
            &mut inner,
            config,
            (bos, special_token(config, "bos_token")),
            (eos_token, special_token(config, "eos_token")),
        )
        .map_err(|message| Error::file(&path, message))?;
        // Truncation and padding are for batches of other libraries; here they would change the text.
        inner.with_padding(None);
        inner
            .with_truncation(None)
            .map_err(|error| Error::file(&path, error.to_string()))?;
        Ok(Tokenizer {
            path,
            inner,
            bos,
            eos,
            pad,
            chat_template,
        })
    }

    /// The token ids of a text; with `add_special_tokens`, those that the tokenizer puts around it too.
    ///
    /// # Errors
    /// When the text cannot be encoded.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        let encoding = self
            .inner
            .encode_fast(text, add_special_tokens)
            .map_err(|error| self.bad(error))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The token ids of a text as [`Tokenizer::encode`] gives them, each with whether it ends inside one of `spans`
    /// (byte ranges, in order); an added token does not.
    ///
    /// # Errors
    /// When the text cannot be encoded.
    pub fn encode_spans(
        &self,
        text: &str,
        spans: &[Range<usize>],
        add_special_tokens: bool,
    ) -> Result<Vec<(u32, bool)>> {
        let encoding = self
            .inner
            .encode(text, add_special_tokens)
            .map_err(|error| self.bad(error))?;
        let inside = |&(_, end): &(usize, usize)| {
            spans.iter().any(|span| span.start < end && end <= span.end)
        };
        Ok(encoding
            .get_ids()
            .iter()
            .copied()
            .zip(encoding.get_offsets().iter().map(inside))
            .collect())
    }

    /// The text of token ids.
    ///
    /// # Errors
    /// When they cannot be decoded.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String> {
        self.inner
            .decode(ids, skip_special_tokens)
            .map_err(|error| self.bad(error))
    }

    /// Decodes tokens one by one, as they are generated. Special tokens are left out.
    pub fn stream(&self) -> TextStream<'_> {
        TextStream::new(self)
    }

    /// One more than the largest token id.
    pub fn vocab_size(&self) -> usize {
        self.inner
            .get_vocab(true)
            .into_values()
            .max()
            .map_or(0, |id| id as usize + 1)
    }

    /// The id of a token by its text.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The token that begins a text.
    pub fn bos_token_id(&self) -> Option<u32> {
        self.bos
    }

    /// The tokens that end a generation.
    pub fn eos_token_ids(&self) -> &[u32] {
        &self.eos
    }

    /// The token that fills up rows.
    pub fn pad_token_id(&self) -> Option<u32> {
        self.pad
    }

    /// How conversations become text, where the checkpoint says so.
    pub fn chat_template(&self) -> Option<&ChatTemplate> {
        self.chat_template.as_ref()
    }

    fn bad(&self, error: tokenizers::Error) -> Error {
        Error::file(&self.path, format!("cannot tokenize: {error}"))
    }
}

fn id(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|id| u32::try_from(id).ok())
}

/// A special token's text: a string, or an object with `content`.
pub(crate) fn special_token<'a>(config: &'a Value, key: &str) -> Option<&'a str> {
    let token = config.get(key)?;
    token.get("content").unwrap_or(token).as_str()
}

/// Makes the tokenizer add beginning and end tokens as `add_bos_token` and `add_eos_token` say, where
/// `tokenizer_config.json` has them and `tokenizer.json` does otherwise; as transformers does.
fn apply_added_ends(
    inner: &mut tokenizers::Tokenizer,
    config: &Value,
    bos: (Option<u32>, Option<&str>),
    eos: (Option<u32>, Option<&str>),
) -> std::result::Result<(), String> {
    let asked = |key: &str| config.get(key).and_then(Value::as_bool);
    let (asked_bos, asked_eos) = (asked("add_bos_token"), asked("add_eos_token"));
    let ends = inner
        .encode_fast("", true)
        .map_err(|error| error.to_string())?;
    let has = |token: Option<u32>| token.is_some_and(|token| ends.get_ids().contains(&token));
    let (has_bos, has_eos) = (has(bos.0), has(eos.0) && eos.0 != bos.0);
    let wants_bos = asked_bos.unwrap_or(has_bos);
    let wants_eos = asked_eos.unwrap_or(has_eos);
    if (wants_bos, wants_eos) == (has_bos, has_eos) {
        return Ok(());
    }
    let end = |wanted: bool, (id, token): (Option<u32>, Option<&str>)| {
        Some((token?.to_owned(), id?)).filter(|_| wanted)
    };
    let (bos, eos) = (end(wants_bos, bos), end(wants_eos, eos));
    let piece = |end: &Option<(String, u32)>| end.as_ref().map(|(token, _)| format!("{token}:0"));
    let single: Vec<String> = piece(&bos)
        .into_iter()
        .chain(["$A:0".to_owned()])
        .chain(piece(&eos))
        .collect();
    let special: Vec<(String, u32)> = bos.into_iter().chain(eos).collect();
    let template = TemplateProcessing::builder()
        .try_single(single)
        .map_err(|error| error.to_string())?
        .special_tokens(special)
        .build()
        .map_err(|error| error.to_string())?;
    inner.with_post_processor(Some(template));
    Ok(())
}
