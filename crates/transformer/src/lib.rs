//! Checkpoints, decoder families and LoRA adapters.
#![deny(missing_docs)]

pub mod adapter;
pub mod atomic_file;
pub mod batch;
pub mod chat_template;
pub mod checkpoint;
pub mod config;
pub mod convert;
pub mod error;
pub mod families;
pub mod generate;
pub mod gguf;
pub mod layers;
pub mod lora;
mod low_rank;
pub mod memory_estimate;
pub mod merge;
pub mod model;
pub mod quantize;
mod random;
pub mod tokenizer;

pub use error::{Error, Result};
