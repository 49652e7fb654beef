//! Rows concatenated without padding.

use fuselora_transformer::batch::BatchShape;

use super::Row;

/// The rows of one forward and backward pass, end to end.
///
/// Attention keeps rows apart by `lengths`, positions start from 0 in every row, and the head is computed
/// for `target_rows` alone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PackedBatch {
    /// Token ids, `[tokens]`.
    pub tokens: Vec<u32>,
    /// The position of each token in its own row, `[tokens]`.
    pub positions: Vec<u32>,
    /// Tokens of each row, `[rows]`; their sum is `tokens`.
    pub lengths: Vec<usize>,
    /// Indices into `tokens` of the positions that predict a target, ascending, `[targets]`.
    pub target_rows: Vec<u32>,
    /// What those positions are to predict, `[targets]`.
    pub target_ids: Vec<u32>,
}

impl PackedBatch {
    /// Packs rows in the order given.
    pub fn pack<'a>(rows: impl IntoIterator<Item = &'a Row>) -> PackedBatch {
        let mut batch = PackedBatch::default();
        for row in rows {
            let start = batch.tokens.len();
            batch.tokens.extend_from_slice(row.tokens());
            batch.positions.extend(0..row.tokens().len() as u32);
            batch.lengths.push(row.tokens().len());
            for (position, target) in row.targets().iter().enumerate() {
                if let Some(id) = target {
                    batch.target_rows.push((start + position) as u32);
                    batch.target_ids.push(*id);
                }
            }
        }
        batch
    }

    /// What the kernels of a pass over it depend on besides its content.
    pub fn shape(&self) -> BatchShape {
        BatchShape::of(&self.lengths, self.target_count())
    }

    /// How many targets the batch has: what its summed loss is divided by, together with those of the other
    /// batches of the same optimizer step.
    pub fn target_count(&self) -> usize {
        self.target_ids.len()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn row() -> impl Strategy<Value = Row> {
        prop::collection::vec((0u32..50, prop::option::of(0u32..50)), 1..12).prop_map(|cells| {
            let (tokens, labels) = cells.into_iter().unzip();
            Row::from_labels(tokens, labels)
        })
    }

    proptest! {
        #[test]
        fn packing_keeps_every_row_and_target(rows in prop::collection::vec(row(), 0..6)) {
            let batch = PackedBatch::pack(&rows);
            prop_assert_eq!(batch.lengths.iter().sum::<usize>(), batch.tokens.len());
            let (mut start, mut targets) = (0, 0);
            for (row, &length) in rows.iter().zip(&batch.lengths) {
                let end = start + length;
                prop_assert_eq!(row.tokens(), &batch.tokens[start..end]);
                prop_assert_eq!(&batch.positions[start..end], (0..length as u32).collect::<Vec<_>>());
                for (position, target) in row.targets().iter().enumerate() {
                    if let Some(id) = target {
                        prop_assert_eq!(batch.target_rows[targets] as usize, start + position);
                        prop_assert_eq!(batch.target_ids[targets], *id);
                        targets += 1;
                    }
                }
                start = end;
            }
            prop_assert_eq!(targets, batch.target_count());
        }
    }
}
