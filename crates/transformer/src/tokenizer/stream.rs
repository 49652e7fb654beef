//! Decoding while tokens arrive.

use super::Tokenizer;
use crate::error::Result;

/// Turns tokens into text as they come, never splitting a character.
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    /// The tokens whose text is not out yet, after some that give their decoding its context.
    ids: Vec<u32>,
    /// How many of `ids` are out already.
    out: usize,
}

impl<'a> TextStream<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer) -> TextStream<'a> {
        TextStream {
            tokenizer,
            ids: Vec::new(),
            out: 0,
        }
    }

    /// Takes a token, and returns the text that is complete with it; often empty.
    ///
    /// # Errors
    /// When the token cannot be decoded.
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.ids.push(id);
        let (before, all) = self.texts()?;
        // A character whose last bytes are still to come decodes to the replacement character.
        if all.ends_with('\u{fffd}') || !all.starts_with(&before) {
            return Ok(String::new());
        }
        let text = all[before.len()..].to_owned();
        self.ids.drain(..self.out);
        self.out = self.ids.len();
        Ok(text)
    }

    /// The text of what is left, with replacement characters for bytes that form no character.
    ///
    /// # Errors
    /// When a token cannot be decoded.
    pub fn finish(mut self) -> Result<String> {
        let (before, all) = self.texts()?;
        self.ids.clear();
        Ok(all.strip_prefix(&before).unwrap_or(&all).to_owned())
    }

    /// The text that is out, and the text with the new tokens.
    fn texts(&self) -> Result<(String, String)> {
        Ok((
            self.tokenizer.decode(&self.ids[..self.out], true)?,
            self.tokenizer.decode(&self.ids, true)?,
        ))
    }
}
