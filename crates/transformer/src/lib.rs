//! Checkpoints, decoder families and LoRA adapters.
#![deny(missing_docs)]

pub mod adapter;
pub mod atomic_file;
pub mod chat_template;
pub mod checkpoint;
pub mod convert;
pub mod error;
pub mod gguf;
pub mod tokenizer;

pub use error::{Error, Result};
