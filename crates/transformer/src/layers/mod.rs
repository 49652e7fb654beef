//! The parts of a decoder block, each with its forward and its backward pass.
//!
//! There is no tape: a forward returns what its backward needs, and a block's backward calls its
//! parts in reverse, to be read top to bottom.

pub mod attention;
pub mod block;
pub mod embedding;
pub mod linear;
pub mod mlp;
pub mod norm;
