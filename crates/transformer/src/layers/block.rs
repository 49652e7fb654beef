//! A pre-norm decoder block: `r += attention(norm(r)); r += mlp(norm(r))`.
//!
//! The residual stream travels as a sum and the delta that is still to be added, so that each add
//! happens inside the norm that follows it.

use std::sync::Arc;

use fuselora_tensor::Tensor;

use super::attention::{self, Attention, KvCache, Place};
use super::linear::Linear;
use super::mlp::{self, Mlp};
use super::norm::{Norm, Statistics};
use crate::error::Result;
use crate::lora::{LoraGradients, Pass};

/// One decoder block.
pub struct Block {
    /// Before attention.
    pub input_norm: Norm,
    /// Self-attention.
    pub attention: Attention,
    /// Before the MLP.
    pub post_attention_norm: Norm,
    /// The MLP.
    pub mlp: Mlp,
}

/// The residual stream between two blocks: `sum + delta`, each `[tokens, hidden]`.
pub struct Residual {
    /// What has been added up; shared with what the block keeps for backward.
    pub sum: Arc<Tensor>,
    /// The last block's output, still to be added.
    pub delta: Option<Tensor>,
}

/// What a block's backward starts from.
pub enum Saved {
    /// Everything that backward needs.
    Activations(Box<Activations>),
    /// The block's input alone (activation checkpointing): backward calls forward again.
    Input(Arc<Tensor>),
}

/// The activations that a block keeps: its two residual sums, and what its parts keep.
pub struct Activations {
    input: Arc<Tensor>,
    input_statistics: Statistics,
    attention: attention::Saved,
    middle: Arc<Tensor>,
    middle_statistics: Statistics,
    mlp: mlp::Saved,
}

impl Block {
    /// Every projection.
    pub fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.attention.linears().chain(self.mlp.linears())
    }

    /// Every norm.
    pub fn norms(&self) -> impl Iterator<Item = &Norm> {
        let heads = self.attention.qk_norm.iter().flatten();
        [&self.input_norm, &self.post_attention_norm]
            .into_iter()
            .chain(heads)
    }

    /// Whether anything of the block is trained.
    pub fn is_trained(&self, pass: &Pass<'_>) -> bool {
        let linears = self.linears().map(|linear| linear.index);
        let mut indices = linears.chain(self.norms().map(|norm| norm.index));
        indices.any(|index| pass.trains(index))
    }

    /// One block further; with `checkpoint` only the block's input is kept.
    pub fn forward(
        &self,
        residual: Residual,
        place: &Place<'_>,
        pass: &Pass<'_>,
        checkpoint: bool,
    ) -> Result<(Residual, Saved)> {
        let (input, normed, input_statistics) = self.enter(residual, pass)?;
        let (residual, activations) = self.body(input, normed, input_statistics, place, pass)?;
        let saved = if checkpoint {
            Saved::Input(activations.input)
        } else {
            Saved::Activations(Box::new(activations))
        };
        Ok((residual, saved))
    }

    /// One block further in generation: nothing is kept but keys and values.
    pub fn forward_cached(
        &self,
        residual: Residual,
        place: &Place<'_>,
        pass: &Pass<'_>,
        caches: &mut [KvCache],
    ) -> Result<Residual> {
        let (input, normed, _) = self.enter(residual, pass)?;
        let attended = self
            .attention
            .forward_cached(&normed, place, pass, caches)?;
        let (sum, normed, _) = self
            .post_attention_norm
            .forward_add(&input, &attended, pass)?;
        let (delta, _) = self.mlp.forward(&normed, pass)?;
        Ok(Residual {
            sum: Arc::new(sum),
            delta: Some(delta),
        })
    }

    fn enter(
        &self,
        residual: Residual,
        pass: &Pass<'_>,
    ) -> Result<(Arc<Tensor>, Tensor, Statistics)> {
        match &residual.delta {
            Some(delta) => {
                let (sum, normed, statistics) =
                    self.input_norm.forward_add(&residual.sum, delta, pass)?;
                Ok((Arc::new(sum), normed, statistics))
            }
            None => {
                let (normed, statistics) = self.input_norm.forward(&residual.sum, pass)?;
                Ok((residual.sum, normed, statistics))
            }
        }
    }

    fn body(
        &self,
        input: Arc<Tensor>,
        normed: Tensor,
        input_statistics: Statistics,
        place: &Place<'_>,
        pass: &Pass<'_>,
    ) -> Result<(Residual, Activations)> {
        let (attended, attention) = self.attention.forward(&normed, place, pass)?;
        drop(normed);
        let (middle, normed, middle_statistics) = self
            .post_attention_norm
            .forward_add(&input, &attended, pass)?;
        drop(attended);
        let (delta, mlp) = self.mlp.forward(&normed, pass)?;
        let middle = Arc::new(middle);
        let sum = middle.clone();
        let activations = Activations {
            input,
            input_statistics,
            attention,
            middle,
            middle_statistics,
            mlp,
        };
        Ok((
            Residual {
                sum,
                delta: Some(delta),
            },
            activations,
        ))
    }

    /// Turns the gradient of the block's output into that of its input, in place.
    ///
    /// With `need_dx` false (nothing below is trained) the work for the input's gradient is left out.
    pub fn backward(
        &self,
        d_residual: &mut Tensor,
        saved: Saved,
        place: &Place<'_>,
        pass: &Pass<'_>,
        gradients: &mut LoraGradients,
        need_dx: bool,
    ) -> Result<()> {
        let activations = match saved {
            Saved::Activations(activations) => *activations,
            Saved::Input(input) => {
                let (normed, statistics) = self.input_norm.forward(&input, pass)?;
                self.body(input, normed, statistics, place, pass)?.1
            }
        };
        let Activations {
            input,
            input_statistics,
            attention,
            middle,
            middle_statistics,
            mlp,
        } = activations;

        let normed = self
            .post_attention_norm
            .recompute(&middle, &middle_statistics, pass)?;
        if let Some(d_normed) = self
            .mlp
            .backward(d_residual, &normed, mlp, pass, gradients, true)?
        {
            self.post_attention_norm.backward(
                &d_normed,
                &middle,
                &middle_statistics,
                d_residual,
                pass,
                gradients,
            )?;
        }
        drop((normed, middle));

        let normed = self.input_norm.recompute(&input, &input_statistics, pass)?;
        let need_dx = need_dx || pass.trains(self.input_norm.index);
        let d_normed = self.attention.backward(
            d_residual, &normed, &attention, place, pass, gradients, need_dx,
        )?;
        if let Some(d_normed) = d_normed {
            self.input_norm.backward(
                &d_normed,
                &input,
                &input_statistics,
                d_residual,
                pass,
                gradients,
            )?;
        }
        Ok(())
    }
}
