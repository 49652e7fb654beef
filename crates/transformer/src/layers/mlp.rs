//! The gated MLP, `down(silu(gate(x)) * up(x))` (Shazeer 2020).

use fuselora_tensor::Tensor;
use fuselora_tensor::ops::swiglu;

use super::linear::{self, Linear};
use crate::error::Result;
use crate::lora::{LoraGradients, Pass};

/// The MLP of one block.
pub struct Mlp {
    /// `[intermediate, hidden]`.
    pub gate_proj: Linear,
    /// `[intermediate, hidden]`.
    pub up_proj: Linear,
    /// `[hidden, intermediate]`.
    pub down_proj: Linear,
}

/// What backward needs; the activation is computed again.
pub struct Saved {
    gate: Tensor,
    up: Tensor,
    h: [Option<Tensor>; 3],
}

impl Mlp {
    /// `x [tokens, hidden]` to `[tokens, hidden]`.
    pub fn forward(&self, x: &Tensor, pass: &Pass<'_>) -> Result<(Tensor, Saved)> {
        let [gate, up] = linear::forward(x, [&self.gate_proj, &self.up_proj], pass)?;
        let activation = swiglu::forward(&gate.y, &up.y)?;
        pass.check(&activation, || {
            format!("the activation before {}", self.down_proj.name)
        })?;
        let [down] = linear::forward(&activation, [&self.down_proj], pass)?;
        Ok((
            down.y,
            Saved {
                gate: gate.y,
                up: up.y,
                h: [gate.h, up.h, down.h],
            },
        ))
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
        let Saved {
            gate,
            up,
            h: [h_gate, h_up, h_down],
        } = saved;
        let activation = swiglu::forward(&gate, &up)?;
        let d_activation = linear::backward(
            &activation,
            [&self.down_proj],
            [dy],
            [h_down.as_ref()],
            pass,
            gradients,
            true,
        )?;
        drop(activation);
        let Some(d_activation) = d_activation else {
            return Ok(None);
        };
        let (d_gate, d_up) = swiglu::backward(&d_activation, gate, up)?;
        drop(d_activation);
        let linears = [&self.gate_proj, &self.up_proj];
        linear::backward(
            x,
            linears,
            [&d_gate, &d_up],
            [h_gate.as_ref(), h_up.as_ref()],
            pass,
            gradients,
            need_dx,
        )
    }
}
