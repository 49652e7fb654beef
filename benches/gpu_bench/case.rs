//! What is measured: an operation on a shape, and the least that it moves and computes.
#![allow(dead_code, reason = "each program uses its own part")]

use crate::device::Make;
use fuselora_kernels::Element;

/// One row of the table.
pub struct Case {
    /// The operation; `peers.py` measures others of the same name.
    pub name: &'static str,
    /// Its extents, in the order that the operation's module tells.
    pub shape: Vec<u32>,
    /// How activations are stored.
    pub element: Element,
    /// The least that it moves: each input read once, each result written once.
    pub bytes: u64,
    /// Multiplications and additions of its matrix products; 0 where memory alone limits it.
    pub flops: u64,
    /// Prepares a call on new tensors.
    pub make: Make,
}

/// How much is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// The shapes of whole models at several lengths.
    Full,
    /// The main shapes.
    Quick,
    /// Shapes that a simulated device runs in a moment.
    Tiny,
}

/// The types that activations are stored in.
pub const STORAGE: [Element; 3] = [Element::Bf16, Element::F16, Element::F32];

impl Scope {
    /// The types that kernels limited by memory are measured in.
    pub fn storage(self) -> &'static [Element] {
        match self {
            Scope::Quick => &STORAGE[..1],
            Scope::Tiny | Scope::Full => &STORAGE,
        }
    }
}
