//! Root-mean-square normalisation (Zhang and Sennrich, 2019):
//! `y = x · rstd · weight`, `rstd = 1/√(mean(x²) + eps)` per token.

use crate::{DType, Result, Tensor, check, parallel, simd};
#[cfg(feature = "cuda")]
use fuselora_kernels::norm;
use rayon::prelude::*;

/// Normalises `x [tokens, width]`, of a float type, with `weight [width]` F32. Returns `y [tokens, width]` and
/// `rstd [tokens]` F32.
///
/// # Errors
/// On shapes and data types that do not fit.
pub fn forward(x: &Tensor, weight: &Tensor, eps: f32) -> Result<(Tensor, Tensor)> {
    let (tokens, width) = checked(x, weight)?;
    let mut y = Tensor::empty(x.device(), [tokens, width], x.dtype())?;
    let mut rstd = Tensor::empty(x.device(), [tokens], DType::F32)?;
    #[cfg(feature = "cuda")]
    if !x.device().is_cpu() {
        let shape = norm_shape(tokens, width, eps)?;
        x.device().launch(|kernels| {
            norm::rms_norm::forward(
                kernels,
                shape,
                x.operand(),
                weight.operand(),
                y.operand_mut(),
                rstd.operand_mut(),
            )
        })?;
        return Ok((y, rstd));
    }
    let (x, weight) = (x.f32("x")?, weight.f32("weight")?);
    let rows = parallel::rows_per_task(width);
    let chunks = (
        y.as_f32_mut()?.par_chunks_mut(rows * width),
        x.par_chunks(rows * width),
        rstd.as_f32_mut()?.par_chunks_mut(rows),
    );
    parallel::for_each(chunks.into_par_iter(), |(y, x, rstd)| {
        simd::vectorize(
            #[inline(always)]
            || {
                for ((y, x), rstd) in y
                    .chunks_exact_mut(width)
                    .zip(x.chunks_exact(width))
                    .zip(rstd)
                {
                    *rstd = inverse_rms(x, eps);
                    normalise(x, *rstd, weight, y);
                }
            },
        );
    });
    Ok((y, rstd))
}

/// [`forward`] of a residual stream that just received a layer's output: `sum = residual + delta`, normalised
/// in the same pass. Returns `(sum, y, rstd)`.
///
/// # Errors
/// On shapes and data types that do not fit.
pub fn forward_add(
    residual: &Tensor,
    delta: &Tensor,
    weight: &Tensor,
    eps: f32,
) -> Result<(Tensor, Tensor, Tensor)> {
    let (tokens, width) = checked(residual, weight)?;
    delta.check_shape("delta", residual.shape())?;
    let device = residual.device();
    delta.check_device("delta", device)?;
    let mut sum = Tensor::empty(device, [tokens, width], residual.dtype())?;
    let mut y = Tensor::empty(device, [tokens, width], residual.dtype())?;
    let mut rstd = Tensor::empty(device, [tokens], DType::F32)?;
    #[cfg(feature = "cuda")]
    if !device.is_cpu() {
        let shape = norm_shape(tokens, width, eps)?;
        device.launch(|kernels| {
            norm::rms_norm::forward_add(
                kernels,
                shape,
                residual.operand(),
                delta.operand(),
                sum.operand_mut(),
                weight.operand(),
                y.operand_mut(),
                rstd.operand_mut(),
            )
        })?;
        return Ok((sum, y, rstd));
    }
    let (residual, delta, weight) = (
        residual.f32("residual")?,
        delta.f32("delta")?,
        weight.f32("weight")?,
    );
    let rows = parallel::rows_per_task(width);
    let len = rows * width;
    let chunks = (
        sum.as_f32_mut()?.par_chunks_mut(len),
        y.as_f32_mut()?.par_chunks_mut(len),
        residual.par_chunks(len),
        delta.par_chunks(len),
        rstd.as_f32_mut()?.par_chunks_mut(rows),
    );
    parallel::for_each(chunks.into_par_iter(), |(sum, y, residual, delta, rstd)| {
        simd::vectorize(
            #[inline(always)]
            || {
                sum.iter_mut()
                    .zip(residual)
                    .zip(delta)
                    .for_each(|((sum, x), d)| *sum = x + d);
                for ((y, x), rstd) in y
                    .chunks_exact_mut(width)
                    .zip(sum.chunks_exact(width))
                    .zip(rstd)
                {
                    *rstd = inverse_rms(x, eps);
                    normalise(x, *rstd, weight, y);
                }
            },
        );
    });
    Ok((sum, y, rstd))
}

/// `y` again, from `x` and the `rstd` that [`forward`] returned, for a backward pass that did not keep it.
///
/// # Errors
/// On shapes and data types that do not fit.
pub fn recompute(x: &Tensor, rstd: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let (tokens, width) = checked(x, weight)?;
    rstd.check_shape("rstd", &[tokens])?;
    rstd.check_device("rstd", x.device())?;
    let mut y = Tensor::empty(x.device(), [tokens, width], x.dtype())?;
    #[cfg(feature = "cuda")]
    if !x.device().is_cpu() {
        let shape = norm_shape(tokens, width, 0.0)?;
        x.device().launch(|kernels| {
            norm::rms_norm::recompute(
                kernels,
                shape,
                x.operand(),
                rstd.operand(),
                weight.operand(),
                y.operand_mut(),
            )
        })?;
        return Ok(y);
    }
    let (x, rstd, weight) = (x.f32("x")?, rstd.f32("rstd")?, weight.f32("weight")?);
    let rows = parallel::rows_per_task(width);
    let len = rows * width;
    let chunks = (
        y.as_f32_mut()?.par_chunks_mut(len),
        x.par_chunks(len),
        rstd.par_chunks(rows),
    );
    parallel::for_each(chunks.into_par_iter(), |(y, x, rstd)| {
        simd::vectorize(
            #[inline(always)]
            || {
                for ((y, x), &rstd) in y
                    .chunks_exact_mut(width)
                    .zip(x.chunks_exact(width))
                    .zip(rstd)
                {
                    normalise(x, rstd, weight, y);
                }
            },
        );
    });
    Ok(y)
}

/// The backward pass, added to `dx`, which holds the residual stream's gradient:
/// `dx += rstd · (dy·weight - x · rstd² · mean(dy·weight·x))`, `dweight += Σ dy · x · rstd`.
///
/// # Errors
/// On shapes and data types that do not fit.
pub fn backward(
    dy: &Tensor,
    x: &Tensor,
    rstd: &Tensor,
    weight: &Tensor,
    dx: &mut Tensor,
    dweight: Option<&mut Tensor>,
) -> Result<()> {
    let (tokens, width) = checked(x, weight)?;
    dy.check_shape("dy", x.shape())?;
    dx.check_shape("dx", x.shape())?;
    rstd.check_shape("rstd", &[tokens])?;
    check::devices(x.device(), [("dy", dy), ("rstd", rstd), ("dx", dx)])?;
    if let Some(dweight) = &dweight {
        dweight.check_shape("dweight", &[width])?;
        dweight.check_device("dweight", x.device())?;
    }
    #[cfg(feature = "cuda")]
    if !x.device().is_cpu() {
        let shape = norm_shape(tokens, width, 0.0)?;
        return x.device().launch(|kernels| {
            let (dy, x, rstd) = (dy.operand(), x.operand(), rstd.operand());
            let weight = weight.operand();
            norm::rms_norm::backward(kernels, shape, dy, x, rstd, weight, dx.operand_mut())?;
            match dweight {
                Some(dweight) => {
                    norm::rms_norm::dweight(kernels, shape, dy, x, rstd, dweight.operand_mut())
                }
                None => Ok(()),
            }
        });
    }
    let (dy, x, rstd, weight) = (
        dy.f32("dy")?,
        x.f32("x")?,
        rstd.f32("rstd")?,
        weight.f32("weight")?,
    );
    let rows = parallel::rows_per_task(width);
    let len = rows * width;
    let chunks = (
        dx.f32_mut("dx")?.par_chunks_mut(len),
        dy.par_chunks(len),
        x.par_chunks(len),
        rstd.par_chunks(rows),
    );
    parallel::for_each(chunks.into_par_iter(), |(dx, dy, x, rstd)| {
        simd::vectorize(
            #[inline(always)]
            || {
                let rows = dx
                    .chunks_exact_mut(width)
                    .zip(dy.chunks_exact(width))
                    .zip(x.chunks_exact(width));
                for (((dx, dy), x), &rstd) in rows.zip(rstd) {
                    let projection = simd::dot3(dy, weight, x) / width as f32 * rstd * rstd * rstd;
                    for (((dx, &dy), &x), &weight) in dx.iter_mut().zip(dy).zip(x).zip(weight) {
                        *dx += rstd * dy * weight - x * projection;
                    }
                }
            },
        );
    });
    if let Some(dweight) = dweight {
        let dweight = dweight.f32_mut("dweight")?;
        simd::vectorize(
            #[inline(always)]
            || {
                for ((dy, x), &rstd) in dy.chunks_exact(width).zip(x.chunks_exact(width)).zip(rstd)
                {
                    dweight
                        .iter_mut()
                        .zip(dy)
                        .zip(x)
                        .for_each(|((dw, dy), x)| *dw += dy * x * rstd);
                }
            },
        );
    }
    Ok(())
}

fn checked(x: &Tensor, weight: &Tensor) -> Result<(usize, usize)> {
    let (tokens, width) = x.tokens("x", "[tokens, width]")?;
    weight.check_shape("weight", &[width])?;
    weight.check_device("weight", x.device())?;
    if width == 0 {
        return Err(crate::Error::Argument(
            "x: cannot normalise rows without elements".into(),
        ));
    }
    Ok((tokens, width))
}

#[cfg(feature = "cuda")]
pub(super) fn norm_shape(
    tokens: usize,
    width: usize,
    eps: f32,
) -> Result<fuselora_kernels::abi::NormShape> {
    let [tokens, width] = crate::cuda::extents("x", [tokens, width])?;
    Ok(fuselora_kernels::abi::NormShape { tokens, width, eps })
}

#[inline(always)]
fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    1.0 / (simd::sum_of_squares(x, 0.0) / x.len() as f32 + eps).sqrt()
}

#[inline(always)]
fn normalise(x: &[f32], rstd: f32, weight: &[f32], y: &mut [f32]) {
    for ((y, &x), &weight) in y.iter_mut().zip(x).zip(weight) {
        *y = x * rstd * weight;
    }
}
