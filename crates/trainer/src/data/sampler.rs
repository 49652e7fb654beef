//! The order in which rows are drawn.

use rand_chacha::{
    ChaCha8Rng,
    rand_core::{Rng, SeedableRng},
};
use serde::{Deserialize, Serialize};

/// Where a run stands in its data: saved with a checkpoint, it continues the order exactly.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// Passes over the data already finished.
    pub epoch: u64,
    /// Rows of the current pass already drawn.
    pub row: usize,
}

/// Draws the rows of one optimizer step after another.
///
/// Every epoch visits each row once, in file order or in a fresh permutation that depends on the seed and
/// the epoch alone. Batches and steps do not reach across the end of an epoch: its last batch, and its last
/// step, may be smaller (as in the Transformers trainer).
#[derive(Clone, Debug)]
pub struct Sampler {
    rows: usize,
    batch_size: usize,
    gradient_accumulation_steps: usize,
    shuffle_seed: Option<u64>,
    position: Position,
    order: Vec<usize>,
}

impl Sampler {
    /// A sampler over `rows` rows that stands at `position` (the default is the start); without a seed it
    /// keeps file order. The three counts are at least 1.
    pub fn new(
        rows: usize,
        batch_size: usize,
        gradient_accumulation_steps: usize,
        shuffle_seed: Option<u64>,
        position: Position,
    ) -> Sampler {
        let mut sampler = Sampler {
            rows,
            batch_size: batch_size.max(1),
            gradient_accumulation_steps: gradient_accumulation_steps.max(1),
            shuffle_seed,
            position,
            order: Vec::new(),
        };
        sampler.order = sampler.order_of(position.epoch);
        sampler
    }

    /// Optimizer steps in one pass over the data.
    pub fn steps_per_epoch(&self) -> u64 {
        self.rows
            .div_ceil(self.batch_size * self.gradient_accumulation_steps) as u64
    }

    /// Where the sampler stands.
    pub fn position(&self) -> Position {
        self.position
    }

    /// Passes over the data so far, with the current one as a fraction.
    pub fn epochs(&self) -> f64 {
        self.position.epoch as f64 + self.position.row as f64 / self.rows.max(1) as f64
    }

    /// The batches of the next optimizer step, each a list of row indices; starts the next epoch where one
    /// is finished. Without rows, no batches.
    pub fn next_step(&mut self) -> Vec<Vec<usize>> {
        let start = self.position.row;
        let end = self
            .rows
            .min(start + self.batch_size * self.gradient_accumulation_steps);
        let batches = self.order[start..end]
            .chunks(self.batch_size)
            .map(<[usize]>::to_vec)
            .collect();
        self.position.row = end;
        if end == self.rows {
            self.position = Position {
                epoch: self.position.epoch + 1,
                row: 0,
            };
            self.order = self.order_of(self.position.epoch);
        }
        batches
    }

    /// The permutation of an epoch: Fisher-Yates over ChaCha8 with the seed as key and the epoch as stream.
    fn order_of(&self, epoch: u64) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.rows).collect();
        if let Some(seed) = self.shuffle_seed {
            let mut random = ChaCha8Rng::seed_from_u64(seed);
            random.set_stream(epoch);
            for last in (1..order.len()).rev() {
                let span = last as u128 + 1;
                let pick = (u128::from(random.next_u64()) * span) >> 64;
                order.swap(last, pick as usize);
            }
        }
        order
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn epoch(sampler: &mut Sampler) -> Vec<Vec<Vec<usize>>> {
        (0..sampler.steps_per_epoch())
            .map(|_| sampler.next_step())
            .collect()
    }

    #[test]
    fn file_order_with_smaller_ends() {
        let mut sampler = Sampler::new(7, 2, 2, None, Position::default());
        assert_eq!(sampler.steps_per_epoch(), 2);
        assert_eq!(sampler.next_step(), [[0, 1], [2, 3]]);
        assert_eq!(sampler.next_step(), vec![vec![4, 5], vec![6]]);
        assert_eq!(sampler.position(), Position { epoch: 1, row: 0 });
        assert_eq!(sampler.next_step(), [[0, 1], [2, 3]]);
        assert_eq!(sampler.epochs(), 1.0 + 4.0 / 7.0);
    }

    #[test]
    fn epochs_and_seeds_have_orders_of_their_own() {
        let mut sampler = Sampler::new(100, 10, 1, Some(1), Position::default());
        let (first, second) = (epoch(&mut sampler), epoch(&mut sampler));
        assert_ne!(first, second);
        let mut other = Sampler::new(100, 10, 1, Some(2), Position::default());
        assert_ne!(first, epoch(&mut other));
    }

    proptest! {
        #[test]
        fn an_epoch_visits_every_row_once(rows in 1usize..60, batch in 1usize..7, accumulation in 1usize..4, seed: Option<u64>) {
            let mut sampler = Sampler::new(rows, batch, accumulation, seed, Position::default());
            for _ in 0..2 {
                let mut seen: Vec<usize> = epoch(&mut sampler).into_iter().flatten().flatten().collect();
                prop_assert_eq!(sampler.position().row, 0);
                seen.sort_unstable();
                prop_assert_eq!(seen, (0..rows).collect::<Vec<_>>());
            }
        }

        #[test]
        fn a_saved_position_continues_the_order(rows in 1usize..60, batch in 1usize..7, before in 0usize..40, seed: Option<u64>) {
            let mut sampler = Sampler::new(rows, batch, 2, seed, Position::default());
            for _ in 0..before {
                sampler.next_step();
            }
            let mut resumed = Sampler::new(rows, batch, 2, seed, sampler.position());
            for _ in 0..20 {
                prop_assert_eq!(sampler.next_step(), resumed.next_step());
            }
        }

        #[test]
        fn places_are_evenly_used(seed: u64) {
            // Row 0 lands in the first half of 40 rows in about half of 200 epochs.
            let mut sampler = Sampler::new(40, 20, 1, Some(seed), Position::default());
            let first_half = (0..200).filter(|_| {
                let steps = epoch(&mut sampler);
                steps[0].iter().flatten().any(|&row| row == 0)
            }).count();
            prop_assert!((60..140).contains(&first_half), "{first_half} of 200");
        }
    }
}
