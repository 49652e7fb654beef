//! Weight-decomposed low-rank adaptation (Liu et al., "DoRA", 2024): direction and magnitude of each output
//! feature apart, `y = (magnitude / norm) ∘ (x·(W + scaling·B·A)ᵀ)`, with `norm` the row norms of
//! `W + scaling·B·A`. As in the paper's section 4.3, and in PEFT, the norm is a constant to the gradient.

use crate::{
    DType, Error, Result, Tensor, Weight, check,
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
    #[cfg(feature = "cuda")]
    if !a.device().is_cpu() {
        return on_cuda::weight_norm(weight, &lora);
    }
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
/// A norm of zero, which a CUDA device makes an infinity of instead, and on shapes and data types that do not fit.
pub fn gain(magnitude: &Tensor, norm: &Tensor) -> Result<Tensor> {
    let features = norm.vector("norm", "[out_features]")?;
    magnitude.check_shape("magnitude", &[features])?;
    magnitude.check_device("magnitude", norm.device())?;
    #[cfg(feature = "cuda")]
    if !norm.device().is_cpu() {
        return on_cuda::gain(magnitude, norm);
    }
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

/// `y[t, o] = gain[o] · z[t, o] + bias[o]`, with `z [tokens, out]` of a float type (F32 on the CPU), the others F32.
///
/// # Errors
/// On shapes and data types that do not fit.
pub fn forward(z: &Tensor, gain: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let (tokens, features) = z.matrix("z", "[tokens, out_features]")?;
    gain.check_shape("gain", &[features])?;
    gain.check_device("gain", z.device())?;
    if let Some(bias) = bias {
        bias.check_shape("bias", &[features])?;
        bias.check_device("bias", z.device())?;
    }
    #[cfg(feature = "cuda")]
    if !z.device().is_cpu() {
        return on_cuda::forward(z, gain, bias);
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
    gain.check_device("gain", weight.device())?;
    #[cfg(feature = "cuda")]
    if !gain.device().is_cpu() {
        return on_cuda::scale_rows(weight, gain);
    }
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
    check::devices(dy.device(), [("z", z), ("norm", norm), ("gain", gain)])?;
    let Some(dmagnitude) = dmagnitude else {
        return forward(dy, gain, None);
    };
    let name = "gradient of the magnitude";
    dmagnitude.check_shape(name, &[features])?;
    dmagnitude.check_device(name, dy.device())?;
    #[cfg(feature = "cuda")]
    if !dy.device().is_cpu() {
        return on_cuda::backward(dy, z, gain, norm, dmagnitude);
    }
    let dz = forward(dy, gain, None)?;
    let (dy, z, norm) = (dy.f32("dy")?, z.f32("z")?, norm.f32("norm")?);
    let dmagnitude = dmagnitude.f32_mut(name)?;
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

#[cfg(feature = "cuda")]
mod on_cuda {
    use super::{DType, Lora, Result, Tensor, Weight};
    use crate::{Purpose, cuda::extents};
    use fuselora_kernels::abi::{ColumnSumShape, DoraWeight};
    use fuselora_kernels::{Operand, dora};

    /// Bytes of a weight in NF4 that are dequantized at a time, to F32: no bit of it is lost.
    const DEQUANTIZED_BYTES: usize = 64 << 20;
    /// Rows that begin at a multiple of what a dequantization may begin at, however long they are.
    const ROW_GROUP: usize = 8;

    pub fn weight_norm(weight: &Weight, lora: &Lora) -> Result<Tensor> {
        let (out_features, in_features) = weight.matrix("weight")?;
        let device = lora.a.device();
        let mut norm = Tensor::empty(device, [out_features], DType::F32)?;
        let mut of_rows = |first: usize, rows: usize, values: Operand| {
            let [first_row, rows, in_features, rank] =
                extents("weight", [first, rows, in_features, lora.rank()])?;
            let shape = DoraWeight {
                first_row,
                rows,
                in_features,
                rank,
                scaling: lora.scaling,
            };
            let (a, b) = (lora.a.operand(), lora.b.operand());
            device.launch(|kernels| {
                dora::weight_norm(kernels, shape, values, a, b, norm.operand_mut())
            })
        };
        match weight {
            Weight::Dense(weight) => of_rows(0, out_features, weight.operand())?,
            Weight::Nf4(weight) => {
                let row_bytes = in_features.max(1) * DType::F32.size_in_bytes();
                let step = (DEQUANTIZED_BYTES / row_bytes / ROW_GROUP * ROW_GROUP).max(ROW_GROUP);
                for first in (0..out_features).step_by(step) {
                    let rows = step.min(out_features - first);
                    let _holding = device.hold(Purpose::Workspace);
                    let values = weight.dequantize_rows(first..first + rows)?;
                    of_rows(first, rows, values.operand())?;
                }
            }
        }
        Ok(norm)
    }

    pub fn gain(magnitude: &Tensor, norm: &Tensor) -> Result<Tensor> {
        let mut gain = Tensor::empty(norm.device(), norm.shape(), DType::F32)?;
        norm.device().launch(|kernels| {
            let (magnitude, norm) = (magnitude.operand(), norm.operand());
            dora::gain(kernels, magnitude, norm, gain.operand_mut())
        })?;
        Ok(gain)
    }

    pub fn scale_rows(weight: &mut Tensor, gain: &Tensor) -> Result<()> {
        let (_, in_features) = weight.matrix("weight", "[out_features, in_features]")?;
        let [in_features] = extents("weight", [in_features])?;
        gain.device().launch(|kernels| {
            dora::scale_rows(kernels, in_features, weight.operand_mut(), gain.operand())
        })
    }

    fn shape(activations: &Tensor) -> Result<ColumnSumShape> {
        let (tokens, features) = activations.matrix("z", "[tokens, out_features]")?;
        let [tokens, features] = extents("z", [tokens, features])?;
        Ok(ColumnSumShape { tokens, features })
    }

    pub fn forward(z: &Tensor, gain: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let shape = shape(z)?;
        let mut y = Tensor::empty(z.device(), z.shape(), z.dtype())?;
        z.device().launch(|kernels| {
            let (z, gain) = (z.operand(), gain.operand());
            let bias = bias.map(Tensor::operand);
            dora::forward(kernels, shape, z, gain, bias, y.operand_mut())
        })?;
        Ok(y)
    }

    pub fn backward(
        dy: &Tensor,
        z: &Tensor,
        gain: &Tensor,
        norm: &Tensor,
        dmagnitude: &mut Tensor,
    ) -> Result<Tensor> {
        let shape = shape(dy)?;
        let mut dz = Tensor::empty(dy.device(), dy.shape(), dy.dtype())?;
        dy.device().launch(|kernels| {
            dora::backward(
                kernels,
                shape,
                dy.operand(),
                z.operand(),
                gain.operand(),
                norm.operand(),
                dz.operand_mut(),
                dmagnitude.operand_mut(),
            )
        })?;
        Ok(dz)
    }
}
