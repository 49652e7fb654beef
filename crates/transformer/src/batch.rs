//! A batch on the device: rows concatenated without padding, and where their targets are.

use fuselora_tensor::ops::attention::Rows;
use fuselora_tensor::{Device, Tensor};

use crate::error::{Error, Result};

/// Target rows per pass of the head: bounds the logits that exist at once.
pub(crate) const TARGETS_PER_CHUNK: usize = 256;

/// Rows of tokens, concatenated.
pub struct Batch {
    tokens: Tensor,
    positions: Tensor,
    rows: Rows,
    targets: Vec<TargetChunk>,
    target_count: usize,
}

/// Some of a batch's targets.
pub struct TargetChunk {
    /// Which of the concatenated tokens predict them, `[targets]` U32.
    pub rows: Tensor,
    /// The tokens to predict, `[targets]` U32.
    pub targets: Tensor,
}

impl Batch {
    /// `tokens` of all rows one after the other, the rows' lengths, and for each target the index
    /// among `tokens` that predicts it and the token to predict.
    ///
    /// # Errors
    /// An empty row or batch, lengths that do not sum up, or no room on the device.
    pub fn new(
        device: &Device,
        tokens: &[u32],
        lengths: &[usize],
        target_rows: &[u32],
        targets: &[u32],
    ) -> Result<Batch> {
        if tokens.is_empty()
            || lengths.contains(&0)
            || lengths.iter().sum::<usize>() != tokens.len()
        {
            return Err(Error::Input(format!(
                "{} tokens do not make rows of lengths {lengths:?}",
                tokens.len()
            )));
        }
        if target_rows.len() != targets.len() {
            return Err(Error::Input(format!(
                "{} target rows for {} targets",
                target_rows.len(),
                targets.len()
            )));
        }
        let positions: Vec<u32> = lengths.iter().flat_map(|&len| 0..len as u32).collect();
        let vector = |values: &[u32]| Tensor::from_u32(device, [values.len()], values);
        let chunks = target_rows
            .chunks(TARGETS_PER_CHUNK)
            .zip(targets.chunks(TARGETS_PER_CHUNK));
        Ok(Batch {
            tokens: vector(tokens)?,
            positions: vector(&positions)?,
            rows: Rows::new(device, lengths)?,
            targets: chunks
                .map(|(rows, targets)| {
                    Ok(TargetChunk {
                        rows: vector(rows)?,
                        targets: vector(targets)?,
                    })
                })
                .collect::<Result<_>>()?,
            target_count: targets.len(),
        })
    }

    /// `[tokens]` U32.
    pub fn tokens(&self) -> &Tensor {
        &self.tokens
    }

    /// Position of each token in its row, `[tokens]` U32.
    pub fn positions(&self) -> &Tensor {
        &self.positions
    }

    /// Boundaries of the rows.
    pub fn rows(&self) -> &Rows {
        &self.rows
    }

    /// The targets, in chunks that bound the head's memory.
    pub fn targets(&self) -> &[TargetChunk] {
        &self.targets
    }

    /// Number of targets.
    pub fn target_count(&self) -> usize {
        self.target_count
    }
}
