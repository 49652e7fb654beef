//! Runs PTX on the CPU, a warp at a time, under checks stricter than a GPU's.
//!
//! ```
//! use ptxsim::{Gpu, LaunchConfig, Profile};
//!
//! let gpu = Gpu::new(Profile::a100());
//! let module = gpu.load(r#"
//!     .version 8.0
//!     .target sm_80
//!     .address_size 64
//!     .visible .entry double(.param .u64 data)
//!     {
//!         .reg .b32 %r<3>;
//!         .reg .b64 %rd<4>;
//!         ld.param.u64 %rd1, [data];
//!         mov.u32 %r1, %tid.x;
//!         mul.wide.u32 %rd2, %r1, 4;
//!         add.s64 %rd3, %rd1, %rd2;
//!         ld.global.u32 %r2, [%rd3];
//!         shl.b32 %r2, %r2, 1;
//!         st.global.u32 [%rd3], %r2;
//!         ret;
//!     }"#).unwrap();
//! let data = gpu.alloc(128).unwrap();
//! gpu.fill32(data, 21, 32).unwrap();
//! let kernel = module.kernel("double").unwrap();
//! let config = LaunchConfig { block: [32, 1, 1], ..LaunchConfig::default() };
//! gpu.launch(&kernel, &config, &data.0.to_le_bytes()).unwrap();
//! let mut out = [0u8; 128];
//! gpu.read(data, &mut out).unwrap();
//! assert_eq!(out[0], 42);
//! ```
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
