//! The activation of GPT-2 (Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016).

use crate::{Result, Tensor, parallel, simd};
#[cfg(feature = "cuda")]
use fuselora_kernels::activation;
use rayon::prelude::*;
use std::f32::consts::FRAC_1_SQRT_2;

/// Which formula stands for x·Φ(x).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GeluKind {
    /// `0.5·x·(1 + tanh(√(2/π)·(x + 0.044715·x³)))`: "gelu_new" and "gelu_pytorch_tanh".
    Tanh,
    /// `0.5·x·(1 + erf(x/√2))`: "gelu".
    Erf,
}

#[cfg(feature = "cuda")]
impl From<GeluKind> for activation::Gelu {
    fn from(kind: GeluKind) -> activation::Gelu {
        match kind {
            GeluKind::Tanh => activation::Gelu::Tanh,
            GeluKind::Erf => activation::Gelu::Erf,
        }
    }
}

const CHUNK: usize = 1 << 13;
/// √(2/π).
const SQRT_2_OVER_PI: f32 = 0.797_884_6;
const CUBIC: f32 = 0.044_715;

/// `y = gelu(x)`, of a float type.
///
/// # Errors
/// When the data type does not fit.
pub fn forward(x: &Tensor, kind: GeluKind) -> Result<Tensor> {
    let mut y = Tensor::empty(x.device(), x.shape(), x.dtype())?;
    #[cfg(feature = "cuda")]
    if !x.device().is_cpu() {
        x.device().launch(|kernels| {
            activation::gelu_forward(kernels, kind.into(), x.operand(), y.operand_mut())
        })?;
        return Ok(y);
    }
    let chunks = y
        .as_f32_mut()?
        .par_chunks_mut(CHUNK)
        .zip(x.f32("x")?.par_chunks(CHUNK));
    parallel::for_each(chunks, |(y, x)| {
        simd::vectorize(
            #[inline(always)]
            || match kind {
                GeluKind::Tanh => {
                    for (y, &x) in y.iter_mut().zip(x) {
                        *y = x * tanh_cdf(x);
                    }
                }
                GeluKind::Erf => {
                    for (y, &x) in y.iter_mut().zip(x) {
                        *y = x * erf_cdf(x);
                    }
                }
            },
        );
    });
    Ok(y)
}

/// The backward pass, written over `dy`: `dx = dy · gelu'(x)`.
///
/// # Errors
/// On shapes, data types and devices that do not fit.
pub fn backward(mut dy: Tensor, x: &Tensor, kind: GeluKind) -> Result<Tensor> {
    x.check_shape("x", dy.shape())?;
    x.check_device("x", dy.device())?;
    #[cfg(feature = "cuda")]
    if !x.device().is_cpu() {
        x.device().launch(|kernels| {
            activation::gelu_backward(kernels, kind.into(), dy.operand_mut(), x.operand())
        })?;
        return Ok(dy);
    }
    let chunks = dy
        .f32_mut("dy")?
        .par_chunks_mut(CHUNK)
        .zip(x.f32("x")?.par_chunks(CHUNK));
    parallel::for_each(chunks, |(dy, x)| {
        simd::vectorize(
            #[inline(always)]
            || match kind {
                GeluKind::Tanh => {
                    for (dy, &x) in dy.iter_mut().zip(x) {
                        let cdf = tanh_cdf(x);
                        let inner = 2.0 * SQRT_2_OVER_PI * (1.0 + 3.0 * CUBIC * x * x);
                        *dy *= cdf + x * cdf * (1.0 - cdf) * inner;
                    }
                }
                GeluKind::Erf => {
                    for (dy, &x) in dy.iter_mut().zip(x) {
                        let density = 0.5 * SQRT_2_OVER_PI * simd::exp(-0.5 * x * x);
                        *dy *= erf_cdf(x) + x * density;
                    }
                }
            },
        );
    });
    Ok(dy)
}

/// `0.5·(1 + tanh(u))` is the sigmoid of `2·u`.
#[inline(always)]
fn tanh_cdf(x: f32) -> f32 {
    simd::sigmoid(2.0 * SQRT_2_OVER_PI * (x + CUBIC * x * x * x))
}

/// `0.5·(1 + erf(x/√2))`, with the error function of Abramowitz and Stegun 7.1.26 (error below 1.5e-7).
#[inline(always)]
fn erf_cdf(x: f32) -> f32 {
    let z = x.abs() * FRAC_1_SQRT_2;
    let t = 1.0 / 0.327_591_1_f32.mul_add(z, 1.0);
    let poly = 1.061_405_4_f32
        .mul_add(t, -1.453_152)
        .mul_add(t, 1.421_413_8)
        .mul_add(t, -0.284_496_74)
        .mul_add(t, 0.254_829_6);
    let upper = 0.5 * poly * t * simd::exp(-z * z);
    if x < 0.0 { upper } else { 1.0 - upper }
}
