#![doc = include_str!("../README.md")]
//!
//! ## Inside
//!
//! The way through the crate: [`syntax`] reads text into a tree, `program` decodes the tree into a
//! dense list of instructions, `exec` runs it with the pure functions of [`arith`] and [`matrix`]
//! over the memory of `memory`, and an `Observer` watches: the checks and the counters
//! are observers. What goes wrong is a [`Fault`].
#![deny(missing_docs)]

pub mod arith;
pub mod matrix;
pub mod observe;
pub mod syntax;

mod exec;
mod gpu;
mod memory;
mod profile;
mod program;
mod report;

pub use gpu::{Gpu, Kernel, LaunchConfig, LaunchReport, Module};
pub use memory::{AllocationInfo, DevicePtr, MemoryError, MemoryInfo};
pub use observe::{Checks, Counters};
pub use profile::Profile;
pub use program::Param;
pub use report::{Access, AccessKind, Fault, FaultKind, Location, Party, SourceLine, Space};
pub use syntax::LoadError;
