//! Frozen projections with their low-rank pairs.

use std::sync::Arc;

use fuselora_tensor::ops::lora_linear::{self, Backward, Output, Projection};
use fuselora_tensor::{Tensor, Weight};

use crate::error::Result;
use crate::lora::{LoraGradients, Pass};

/// One frozen projection, `y = x·Wᵀ + bias`.
pub struct Linear {
    /// Module path, as PEFT names it: `model.layers.0.self_attn.q_proj`.
    pub name: String,
    /// Position in the model's list of projections: where its pair stands in a [`crate::lora::Lora`].
    pub index: usize,
    /// `[out_features, in_features]`; shared with the embedding where they are tied.
    pub weight: Arc<Weight>,
    /// `[out_features]`.
    pub bias: Option<Tensor>,
}

impl Linear {
    fn projection<'a>(&'a self, pass: &Pass<'a>) -> Projection<'a> {
        Projection {
            weight: &self.weight,
            bias: self.bias.as_ref(),
            lora: pass.operand(self.index),
        }
    }
}

/// Projects one input through several projections that share it; one output each, in order.
pub fn forward<const N: usize>(
    x: &Tensor,
    linears: [&Linear; N],
    pass: &Pass<'_>,
) -> Result<[Output; N]> {
    let projections = linears.map(|linear| linear.projection(pass));
    let outputs: Vec<Output> = lora_linear::forward(x, &projections)?;
    for (linear, output) in linears.iter().zip(&outputs) {
        pass.check(&output.y, || linear.name.clone())?;
    }
    // lora_linear::forward gives one output per projection.
    outputs
        .try_into()
        .map_err(|_| crate::error::Error::Input("lora_linear lost an output".into()))
}

/// The backward pass of [`forward`]: adds the pairs' gradients and returns `dx`, summed over the projections.
///
/// `dys` and `hs` (the low-rank activations that forward returned) are in the order of `linears`.
pub fn backward<const N: usize>(
    x: &Tensor,
    linears: [&Linear; N],
    dys: [&Tensor; N],
    hs: [Option<&Tensor>; N],
    pass: &Pass<'_>,
    gradients: &mut LoraGradients,
    need_dx: bool,
) -> Result<Option<Tensor>> {
    let mut taken = linears.map(|linear| gradients.take(linear.index));
    let items = linears
        .iter()
        .zip(&mut taken)
        .zip(dys.iter().zip(hs))
        .map(|((linear, gradient), (dy, h))| Backward {
            projection: linear.projection(pass),
            dy,
            h,
            gradients: gradient.as_mut().map(|g| g.operand()),
        })
        .collect();
    let dx = lora_linear::backward(x, items, need_dx);
    for (linear, gradient) in linears.iter().zip(taken) {
        gradients.put(linear.index, gradient);
    }
    let dx = dx?;
    if let Some(dx) = &dx {
        pass.check(dx, || {
            format!(
                "the input gradient of {}",
                linears.map(|l| l.name.as_str()).join(", ")
            )
        })?;
    }
    Ok(dx)
}
