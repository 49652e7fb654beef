//! Checkpoints, decoder families and LoRA adapters.
#![deny(missing_docs)]
