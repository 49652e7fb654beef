//! Layer normalisation (Ba, Kiros and Hinton, 2016): `y = (x - mean) · rstd · weight + bias`,
//! `rstd = 1/√(var(x) + eps)` per token, with the biased variance.

#[cfg(feature = "cuda")]
use super::rms_norm::norm_shape;
use crate::{DType, Device, Error, Result, Tensor, check, parallel, simd};
#[cfg(feature = "cuda")]
use fuselora_kernels::norm;
use rayon::prelude::*;

/// What the backward pass needs of the forward pass.
#[derive(Debug)]
pub struct Statistics {
    /// The mean of each token, `[tokens]`.
    pub mean: Tensor,
    /// The inverse standard deviation of each token, `[tokens]`.
    pub rstd: Tensor,
}

/// Normalises `x [tokens, width]` of a float type, with `weight [width]` and `bias [width]` F32.
///
/// # Errors
/// On shapes and data types that do not fit.
pub fn forward(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    eps: f32,
) -> Result<(Tensor, Statistics)> {
    let (tokens, width) = checked(x, weight, bias)?;
    let mut mean = Tensor::empty(x.device(), [tokens], DType::F32)?;
    let mut rstd = Tensor::empty(x.device(), [tokens], DType::F32)?;
    #[cfg(feature = "cuda")]
    if !x.device().is_cpu() {
        let shape = norm_shape(tokens, width, eps)?;
        let mut y = Tensor::empty(x.device(), x.shape(), x.dtype())?;
        x.device().launch(|kernels| {
            norm::layer_norm::forward(
                kernels,
                shape,
                x.operand(),
                weight.operand(),
                bias.operand(),
                y.operand_mut(),
                mean.operand_mut(),
                rstd.operand_mut(),
            )
        })?;
        return Ok((y, Statistics { mean, rstd }));
    }
    let rows = parallel::rows_per_task(width);
    let chunks = (
        x.f32("x")?.par_chunks(rows * width),
        mean.as_f32_mut()?.par_chunks_mut(rows),
        rstd.as_f32_mut()?.par_chunks_mut(rows),
    );
    parallel::for_each(chunks.into_par_iter(), |(x, mean, rstd)| {
        simd::vectorize(
            #[inline(always)]
            || {
                for ((x, mean), rstd) in x.chunks_exact(width).zip(mean).zip(rstd) {
                    let average = simd::sum(x) / width as f32;
                    let variance = simd::sum_of_squares(x, average) / width as f32;
                    (*mean, *rstd) = (average, 1.0 / (variance + eps).sqrt());
                }
            },
        );
    });
    let statistics = Statistics { mean, rstd };
    Ok((recompute(x, &statistics, weight, bias)?, statistics))
}

/// [`forward`] of a residual stream that just received a layer's output: `sum = residual + delta`.
/// Returns `(sum, y, statistics)`.
///
/// # Errors
/// On shapes and data types that do not fit.
pub fn forward_add(
    residual: &Tensor,
    delta: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    eps: f32,
) -> Result<(Tensor, Tensor, Statistics)> {
    let mut sum = residual.try_clone()?;
    super::elementwise::add_assign(&mut sum, delta)?;
    let (y, statistics) = forward(&sum, weight, bias, eps)?;
    Ok((sum, y, statistics))
}

/// `y` again, for a backward pass that did not keep it.
///
/// # Errors
/// On shapes and data types that do not fit.
pub fn recompute(
    x: &Tensor,
    statistics: &Statistics,
    weight: &Tensor,
    bias: &Tensor,
) -> Result<Tensor> {
    let (tokens, width) = checked(x, weight, bias)?;
    statistics.check(tokens, x.device())?;
    let mut y = Tensor::empty(x.device(), [tokens, width], x.dtype())?;
    #[cfg(feature = "cuda")]
    if !x.device().is_cpu() {
        let shape = norm_shape(tokens, width, 0.0)?;
        x.device().launch(|kernels| {
            norm::layer_norm::recompute(
                kernels,
                shape,
                x.operand(),
                statistics.operands(),
                weight.operand(),
                bias.operand(),
                y.operand_mut(),
            )
        })?;
        return Ok(y);
    }
    let (mean, rstd) = statistics.values()?;
    let (weight, bias) = (weight.f32("weight")?, bias.f32("bias")?);
    let rows = parallel::rows_per_task(width);
    let chunks = (
        y.as_f32_mut()?.par_chunks_mut(rows * width),
        x.f32("x")?.par_chunks(rows * width),
        mean.par_chunks(rows),
        rstd.par_chunks(rows),
    );
    parallel::for_each(chunks.into_par_iter(), |(y, x, mean, rstd)| {
        simd::vectorize(
            #[inline(always)]
            || {
                let rows = y
                    .chunks_exact_mut(width)
                    .zip(x.chunks_exact(width))
                    .zip(mean)
                    .zip(rstd);
                for (((y, x), &mean), &rstd) in rows {
                    for (((y, &x), &weight), &bias) in y.iter_mut().zip(x).zip(weight).zip(bias) {
                        *y = (x - mean) * rstd * weight + bias;
                    }
                }
            },
        );
    });
    Ok(y)
}

/// The gradients of a trained normalisation, `[width]` each, added to.
pub struct Gradients<'a> {
    /// `dweight += Σ dy · x̂`.
    pub weight: &'a mut Tensor,
    /// `dbias += Σ dy`.
    pub bias: &'a mut Tensor,
}

/// The backward pass, added to `dx`: with `x̂ = (x - mean)·rstd` and `g = dy·weight`,
/// `dx += rstd · (g - mean(g) - x̂ · mean(g·x̂))`.
///
/// # Errors
/// On shapes and data types that do not fit.
pub fn backward(
    dy: &Tensor,
    x: &Tensor,
    statistics: &Statistics,
    weight: &Tensor,
    dx: &mut Tensor,
    gradients: Option<Gradients>,
) -> Result<()> {
    let (tokens, width) = checked(x, weight, weight)?;
    dy.check_shape("dy", x.shape())?;
    dx.check_shape("dx", x.shape())?;
    statistics.check(tokens, x.device())?;
    check::devices(x.device(), [("dy", dy), ("dx", dx)])?;
    if let Some(gradients) = &gradients {
        let both = [
            ("weight gradient", &*gradients.weight),
            ("bias gradient", &*gradients.bias),
        ];
        for (name, gradient) in both {
            gradient.check_shape(name, &[width])?;
        }
        check::devices(x.device(), both)?;
    }
    #[cfg(feature = "cuda")]
    if !x.device().is_cpu() {
        let shape = norm_shape(tokens, width, 0.0)?;
        return x.device().launch(|kernels| {
            let (dy, x, weight) = (dy.operand(), x.operand(), weight.operand());
            let saved = statistics.operands();
            norm::layer_norm::backward(kernels, shape, dy, x, saved, weight, dx.operand_mut())?;
            match gradients {
                Some(Gradients { weight, bias }) => norm::layer_norm::gradients(
                    kernels,
                    shape,
                    dy,
                    x,
                    saved,
                    weight.operand_mut(),
                    bias.operand_mut(),
                ),
                None => Ok(()),
            }
        });
    }
    let (mean, rstd) = statistics.values()?;
    let (dy, x, weight) = (dy.f32("dy")?, x.f32("x")?, weight.f32("weight")?);
    let rows = parallel::rows_per_task(width);
    let chunks = (
        dx.f32_mut("dx")?.par_chunks_mut(rows * width),
        dy.par_chunks(rows * width),
        x.par_chunks(rows * width),
        mean.par_chunks(rows),
        rstd.par_chunks(rows),
    );
    parallel::for_each(chunks.into_par_iter(), |(dx, dy, x, mean, rstd)| {
        simd::vectorize(
            #[inline(always)]
            || {
                let rows = dx
                    .chunks_exact_mut(width)
                    .zip(dy.chunks_exact(width))
                    .zip(x.chunks_exact(width));
                for ((((dx, dy), x), &mean), &rstd) in rows.zip(mean).zip(rstd) {
                    let sum_g = simd::dot(dy, weight);
                    let mean_g = sum_g / width as f32;
                    let mean_gx = (simd::dot3(dy, weight, x) - mean * sum_g) * rstd / width as f32;
                    for (((dx, &dy), &x), &weight) in dx.iter_mut().zip(dy).zip(x).zip(weight) {
                        *dx += rstd * (dy * weight - mean_g - (x - mean) * rstd * mean_gx);
                    }
                }
            },
        );
    });
    if let Some(gradients) = gradients {
        let dweight = gradients.weight.f32_mut("weight gradient")?;
        let dbias = gradients.bias.f32_mut("bias gradient")?;
        simd::vectorize(
            #[inline(always)]
            || {
                for (((dy, x), &mean), &rstd) in dy
                    .chunks_exact(width)
                    .zip(x.chunks_exact(width))
                    .zip(mean)
                    .zip(rstd)
                {
                    dweight
                        .iter_mut()
                        .zip(dy)
                        .zip(x)
                        .for_each(|((dw, dy), x)| *dw += dy * (x - mean) * rstd);
                    simd::axpy(1.0, dy, dbias);
                }
            },
        );
    }
    Ok(())
}

impl Statistics {
    fn check(&self, tokens: usize, device: &Device) -> Result<()> {
        self.mean.check_shape("mean", &[tokens])?;
        self.rstd.check_shape("rstd", &[tokens])?;
        check::devices(device, [("mean", &self.mean), ("rstd", &self.rstd)])
    }

    #[cfg(feature = "cuda")]
    fn operands(&self) -> norm::layer_norm::Statistics<'_> {
        norm::layer_norm::Statistics {
            mean: self.mean.operand(),
            rstd: self.rstd.operand(),
        }
    }

    fn values(&self) -> Result<(&[f32], &[f32])> {
        Ok((self.mean.f32("mean")?, self.rstd.f32("rstd")?))
    }
}

fn checked(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<(usize, usize)> {
    let (tokens, width) = x.tokens("x", "[tokens, width]")?;
    weight.check_shape("weight", &[width])?;
    bias.check_shape("bias", &[width])?;
    check::devices(x.device(), [("weight", weight), ("bias", bias)])?;
    if width == 0 {
        return Err(Error::Argument(
            "x: cannot normalise rows without elements".into(),
        ));
    }
    Ok((tokens, width))
}
