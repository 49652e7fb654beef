//! The operations of a Transformer's training step, in forward and backward pairs.
//!
//! On the CPU, activations and gradients are F32; frozen weights may be F32, F16 or BF16.

pub mod attention;
pub mod columns;
pub mod cross_entropy;
pub mod dora;
pub mod elementwise;
pub mod gather;
pub mod gelu;
pub mod kv_cache;
pub mod layer_norm;
pub mod linear_gradients;
pub mod lora_embedding;
pub mod lora_linear;
pub mod optimizer;
pub mod rms_norm;
pub mod rope;
pub mod segmented_lora;
pub mod swiglu;
