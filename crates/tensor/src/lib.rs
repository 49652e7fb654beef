//! Shape-checked tensors and the operations of a LoRA training step.
#![deny(missing_docs)]
