//! CUDA kernels of Fuselora.
#![deny(missing_docs)]
