//! PTX text to a syntax tree.
//!
//! The tree keeps names as written and says nothing about what an opcode means: that is decided
//! in `program`, where every opcode and modifier is looked up.

pub(crate) mod ast;
mod error;
mod lexer;
mod parser;

pub use error::LoadError;
pub(crate) use parser::parse;
