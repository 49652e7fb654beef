//! The driver API: one `extern "C"` function per symbol, named as CUDA names it.
//!
//! Work is done before a call returns, in the order of the calls, so every stream is in order and
//! every event that was recorded has happened; on a stream that is capturing it is kept instead.
//! What a stream is given goes through [`crate::state::Driver::submit`]. A kernel that faults is reported by its own launch,
//! where a GPU reports it at some later call; every call after it fails alike.
#![allow(non_snake_case)]

mod context;
mod control;
mod device;
mod graph;
mod launch;
mod memory;
mod module;
mod stream;
mod tensor_map;
mod unsupported;

pub use control::{Visitor, bits_of};
pub use unsupported::UNSUPPORTED;
