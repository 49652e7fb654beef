use crate::philox::{philox4x32_10, uniform};
use crate::{Result, Tensor};

/// Dropout whose mask is a function of the position, so that the backward pass replays it.
///
/// Element `index` (row-major) of `x` is kept when `uniform(philox4x32_10(key, counter)[index % 4])` is at least
/// `probability`, with `key = seed` and `counter = [index/4 low, index/4 high, stream, step]`. Kept values are
/// multiplied by `1/(1 - probability)`.
#[derive(Debug, Clone, Copy)]
pub struct Dropout<'a> {
    /// The probability that an element becomes zero, below 1.
    pub probability: f32,
    /// The key of the run.
    pub seed: u64,
    /// Tells the projections of a model apart.
    pub stream: u32,
    /// Tells the micro-steps of a run apart, `[1]` U32 on the update's device.
    pub step: &'a Tensor,
}

impl Dropout<'_> {
    /// The mask of the step that the tensor holds, on the CPU.
    pub(super) fn mask(&self) -> Result<Mask> {
        Ok(Mask {
            probability: self.probability,
            key: [self.seed as u32, (self.seed >> 32) as u32],
            stream: self.stream,
            step: self.step.u32("dropout step")?[0],
        })
    }
}

/// Which elements are kept.
pub(super) struct Mask {
    probability: f32,
    key: [u32; 2],
    stream: u32,
    step: u32,
}

impl Mask {
    /// Replaces each `x[i]`, which is element `first + i` of its tensor, by `keep · x[i]`, where `keep` is 0 or
    /// `1/(1 - probability)`.
    pub fn apply(&self, first: u64, x: &mut [f32]) {
        let kept = 1.0 / (1.0 - self.probability);
        let mut index = first;
        let mut rest = x;
        while !rest.is_empty() {
            let group = index / 4;
            let words = philox4x32_10(
                self.key,
                [group as u32, (group >> 32) as u32, self.stream, self.step],
            );
            let lane = (index % 4) as usize;
            let (head, tail) = rest.split_at_mut(rest.len().min(4 - lane));
            for (x, &word) in head.iter_mut().zip(&words[lane..]) {
                *x *= if uniform(word) >= self.probability {
                    kept
                } else {
                    0.0
                };
            }
            index += head.len() as u64;
            rest = tail;
        }
    }
}
