//! The training pass.

use fuselora_tensor::Tensor;
use fuselora_tensor::ops::{cross_entropy, gather};

use super::Model;
use crate::batch::{Batch, TargetChunk};
use crate::error::Result;
use crate::layers::attention::Place;
use crate::layers::block::{Residual, Saved};
use crate::layers::linear;
use crate::lora::{LoraGradients, Pass};

/// How a training pass treats memory.
#[derive(Debug, Clone, Copy, Default)]
pub struct TrainingOptions {
    /// Keep only each block's input and compute the rest again in backward.
    pub gradient_checkpointing: bool,
}

impl Model {
    /// One training pass over a batch: adds the summed loss to `loss`, and `grad_scale`, `[1]` F32, times
    /// its gradient to `gradients`.
    ///
    /// With `grad_scale` = 1 / (target tokens of the optimizer step), the accumulated gradient is
    /// that of the mean loss over all of them, however they are split into micro-batches.
    ///
    /// # Errors
    /// As [`Model::loss`]; in a tracing pass also [`crate::Error::NonFinite`].
    pub fn forward_backward(
        &self,
        batch: &Batch,
        pass: &Pass<'_>,
        gradients: &mut LoraGradients,
        grad_scale: &Tensor,
        options: TrainingOptions,
        loss: &mut Tensor,
    ) -> Result<()> {
        let rope = self.rope(batch.rows().max_len())?;
        let place = Place {
            positions: batch.positions(),
            rows: batch.rows(),
            rope: rope.as_deref(),
        };
        let embedding_trained = self.embeddings().any(|table| pass.trains(table.index));
        let lowest = if embedding_trained {
            0
        } else {
            self.lowest_trained_block(pass)
        };
        let (mut residual, embedded) = self.embed(batch.tokens(), batch.positions(), pass)?;
        let mut saved: Vec<Saved> = Vec::with_capacity(self.blocks.len());
        for (layer, block) in self.blocks.iter().enumerate() {
            let (next, kept) = block.forward(
                residual,
                &place,
                pass,
                options.gradient_checkpointing || layer < lowest,
            )?;
            if layer >= lowest {
                saved.push(kept);
            }
            residual = next;
        }

        let mut d_residual = Tensor::zeros(&self.device, residual.sum.shape(), self.activations)?;
        for chunk in batch.targets() {
            self.head_backward(
                &residual,
                chunk,
                pass,
                gradients,
                grad_scale,
                &mut d_residual,
                loss,
            )?;
        }
        drop(residual);

        while let Some(kept) = saved.pop() {
            let layer = lowest + saved.len();
            self.blocks[layer].backward(
                &mut d_residual,
                kept,
                &place,
                pass,
                gradients,
                layer > lowest || embedding_trained,
            )?;
        }
        if embedding_trained {
            let ids = [batch.tokens(), batch.positions()];
            let ids = ids.into_iter().zip(batch.on_host());
            for ((table, (ids, on_host)), saved) in self.embeddings().zip(ids).zip(&embedded) {
                table.backward(&d_residual, ids, on_host, saved, pass, gradients)?;
            }
        }
        Ok(())
    }

    /// Norm, head and loss of one chunk of targets, and their backward into the residual's gradient.
    ///
    /// The chunk's logits become their own gradient, so that all logits never exist at once.
    #[expect(
        clippy::too_many_arguments,
        reason = "what a pass reads, and the three that it adds to"
    )]
    fn head_backward(
        &self,
        residual: &Residual,
        chunk: &TargetChunk,
        pass: &Pass<'_>,
        gradients: &mut LoraGradients,
        grad_scale: &Tensor,
        d_residual: &mut Tensor,
        loss: &mut Tensor,
    ) -> Result<()> {
        let (sum, normed, statistics) = self.final_norm(residual, Some(&chunk.rows), pass)?;
        let [mut logits] = linear::forward(&normed, [&self.head], pass)?;
        cross_entropy::forward_backward(&mut logits.y, &chunk.targets, grad_scale, loss)?;
        let d_normed = linear::backward(
            &normed,
            [&self.head],
            [&logits.y],
            [&logits.saved],
            pass,
            gradients,
            true,
        )?;
        if let Some(d_normed) = d_normed {
            let mut d_sum = Tensor::zeros(&self.device, sum.shape(), self.activations)?;
            self.norm
                .backward(&d_normed, &sum, &statistics, &mut d_sum, pass, gradients)?;
            gather::scatter_add_rows(&d_sum, &chunk.rows, d_residual)?;
        }
        Ok(())
    }

    /// The first block of which anything is trained; below it no gradient is needed, unless an embedding is trained.
    fn lowest_trained_block(&self, pass: &Pass<'_>) -> usize {
        let lowest = self.blocks.iter().position(|block| block.is_trained(pass));
        lowest.unwrap_or(self.blocks.len())
    }
}
