//! The loss: `-log softmax(logits)[target]`, summed over rows. Only target tokens have rows.

use crate::{Result, Tensor, check, simd};
use rayon::prelude::*;

/// Elements whose exponentials are summed in f32 before the sum goes on in f64.
const BLOCK: usize = 4096;

/// The summed loss of `logits [n, vocab]` F32 for `targets [n]` U32.
///
/// # Errors
/// When a target is not below `vocab`, and on shapes and data types that do not fit.
pub fn forward(logits: &Tensor, targets: &Tensor) -> Result<f64> {
    let (targets, vocab) = checked(logits, targets)?;
    let losses: Vec<f64> = logits
        .f32("logits")?
        .par_chunks(vocab)
        .zip(targets)
        .map(|(row, &target)| {
            simd::vectorize(
                #[inline(always)]
                || {
                    let max = simd::max(row);
                    let mut sum = 0.0;
                    for block in row.chunks(BLOCK) {
                        sum += f64::from(simd::sum_exp_shifted(block, max));
                    }
                    f64::from(max) + sum.ln() - f64::from(row[target as usize])
                },
            )
        })
        .collect();
    Ok(losses.iter().sum())
}

/// The summed loss, while `logits [n, vocab]` is overwritten by its gradient
/// `(softmax(logits) - onehot(target)) · grad_scale`.
///
/// # Errors
/// As [`forward`].
pub fn forward_backward(logits: &mut Tensor, targets: &Tensor, grad_scale: f32) -> Result<f64> {
    let (targets, vocab) = checked(logits, targets)?;
    let losses: Vec<f64> = logits
        .f32_mut("logits")?
        .par_chunks_mut(vocab)
        .zip(targets)
        .map(|(row, &target)| {
            simd::vectorize(
                #[inline(always)]
                || {
                    let max = simd::max(row);
                    let at_target = f64::from(row[target as usize]);
                    let mut sum = 0.0;
                    for block in row.chunks_mut(BLOCK) {
                        sum += f64::from(simd::exp_shifted(block, max));
                    }
                    let factor = (f64::from(grad_scale) / sum) as f32;
                    for x in row.iter_mut() {
                        *x *= factor;
                    }
                    row[target as usize] -= grad_scale;
                    f64::from(max) + sum.ln() - at_target
                },
            )
        })
        .collect();
    Ok(losses.iter().sum())
}

fn checked<'a>(logits: &Tensor, targets: &'a Tensor) -> Result<(&'a [u32], usize)> {
    let (n, vocab) = logits.matrix("logits", "[n, vocab]")?;
    targets.check_shape("targets", &[n])?;
    let targets = targets.u32("targets")?;
    check::indices("targets", targets, vocab)?;
    // Without rows the vocabulary may be empty, and a chunk may not.
    Ok((targets, vocab.max(1)))
}
