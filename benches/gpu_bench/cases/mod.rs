//! What is measured, a file per family of kernels. `compared` gives what is fused in a family, and the same as
//! operations of their own.
#![allow(dead_code, reason = "each program uses its own part")]

pub mod attention;
mod copy;
mod dora;
mod elementwise;
mod lora_linear;
pub mod loss;
pub mod nf4;
pub mod norm;
pub mod optimizer;
mod rope;

use crate::case::{Case, Scope};

/// A family, and its cases.
pub type Group = (&'static str, fn(Scope) -> Vec<Case>);

/// The copy first: the others are judged beside it.
pub const GROUPS: [Group; 10] = [
    ("copy", copy::cases),
    ("lora_linear", lora_linear::cases),
    ("attention", attention::cases),
    ("nf4", nf4::cases),
    ("elementwise", elementwise::cases),
    ("norm", norm::cases),
    ("dora", dora::cases),
    ("rope", rope::cases),
    ("loss", loss::cases),
    ("optimizer", optimizer::cases),
];
