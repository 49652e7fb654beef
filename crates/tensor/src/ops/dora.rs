//! Weight-decomposed low-rank adaptation (Liu et al., "DoRA", 2024): direction and magnitude of each output
//! feature apart, `y = (magnitude / norm) ∘ (x·(W + scaling·B·A)ᵀ)`, with `norm` the row norms of
//! `W + scaling·B·A`. As in the paper's section 4.3, and in PEFT, the norm is a constant to the gradient.

use crate::{
    DType, Error, Result, Tensor, Weight,
    matrix::{Matrix, MatrixMut, Term, Write, multiply},
    ops::lora_linear::Lora,
    parallel, simd,
};
use rayon::prelude::*;

/// Rows of the adapted weight that exist at once in one task.
const ROW_BLOCK: usize = 32;

/// The row norms of `W + scaling·B·A`, `[out]` F32. The adapted weight is never stored.
///
/// # Errors
/// On shapes and data types that do not fit.
pub fn weight_norm(weight: &Weight, a: &Tensor, b: &Tensor, scaling: f32) -> Result<Tensor> {
    let (out_features, in_features) = weight.matrix("weight")?;
    let lora = Lora {
        a,
        b,
        scaling,
        dropout: None,
    };
    lora.check(|name| format!("dora: {name}"), weight, in_features)?;
    let rank = a.shape()[0];
    let a = Matrix::new(a.as_f32()?, rank, in_features);
    let b = Matrix::new(b.as_f32()?, out_features, rank);
    let device = lora.a.device();
    let mut norm = Tensor::empty(device, [out_features], DType::F32)?;
    let blocks = norm.as_f32_mut()?.par_chunks_mut(ROW_BLOCK).enumerate();
    blocks.try_for_each(|(block, norms)| -> Result<()> {
        let first = block * ROW_BLOCK;
        let rows = first..first + norms.len();
        let mut scratch = device.scratch(rows.len() * in_features)?;
        let adapted = scratch.f32_mut();
        weight.decode(rows.start * in_features..rows.end * in_features, adapted);
        let update = Term {
            lhs: b.row_block(rows.clone()),
            rhs: a,
            scale: scaling,
        };
        let mut target = MatrixMut::new(adapted, rows.len(), in_features);
        multiply(&mut target, Write::Add, &[update], device)?;
        simd::vectorize(
            #[inline(always)]
            || {
                for (norm, row) in norms.iter_mut().zip(adapted.chunks_exact(in_features)) {
                    *norm = simd::dot(row, row).sqrt();
                }
            },
        );
        Ok(())
    })?;
    Ok(norm)
}

/// `magnitude / norm`, `[out]` F32: what each output feature is scaled by.
///
/// # Errors
/// A norm of zero, and on shapes and data types that do not fit.
pub fn gain(magnitude: &Tensor, norm: &Tensor) -> Result<Tensor> {
    let features = norm.vector("norm", "[out_features]")?;
    magnitude.check_shape("magnitude", &[features])?;
    let mut gain = Tensor::empty(norm.device(), [features], DType::F32)?;
    let values = magnitude.f32("magnitude")?.iter().zip(norm.f32("norm")?);
    for ((gain, (&magnitude, &norm)), feature) in gain.as_f32_mut()?.iter_mut().zip(values).zip(0..)
    {
        if norm == 0.0 {
            return Err(Error::Argument(format!(
                "norm: row {feature} of the adapted weight is zero, so that it has no direction"
            )));
        }
        *gain = magnitude / norm;
    }
    Ok(gain)
}

/// `y[t, o] = gain[o] · z[t, o] + bias[o]`, with `z [tokens, out]`, F32.
///
/// # Errors
/// On shapes and data types that do not fit.
pub fn forward(z: &Tensor, gain: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let (tokens, features) = z.matrix("z", "[tokens, out_features]")?;
    gain.check_shape("gain", &[features])?;
    if let Some(bias) = bias {
        bias.check_shape("bias", &[features])?;
    }
    let mut y = Tensor::empty(z.device(), [tokens, features], DType::F32)?;
    let (z, gain) = (z.f32("z")?, gain.f32("gain")?);
    let bias = bias.map(|bias| bias.f32("bias")).transpose()?;
    if features == 0 {
        return Ok(y);
    }
    let chunk = features * parallel::rows_per_task(features);
    let chunks = y
        .as_f32_mut()?
        .par_chunks_mut(chunk)
        .zip(z.par_chunks(chunk));
    parallel::for_each(chunks, |(y, z)| {
        simd::vectorize(
            #[inline(always)]
            || {
                for (y, z) in y.chunks_exact_mut(features).zip(z.chunks_exact(features)) {
                    for ((y, &z), &gain) in y.iter_mut().zip(z).zip(gain) {
                        *y = gain * z;
                    }
                    if let Some(bias) = bias {
                        simd::axpy(1.0, bias, y);
                    }
                }
            },
        );
    });
    Ok(y)
}

/// `weight[o, i] *= gain[o]`, with `weight [out, in]` F32: what [`forward`] does, to a merged weight.
///
/// # Errors
/// On shapes and data types that do not fit.
pub fn scale_rows(weight: &mut Tensor, gain: &Tensor) -> Result<()> {
    let (out_features, in_features) = weight.matrix("weight", "[out_features, in_features]")?;
    gain.check_shape("gain", &[out_features])?;
    let gain = gain.f32("gain")?;
    let rows = weight.f32_mut("weight")?.par_chunks_mut(in_features.max(1));
    rows.zip(gain).for_each(|(row, gain)| {
        row.iter_mut().for_each(|value| *value *= gain);
    });
    Ok(())
}

/// The backward pass of [`forward`]: returns `dz = gain ∘ dy`, and adds to the magnitude's gradient
/// `dmagnitude[o] += Σ_t dy[t, o]·z[t, o] / norm[o]`.
///
/// # Errors
/// On shapes and data types that do not fit.
pub fn backward(
    dy: &Tensor,
    z: &Tensor,
    gain: &Tensor,
    norm: &Tensor,
    dmagnitude: Option<&mut Tensor>,
) -> Result<Tensor> {
    let (tokens, features) = dy.matrix("dy", "[tokens, out_features]")?;
    z.check_shape("z", dy.shape())?;
    norm.check_shape("norm", &[features])?;
    let dz = forward(dy, gain, None)?;
    let Some(dmagnitude) = dmagnitude else {
        return Ok(dz);
    };
    dmagnitude.check_shape("gradient of the magnitude", &[features])?;
    let (dy, z, norm) = (dy.f32("dy")?, z.f32("z")?, norm.f32("norm")?);
    let dmagnitude = dmagnitude.f32_mut("gradient of the magnitude")?;
    // A task owns its columns, so that sums run in one order whatever the number of threads.
    let width = features.div_ceil(rayon::current_num_threads()).max(16);
    let blocks = dmagnitude.par_chunks_mut(width).zip(norm.par_chunks(width));
    blocks.enumerate().for_each(|(block, (dmagnitude, norm))| {
        let columns = block * width..block * width + dmagnitude.len();
        let mut sums = vec![0.0f32; columns.len()];
        simd::vectorize(
            #[inline(always)]
            || {
                for token in 0..tokens {
                    let row = token * features;
                    let dy = &dy[row + columns.start..row + columns.end];
                    let z = &z[row + columns.start..row + columns.end];
                    for ((sum, &dy), &z) in sums.iter_mut().zip(dy).zip(z) {
                        *sum += dy * z;
                    }
                }
                for ((dmagnitude, &sum), &norm) in dmagnitude.iter_mut().zip(&sums).zip(norm) {
                    *dmagnitude += sum / norm;
                }
            },
        );
    });
    Ok(dz)
}
