//! Shape-checked tensors and the operations of a LoRA training step.
//!
//! A [`Tensor`] is contiguous, row-major and lives on a [`Device`]. The operations in [`ops`] come in
//! forward and backward pairs, validate every shape and data type, and name the offending tensor when
//! they refuse a call. [`mod@reference`] holds the same mathematics in plain f64, to test against.
#![deny(missing_docs)]

#[cfg(target_endian = "big")]
compile_error!("tensor storage is little endian");

mod check;
mod convert;
#[cfg(feature = "cuda")]
mod cuda;
mod device;
mod dtype;
mod dynamic_8bit;
mod error;
mod graph;
mod matrix;
pub mod nf4;
pub mod ops;
mod parallel;
pub mod philox;
mod pool;
pub mod reference;
mod shape;
mod simd;
mod tensor;
mod weight;

pub use device::{Device, Holding};
pub use dtype::DType;
pub use error::{Error, Result};
pub use graph::Graph;
pub use nf4::Nf4Weight;
pub use pool::{Held, MemoryUse, Purpose};
pub use shape::Shape;
pub use tensor::Tensor;
pub use weight::Weight;
