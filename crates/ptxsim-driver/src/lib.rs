//! The CUDA driver API on [`ptxsim`]: programs that call CUDA through its driver library, such as
//! those that use cudarc, run without a GPU and without a change.
//!
//! The crate is two things. As a shared library it exports the driver API. As a Rust library it
//! has one function, [`select`], which opens that shared library in the current process before
//! anything asked for a driver:
//!
//! ```no_run
//! let simulator = ptxsim_driver::select("a100")?;
//! let context = cudarc::driver::CudaContext::new(0)?; // a simulated A100
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! **How it is found.** CUDA programs open their driver by the name `libcuda.so`. This library's
//! file has another name, so nothing ever finds it by accident; but the name inside it (its
//! SONAME) is `libcuda.so`, so that once it has been opened by its path, the loader answers later
//! requests for that name with it. A process therefore has the simulated driver or a real one,
//! and it gets the simulated one only by asking.
//!
//! **Where it lies.** `PTXSIM_DRIVER`, when set, is its path. Otherwise it lies beside the program
//! or in the folder `deps` beside it: cargo puts it into one of the two for every program and test
//! that depends on this crate, and a package ships it beside the program.
//!
//! **What differs from a GPU.** Every call has done its work when it returns; a fault is reported
//! by the launch that ran into it, and by every later call until the context is destroyed. Its
//! text, with kernel, thread and line, is in [`Simulator::last_fault`] and on standard error.
//! Symbols for what is not simulated exist and answer `CUDA_ERROR_NOT_SUPPORTED`: arrays,
//! textures, graphs that are built node by node, memory pools, managed memory, peers, cooperative launches.
#![deny(missing_docs)]

mod api;
mod capture;
mod error;
mod pointer;
mod select;
mod state;

pub use api::UNSUPPORTED;
pub use select::{CountedLaunch, SelectError, Simulator, select};
