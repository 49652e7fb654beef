//! The MLP of a block: gated, `down(silu(gate(x)) * up(x))` (Shazeer 2020), or plain, `down(gelu(up(x)))`.

use fuselora_tensor::Tensor;
use fuselora_tensor::ops::gelu::{self, GeluKind};
use fuselora_tensor::ops::swiglu;

use super::linear::{self, Linear};
use crate::error::Result;
use crate::lora::{LoraGradients, Pass};

/// The MLP of one block.
pub struct Mlp {
    /// Into the inner layer, `[intermediate, hidden]` each.
    pub inner: Inner,
    /// `[hidden, intermediate]`.
    pub down_proj: Linear,
}

/// The projections into the inner layer, and their activation.
pub enum Inner {
    /// `silu(gate(x)) * up(x)`.
    SwiGlu {
        /// The gate.
        gate: Linear,
        /// What it gates.
        up: Linear,
    },
    /// `gelu(up(x))`.
    Gelu {
        /// The only projection.
        up: Linear,
        /// Which formula.
        kind: GeluKind,
    },
}

/// What backward needs; the activation is computed again.
pub struct Saved {
    gate: Option<linear::Output>,
    up: linear::Output,
    down: linear::Saved,
}

impl Mlp {
    /// Every projection.
    pub fn linears(&self) -> impl Iterator<Item = &Linear> {
        let (gate, up) = match &self.inner {
            Inner::SwiGlu { gate, up } => (Some(gate), up),
            Inner::Gelu { up, .. } => (None, up),
        };
        gate.into_iter().chain([up, &self.down_proj])
    }

    /// `x [tokens, hidden]` to `[tokens, hidden]`.
    pub fn forward(&self, x: &Tensor, pass: &Pass<'_>) -> Result<(Tensor, Saved)> {
        let (gate, up) = match &self.inner {
            Inner::SwiGlu { gate, up } => {
                let [gate, up] = linear::forward(x, [gate, up], pass)?;
                (Some(gate), up)
            }
            Inner::Gelu { up, .. } => {
                let [up] = linear::forward(x, [up], pass)?;
                (None, up)
            }
        };
        let activation = self.activation(gate.as_ref(), &up)?;
        pass.check(&activation, || {
            format!("the activation before {}", self.down_proj.name)
        })?;
        let [down] = linear::forward(&activation, [&self.down_proj], pass)?;
        let saved = Saved {
            gate,
            up,
            down: down.saved,
        };
        Ok((down.y, saved))
    }

    fn activation(&self, gate: Option<&linear::Output>, up: &linear::Output) -> Result<Tensor> {
        Ok(match (&self.inner, gate) {
            (Inner::SwiGlu { .. }, Some(gate)) => swiglu::forward(&gate.y, &up.y)?,
            (Inner::Gelu { kind, .. }, _) => gelu::forward(&up.y, *kind)?,
            (Inner::SwiGlu { .. }, None) => return Err(foreign()),
        })
    }

    /// From the output's gradient to the input's, unless `need_dx` is false.
    pub fn backward(
        &self,
        dy: &Tensor,
        x: &Tensor,
        saved: Saved,
        pass: &Pass<'_>,
        gradients: &mut LoraGradients,
        need_dx: bool,
    ) -> Result<Option<Tensor>> {
        let Saved { gate, up, down } = saved;
        let activation = self.activation(gate.as_ref(), &up)?;
        let d_activation = linear::backward(
            &activation,
            [&self.down_proj],
            [dy],
            [&down],
            pass,
            gradients,
            true,
        )?;
        drop(activation);
        let Some(d_activation) = d_activation else {
            return Ok(None);
        };
        match (&self.inner, gate) {
            (
                Inner::SwiGlu {
                    gate: w_gate,
                    up: w_up,
                },
                Some(gate),
            ) => {
                let (d_gate, d_up) = swiglu::backward(&d_activation, gate.y, up.y)?;
                drop(d_activation);
                let saved = [&gate.saved, &up.saved];
                linear::backward(
                    x,
                    [w_gate, w_up],
                    [&d_gate, &d_up],
                    saved,
                    pass,
                    gradients,
                    need_dx,
                )
            }
            (Inner::Gelu { up: w_up, kind }, _) => {
                let d_up = gelu::backward(d_activation, &up.y, *kind)?;
                linear::backward(x, [w_up], [&d_up], [&up.saved], pass, gradients, need_dx)
            }
            (Inner::SwiGlu { .. }, None) => Err(foreign()),
        }
    }
}

fn foreign() -> crate::error::Error {
    crate::error::Error::Input("an MLP was given what an MLP of another kind saved".into())
}
