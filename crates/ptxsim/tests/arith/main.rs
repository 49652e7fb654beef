//! The scalar arithmetic against references from outside the crate: exact integers, the host's IEEE
//! arithmetic, the `half` crate, and the ISA's pseudocode written out bit by bit.

mod bits;
mod convert;
mod float;
mod int;
