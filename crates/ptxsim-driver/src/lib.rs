//! The CUDA driver API on ptxsim, as a shared library.
#![deny(missing_docs)]
