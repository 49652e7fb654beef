//! Fuselora's CUDA kernels: the sources, their PTX, and the functions that launch them.
//!
//! One folder per family holds the `.cu` files and, beside each, the `.rs` that knows how to
//! launch it: it checks lengths, alignment and limits before the driver sees anything, and a bad
//! call is a [`LaunchError`] that names the tensor. The build compiles every source to PTX and
//! embeds it here; [`modules::KERNELS`] lists every kernel, and [`modules`] has one constant for
//! each, so that a launcher cannot ask for one that does not exist.
//!
//! Without the feature `cuda` this crate is empty.
#![deny(missing_docs)]
#![cfg(feature = "cuda")]

/// The parameter structs and constants of `kernels/abi.h`.
#[allow(
    missing_docs,
    non_snake_case,
    clippy::all,
    clippy::undocumented_unsafe_blocks
)]
pub mod abi {
    include!(concat!(env!("OUT_DIR"), "/abi.rs"));

    use cudarc::driver::DeviceRepr;

    // SAFETY: plain C structs of numbers, laid out by bindgen as the kernels' compiler lays them.
    unsafe impl DeviceRepr for AdamWStep {}
    // SAFETY: as above.
    unsafe impl DeviceRepr for AttentionShape {}
    // SAFETY: as above.
    unsafe impl DeviceRepr for ColumnBlock {}
    // SAFETY: as above.
    unsafe impl DeviceRepr for ColumnSumShape {}
    // SAFETY: as above.
    unsafe impl DeviceRepr for DoraWeight {}
    // SAFETY: as above.
    unsafe impl DeviceRepr for EmbeddingShape {}
    // SAFETY: as above.
    unsafe impl DeviceRepr for LoraDropout {}
    // SAFETY: as above.
    unsafe impl DeviceRepr for LoraPass {}
    // SAFETY: as above.
    unsafe impl DeviceRepr for LoraProduct {}
    // SAFETY: as above.
    unsafe impl DeviceRepr for LoraSegments {}
    // SAFETY: as above.
    unsafe impl DeviceRepr for LoraSums {}
    // SAFETY: as above.
    unsafe impl DeviceRepr for MatmulShape {}
    // SAFETY: as above.
    unsafe impl DeviceRepr for Nf4Gemv {}
    // SAFETY: as above.
    unsafe impl DeviceRepr for Nf4Weight {}
    // SAFETY: as above.
    unsafe impl DeviceRepr for NormShape {}
    // SAFETY: as above.
    unsafe impl DeviceRepr for OptimizerTable {}
    // SAFETY: as above.
    unsafe impl DeviceRepr for RopeShape {}
}

/// The embedded PTX and the table of kernels.
pub mod modules {
    include!(concat!(env!("OUT_DIR"), "/table.rs"));

    /// The PTX of one CUDA source.
    #[derive(Debug)]
    pub struct Module {
        /// The source, relative to `kernels/`.
        pub source: &'static str,
        /// The virtual architecture that it was compiled for: `80` or `90a`.
        pub arch: &'static str,
        /// The compute capability (major, minor) that it needs.
        pub capability: (i32, i32),
        /// Whether it needs exactly that capability, as architecture-specific PTX does, rather
        /// than that or a later one.
        pub exact: bool,
        /// The PTX.
        pub ptx: &'static str,
    }

    impl Module {
        /// The folder of its source: the family that its kernels belong to.
        pub fn family(&self) -> &'static str {
            self.source.split('/').next().unwrap_or(self.source)
        }

        /// The version of the PTX language, such as `9.0`, which the driver must know.
        pub fn ptx_version(&self) -> &'static str {
            let versions = |line: &'static str| line.strip_prefix(".version ");
            self.ptx.lines().find_map(versions).unwrap_or("unknown")
        }

        /// Whether a device of this compute capability can run it.
        pub fn runs_on(&self, capability: (i32, i32)) -> bool {
            if self.exact {
                capability == self.capability
            } else {
                capability >= self.capability
            }
        }
    }

    /// One kernel: an entry point of a module.
    #[derive(Debug)]
    pub struct Kernel {
        /// The name of the entry point, unique among all kernels.
        pub name: &'static str,
        /// The module that defines it.
        pub module: &'static Module,
    }
}

pub mod activation;
pub mod attention;
pub mod columns;
pub mod dora;
pub mod elementwise;
pub mod embedding;
pub mod linear_gradients;
pub mod lora_linear;
pub mod loss;
pub mod matmul;
pub mod nf4;
pub mod norm;
pub mod optimizer;
pub mod rope;

mod column_sum;
mod gemm;
mod launch;
mod operand;

pub use launch::{Kernels, LaunchError};
pub use operand::{Element, Operand, OperandMut, Stored};
