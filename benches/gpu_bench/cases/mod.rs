//! What is measured, a file per family of kernels.

mod attention;
mod copy;
mod elementwise;
mod lora_linear;
mod loss;
mod nf4;
mod norm;
mod optimizer;
mod rope;

use crate::case::{Case, Scope};

/// A family, and its cases.
pub type Group = (&'static str, fn(Scope) -> Vec<Case>);

/// The copy first: the others are judged beside it.
pub const GROUPS: [Group; 9] = [
    ("copy", copy::cases),
    ("lora_linear", lora_linear::cases),
    ("attention", attention::cases),
    ("nf4", nf4::cases),
    ("elementwise", elementwise::cases),
    ("norm", norm::cases),
    ("rope", rope::cases),
    ("loss", loss::cases),
    ("optimizer", optimizer::cases),
];
