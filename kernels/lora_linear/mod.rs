//! A frozen linear layer with its low-rank update as one operation, for projections that share an
//! input: `y = x·Wᵀ + bias + scaling · drop(x)·Aᵀ·Bᵀ`, forward and backward.
//!
//! The activations, `x`, `y`, `dy`, `dx`, and the weights are stored in one type, or the weights in
//! NF4. Everything of the update (`lora_a`, `lora_b`, `h`, gradients) and the bias are f32, and so
//! are all sums. No sum depends on the order in which blocks run.

mod backward;
mod dropout;
mod forward;
mod pass;
mod product;
mod segmented;

pub use backward::{Backward, Gradients, backward, backward_workspace};
pub use dropout::dropout;
pub use forward::{Output, forward, forward_workspace};
pub use pass::partial_sums;
pub use segmented::{Segment, add_segments};

use crate::abi::{LORA_MAX_GROUP, LORA_MAX_RANK, LoraDropout, LoraTerm};
use crate::{Element, LaunchError, Operand, nf4};

/// One linear layer.
#[derive(Debug, Clone, Copy)]
pub struct Projection<'a> {
    /// The frozen weight, `[out, in]`.
    pub weight: Weight<'a>,
    /// Added to each row of the output, `[out]` f32.
    pub bias: Option<Operand<'a>>,
    /// Rows of the weight.
    pub out_features: u32,
    /// The low-rank update.
    pub lora: Option<Lora<'a>>,
}

/// A frozen weight as it is stored.
#[derive(Debug, Clone, Copy)]
pub enum Weight<'a> {
    /// In the type of the activations.
    Dense(Operand<'a>),
    /// In NF4, dequantized on its way into the product.
    Nf4(nf4::Weight<'a>),
}

/// A low-rank update `scaling·B·A` of a weight.
#[derive(Debug, Clone, Copy)]
pub struct Lora<'a> {
    /// The down-projection, `[rank, in]` f32.
    pub a: Operand<'a>,
    /// The up-projection, `[out, rank]` f32.
    pub b: Operand<'a>,
    /// From 1 to 256.
    pub rank: u32,
    /// `alpha/rank`, or `alpha/√rank` for rsLoRA.
    pub scaling: f32,
    /// Dropout of the update's input.
    pub dropout: Option<Dropout<'a>>,
}

/// Dropout whose mask is a function of the position, as `dropout.cuh` defines it.
#[derive(Debug, Clone, Copy)]
pub struct Dropout<'a> {
    /// The probability that an element becomes zero, in 0..1.
    pub probability: f32,
    /// The key of the run.
    pub seed: u64,
    /// Tells the projections of a model apart.
    pub stream: u32,
    /// Tells the micro-steps of a run apart, `[1]` u32.
    pub step: Operand<'a>,
}

impl Lora<'_> {
    /// The dropout as kernels take it; a probability of 0 is none.
    fn dropout(&self) -> LoraDropout {
        self.dropout.map_or_else(LoraDropout::default, Dropout::get)
    }
}

impl Dropout<'_> {
    /// As kernels take it.
    fn get(self) -> LoraDropout {
        LoraDropout {
            seed: self.seed,
            step: self.step.address(),
            stream: self.stream,
            probability: self.probability,
            kept: 1.0 / (1.0 - self.probability),
        }
    }
}

impl Projection<'_> {
    /// The frozen part of a term, once it has been checked: `left`, an address, times the weight along `depth`.
    fn term(&self, left: u64, depth: u32) -> Result<LoraTerm, LaunchError> {
        let term = LoraTerm {
            left,
            depth,
            ..LoraTerm::default()
        };
        Ok(match &self.weight {
            Weight::Dense(weight) => LoraTerm {
                right: weight.address(),
                ..term
            },
            Weight::Nf4(weight) => LoraTerm {
                quantized: weight.check()?,
                ..term
            },
        })
    }
}

/// What the tensors of a call must agree with.
#[derive(Debug, Clone, Copy)]
struct Input {
    tokens: u32,
    in_features: u32,
    element: Element,
}

impl Input {
    fn check(
        tokens: u32,
        in_features: u32,
        x: &Operand,
        projections: usize,
    ) -> Result<Input, LaunchError> {
        if !matches!(x.element(), Element::F32 | Element::F16 | Element::Bf16) {
            return Err(LaunchError::Element {
                tensor: "x",
                expected: Element::F32,
                found: x.element(),
            });
        }
        x.check("x", x.element(), u64::from(tokens) * u64::from(in_features))?;
        if projections > LORA_MAX_GROUP as usize {
            return Err(LaunchError::Parameter {
                parameter: "projections",
                found: projections as u64,
                expected: "at most 4 can share an input",
            });
        }
        Ok(Input {
            tokens,
            in_features,
            element: x.element(),
        })
    }

    fn check_projection(&self, projection: &Projection) -> Result<(), LaunchError> {
        let (out, in_features) = (
            u64::from(projection.out_features),
            u64::from(self.in_features),
        );
        match &projection.weight {
            Weight::Dense(weight) => weight.check("weight", self.element, out * in_features)?,
            Weight::Nf4(weight) => {
                let elements = weight.check()?.elements;
                if elements != out * in_features {
                    return Err(LaunchError::Length {
                        tensor: "weight",
                        expected: out * in_features,
                        found: elements,
                    });
                }
            }
        }
        if let Some(bias) = projection.bias {
            bias.check("bias", Element::F32, out)?;
        }
        match &projection.lora {
            Some(lora) => self.check_lora(lora, out),
            None => Ok(()),
        }
    }

    /// The update of a weight with `out` rows.
    fn check_lora(&self, lora: &Lora, out: u64) -> Result<(), LaunchError> {
        let rank = u64::from(lora.rank);
        if !(1..=LORA_MAX_RANK).contains(&lora.rank) {
            return Err(LaunchError::Parameter {
                parameter: "rank",
                found: rank,
                expected: "it must be from 1 to 256",
            });
        }
        if let Some(dropout) = lora.dropout {
            if !(0.0..1.0).contains(&dropout.probability) {
                return Err(LaunchError::Parameter {
                    parameter: "dropout probability, in percent",
                    found: (100.0 * dropout.probability) as u64,
                    expected: "it must be at least 0 and below 100",
                });
            }
            dropout.step.check("dropout step", Element::U32, 1)?;
        }
        lora.a
            .check("lora_a", Element::F32, rank * u64::from(self.in_features))?;
        lora.b.check("lora_b", Element::F32, out * rank)
    }

    /// `[tokens, features]` of the activations' type.
    fn expect_activations(
        &self,
        tensor: &'static str,
        operand: &Operand,
        features: u32,
    ) -> Result<(), LaunchError> {
        let len = u64::from(self.tokens) * u64::from(features);
        operand.check(tensor, self.element, len)
    }

    /// `[tokens, rank]` f32.
    fn expect_low_rank(
        &self,
        tensor: &'static str,
        operand: &Operand,
        lora: &Lora,
    ) -> Result<(), LaunchError> {
        let len = u64::from(self.tokens) * u64::from(lora.rank);
        operand.check(tensor, Element::F32, len)
    }
}

/// A buffer that a call needs while it runs, handed out part by part: f32, every part at a multiple
/// of 16 bytes.
struct Workspace {
    next: u64,
}

impl Workspace {
    /// Checks that `buffer` holds at least `len` elements.
    fn new(buffer: &Operand, len: u64) -> Result<Workspace, LaunchError> {
        buffer.check("workspace", Element::F32, buffer.len().max(len))?;
        if len > 0 {
            buffer.check_aligned("workspace", 16)?;
        }
        Ok(Workspace {
            next: buffer.address(),
        })
    }

    /// The elements that are enough for activations of any type, by those that one type needs.
    fn for_any(needed: impl Fn(Element) -> u64) -> u64 {
        needed(Element::F32).max(needed(Element::Bf16))
    }

    /// What [`Workspace::take`] uses up for `len` elements.
    fn padded(len: u64) -> u64 {
        len.next_multiple_of(4)
    }

    /// The address of the next `len` elements.
    fn take(&mut self, len: u64) -> u64 {
        let address = self.next;
        self.next += 4 * Workspace::padded(len);
        address
    }
}
