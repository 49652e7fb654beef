//! One linear layer with its low-rank update: fused, and as PEFT computes it, operation by operation.
#![allow(dead_code, reason = "each program uses its own part")]

pub mod fused;
pub mod group;
pub mod llama;
mod unfused;

pub use fused::{Fused, Wanted};
pub use unfused::Unfused;

use std::fmt;

/// `x [tokens, in_features]`, a weight `[out_features, in_features]`, and an update of this rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    pub tokens: u32,
    pub in_features: u32,
    pub out_features: u32,
    pub rank: u32,
}

impl Shape {
    /// Elements of `x`, of the weight, of `y`.
    pub fn elements(&self) -> [u64; 3] {
        let [tokens, in_features, out_features, _] = self.extents();
        [
            tokens * in_features,
            out_features * in_features,
            tokens * out_features,
        ]
    }

    /// Tokens, inputs, outputs, rank.
    pub fn extents(&self) -> [u64; 4] {
        [self.tokens, self.in_features, self.out_features, self.rank].map(u64::from)
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [tokens, in_features, out_features, rank] = self.extents();
        write!(f, "{tokens} x {in_features} x {out_features}, r = {rank}")
    }
}
