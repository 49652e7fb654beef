//! The 4-bit NormalFloat format of QLoRA (Dettmers et al. 2023), laid out as bitsandbytes does.

mod dequantize;

pub use dequantize::{Absmax, dequantize};
