//! A batch on the device: rows concatenated without padding, and where their targets are.

use fuselora_tensor::ops::attention::Rows;
use fuselora_tensor::{Device, Tensor};

use crate::error::{Error, Result};

/// Target rows per pass of the head: bounds the logits that exist at once. The gradient of the head's input is a
/// product with as many rows, the hidden size as columns and the vocabulary as depth: on a GPU it takes more rows
/// to give every multiprocessor a tile.
pub(crate) const fn targets_per_chunk(on_cpu: bool) -> usize {
    if on_cpu { 256 } else { 2048 }
}

/// Rows of tokens, concatenated.
pub struct Batch {
    tokens: Tensor,
    positions: Tensor,
    /// Tokens and positions again, so that nobody has to wait for a device to hear of them.
    on_host: [Vec<u32>; 2],
    rows: Rows,
    targets: Vec<TargetChunk>,
    target_count: usize,
}

/// What the kernels of a pass over a batch depend on besides what is in the batch: passes over batches of one shape
/// differ in nothing else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchShape {
    /// Tokens of all rows.
    pub tokens: usize,
    /// Rows.
    pub rows: usize,
    /// Tokens of the longest row.
    pub longest: usize,
    /// Targets.
    pub targets: usize,
}

impl BatchShape {
    /// That of rows of these lengths with so many targets.
    pub fn of(lengths: &[usize], targets: usize) -> BatchShape {
        BatchShape {
            tokens: lengths.iter().sum(),
            rows: lengths.len(),
            longest: lengths.iter().copied().max().unwrap_or(0),
            targets,
        }
    }
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
        check_targets(target_rows, targets)?;
        let positions = positions(lengths);
        let vector = |values: &[u32]| Tensor::from_u32(device, [values.len()], values);
        let per_chunk = targets_per_chunk(device.is_cpu());
        let chunks = target_rows.chunks(per_chunk).zip(targets.chunks(per_chunk));
        Ok(Batch {
            tokens: vector(tokens)?,
            positions: vector(&positions)?,
            on_host: [tokens.to_vec(), positions],
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

    /// Another batch of the same [`BatchShape`] in the same memory, as [`Batch::new`] takes it.
    ///
    /// # Errors
    /// When its shape is another.
    pub fn refill(
        &mut self,
        tokens: &[u32],
        lengths: &[usize],
        target_rows: &[u32],
        targets: &[u32],
    ) -> Result<()> {
        check_targets(target_rows, targets)?;
        if targets.len() != self.target_count {
            return Err(Error::Input(format!(
                "a batch with {} targets cannot replace one with {}",
                targets.len(),
                self.target_count
            )));
        }
        self.rows.refill(lengths)?;
        self.tokens.set_u32(tokens)?;
        let positions = positions(lengths);
        self.positions.set_u32(&positions)?;
        self.on_host = [tokens.to_vec(), positions];
        let per_chunk = targets_per_chunk(self.tokens.device().is_cpu());
        let chunks = target_rows.chunks(per_chunk).zip(targets.chunks(per_chunk));
        for (chunk, (rows, targets)) in self.targets.iter_mut().zip(chunks) {
            chunk.rows.set_u32(rows)?;
            chunk.targets.set_u32(targets)?;
        }
        Ok(())
    }

    /// `[tokens]` U32.
    pub fn tokens(&self) -> &Tensor {
        &self.tokens
    }

    /// Position of each token in its row, `[tokens]` U32.
    pub fn positions(&self) -> &Tensor {
        &self.positions
    }

    /// What [`Batch::tokens`] and [`Batch::positions`] hold.
    pub(crate) fn on_host(&self) -> [&[u32]; 2] {
        self.on_host.each_ref().map(Vec::as_slice)
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

fn check_targets(target_rows: &[u32], targets: &[u32]) -> Result<()> {
    if target_rows.len() != targets.len() {
        return Err(Error::Input(format!(
            "{} target rows for {} targets",
            target_rows.len(),
            targets.len()
        )));
    }
    Ok(())
}

/// The position of each token in its row.
fn positions(lengths: &[usize]) -> Vec<u32> {
    lengths.iter().flat_map(|&len| 0..len as u32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(result: Result<impl Sized>) -> String {
        result.err().expect("it is refused").to_string()
    }

    #[test]
    fn a_batch_takes_another_of_its_shape_and_no_other() {
        let cpu = Device::cpu();
        let mut batch = Batch::new(&cpu, &[1, 2, 3, 4, 5], &[2, 3], &[1, 4], &[7, 8]).unwrap();
        let shape = BatchShape::of(&[3, 2], 2);
        assert_eq!(shape, BatchShape::of(&[2, 3], 2));
        batch
            .refill(&[5, 4, 3, 2, 1], &[3, 2], &[0, 3], &[8, 9])
            .unwrap();
        assert_eq!(batch.tokens().as_u32().unwrap(), [5, 4, 3, 2, 1]);
        assert_eq!(batch.positions().as_u32().unwrap(), [0, 1, 2, 0, 1]);
        assert_eq!(batch.on_host(), [[5, 4, 3, 2, 1], [0, 1, 2, 0, 1]]);
        assert_eq!(batch.rows().cu_seqlens().as_u32().unwrap(), [0, 3, 5]);
        assert_eq!(batch.targets()[0].rows.as_u32().unwrap(), [0, 3]);
        assert_eq!(batch.targets()[0].targets.as_u32().unwrap(), [8, 9]);
        let message = refusal(batch.refill(&[1; 5], &[1, 4], &[0, 3], &[8, 9]));
        assert!(
            message.contains("the longest of 4") && message.contains("the longest of 3"),
            "{message}"
        );
        let message = refusal(batch.refill(&[1; 5], &[2, 3], &[0], &[8]));
        assert!(
            message.contains("1 targets cannot replace one with 2"),
            "{message}"
        );
    }

    #[test]
    fn no_tokens_are_no_batch() {
        let message = refusal(Batch::new(&Device::cpu(), &[], &[], &[], &[]));
        assert_eq!(message, "0 tokens do not make rows of lengths []");
        let message = refusal(Batch::new(&Device::cpu(), &[1], &[1, 0], &[], &[]));
        assert_eq!(message, "1 tokens do not make rows of lengths [1, 0]");
    }
}
