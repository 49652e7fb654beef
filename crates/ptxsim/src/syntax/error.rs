//! Why a PTX text was refused.

use std::fmt;

/// A PTX text that cannot be loaded: what is wrong and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoadError {
    /// Line, from 1; 0 when the whole module is meant.
    pub line: u32,
    /// Column, from 1.
    pub column: u32,
    /// What is wrong, in one sentence.
    pub message: String,
    /// The text of the line.
    pub text: String,
}

impl LoadError {
    /// An error at byte `offset` of `source`.
    pub(crate) fn at(source: &str, offset: usize, message: impl Into<String>) -> LoadError {
        let offset = (0..=offset.min(source.len()))
            .rev()
            .find(|&o| source.is_char_boundary(o));
        let before = &source[..offset.unwrap_or(0)];
        let start = before.rfind('\n').map_or(0, |newline| newline + 1);
        let text = source[start..].lines().next().unwrap_or_default();
        LoadError {
            line: before.matches('\n').count() as u32 + 1,
            column: before[start..].chars().count() as u32 + 1,
            message: message.into(),
            text: text.to_string(),
        }
    }

    /// An error about the module as a whole.
    pub(crate) fn whole(message: impl Into<String>) -> LoadError {
        LoadError {
            line: 0,
            column: 0,
            message: message.into(),
            text: String::new(),
        }
    }
}

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.line == 0 {
            return f.write_str(&self.message);
        }
        writeln!(
            f,
            "PTX line {}, column {}: {}",
            self.line, self.column, self.message
        )?;
        let text = self.text.replace('\t', " ");
        writeln!(f, "  {text}")?;
        write!(f, "  {:>width$}", "^", width = self.column.max(1) as usize)
    }
}

impl std::error::Error for LoadError {}
