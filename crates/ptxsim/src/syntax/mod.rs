//! PTX text to a syntax tree.

mod error;

pub use error::LoadError;
