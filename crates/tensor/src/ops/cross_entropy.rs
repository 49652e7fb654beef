//! The loss: `-log softmax(logits)[target]`, summed over rows. Only target tokens have rows. The sum is added to a
//! tensor, so that a CUDA device goes on without waiting for anyone to read it.

use crate::{DType, Result, Tensor, check, simd};
use rayon::prelude::*;

/// Elements whose exponentials are summed in f32 before the sum goes on in f64.
const BLOCK: usize = 4096;

/// Adds the summed loss of `logits [n, vocab]`, of a float type, for `targets [n]` U32 to `loss [1]` F32.
///
/// # Errors
/// When a target is not below `vocab`, and on shapes, data types and devices that do not fit.
pub fn forward(logits: &Tensor, targets: &Tensor, loss: &mut Tensor) -> Result<()> {
    let vocab = checked(logits, targets, loss)?;
    #[cfg(feature = "cuda")]
    if !logits.device().is_cpu() {
        let [vocab] = crate::cuda::extents("logits", [vocab])?;
        let mut losses = Tensor::workspace(logits.device(), targets.shape(), DType::F32)?;
        return logits.device().launch(|kernels| {
            fuselora_kernels::loss::cross_entropy_forward(
                kernels,
                vocab,
                logits.operand(),
                targets.operand(),
                losses.operand_mut(),
                loss.operand_mut(),
            )
        });
    }
    let losses: Vec<f64> = logits
        .f32("logits")?
        .par_chunks(vocab.max(1))
        .zip(targets.u32("targets")?)
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
    loss.f32_mut("loss")?[0] += losses.iter().sum::<f64>() as f32;
    Ok(())
}

/// [`forward`], while `logits [n, vocab]` is overwritten by its gradient
/// `(softmax(logits) - onehot(target)) · grad_scale`, with `grad_scale [1]` F32.
///
/// # Errors
/// As [`forward`].
pub fn forward_backward(
    logits: &mut Tensor,
    targets: &Tensor,
    grad_scale: &Tensor,
    loss: &mut Tensor,
) -> Result<()> {
    let vocab = checked(logits, targets, loss)?;
    grad_scale.check_shape("grad_scale", &[1])?;
    grad_scale.check_dtype("grad_scale", DType::F32)?;
    grad_scale.check_device("grad_scale", targets.device())?;
    #[cfg(feature = "cuda")]
    if !targets.device().is_cpu() {
        let [vocab] = crate::cuda::extents("logits", [vocab])?;
        let mut losses = Tensor::workspace(targets.device(), targets.shape(), DType::F32)?;
        return targets.device().launch(|kernels| {
            fuselora_kernels::loss::cross_entropy_backward(
                kernels,
                vocab,
                logits.operand_mut(),
                targets.operand(),
                grad_scale.operand(),
                losses.operand_mut(),
                loss.operand_mut(),
            )
        });
    }
    let grad_scale = grad_scale.f32("grad_scale")?[0];
    let losses: Vec<f64> = logits
        .f32_mut("logits")?
        .par_chunks_mut(vocab.max(1))
        .zip(targets.u32("targets")?)
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
    loss.f32_mut("loss")?[0] += losses.iter().sum::<f64>() as f32;
    Ok(())
}

/// The vocabulary.
fn checked(logits: &Tensor, targets: &Tensor, loss: &Tensor) -> Result<usize> {
    let (n, vocab) = logits.matrix("logits", "[n, vocab]")?;
    targets.check_shape("targets", &[n])?;
    loss.check_shape("loss", &[1])?;
    loss.check_dtype("loss", DType::F32)?;
    check::devices(logits.device(), [("targets", targets), ("loss", loss)])?;
    check::indices("targets", targets, vocab)?;
    Ok(vocab)
}
