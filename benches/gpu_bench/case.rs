//! What is measured: an operation on a shape, and the least that it moves and computes.
#![allow(dead_code, reason = "each program uses its own part")]

use crate::device::{Device, Make};
use anyhow::Result;
use fuselora_kernels::{Element, Kernels, LaunchError};

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

/// An operation on activations `[tokens, width]` that memory alone limits.
pub struct ByRows<Tensors> {
    /// As [`Case::name`].
    pub name: &'static str,
    /// How often it reads or writes an activation.
    pub accesses: u64,
    /// The call.
    pub run: fn(&mut Tensors, &Kernels) -> Result<(), LaunchError>,
}

impl<Tensors: 'static> ByRows<Tensors> {
    /// Its row of the table, with the tensors that `new` makes.
    pub fn case(
        &self,
        shape: [u32; 2],
        element: Element,
        new: fn(&Device, [u32; 2], Element) -> Result<Tensors>,
    ) -> Case {
        let elements = u64::from(shape[0]) * u64::from(shape[1]);
        let run = self.run;
        Case {
            name: self.name,
            shape: shape.to_vec(),
            element,
            bytes: self.accesses * elements * element.size_in_bytes(),
            flops: 0,
            make: Box::new(move |device| {
                let mut tensors = new(device, shape, element)?;
                Ok(Box::new(move |kernels| run(&mut tensors, kernels)))
            }),
        }
    }
}
