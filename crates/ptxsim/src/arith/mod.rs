//! The arithmetic of PTX as pure functions: no engine, no memory, no state.
//!
//! - [`int`]: integer arithmetic; [`bits`]: bit fields, permutes, shifts; [`dot`]: packed dot products.
//! - [`soft`]: exact numbers and their rounding to any binary format; everything that is not
//!   native to the host is computed exactly there and rounded once.
//! - [`float`]: `add`, `mul`, `fma`, `div`, `min`... on [`f32`], [`f64`], [`half::f16`] and
//!   [`half::bf16`], written once over the trait [`float::Float`].
//! - [`approx`]: the `.approx` functions; [`convert`]: `cvt`; [`compare`]: `set`, `setp`, `testp`.
//!
//! NaN results of f16, bf16 and f32 operations are PTX's canonical NaN (all ones below the sign).

pub mod approx;
pub mod bits;
pub mod compare;
pub mod convert;
pub mod dot;
pub mod float;
pub mod int;
pub mod soft;

pub use soft::{Format, Rounding};
