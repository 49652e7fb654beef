//! AdamW and the gradient norm.

use crate::{Error, Result, Tensor, parallel, simd};
use rayon::prelude::*;

/// One parameter tensor with its gradient and state, all F32 and of one shape.
pub struct AdamWParam<'a> {
    /// The parameter.
    pub param: &'a mut Tensor,
    /// Its gradient.
    pub grad: &'a Tensor,
    /// The running mean of the gradient.
    pub m: &'a mut Tensor,
    /// The running mean of the squared gradient.
    pub v: &'a mut Tensor,
    /// Its learning rate.
    pub lr: f32,
    /// Its decoupled weight decay.
    pub weight_decay: f32,
}

/// What all parameters of a step share.
#[derive(Debug, Clone, Copy)]
pub struct AdamWHyper {
    /// Decay of `m`.
    pub beta1: f64,
    /// Decay of `v`.
    pub beta2: f64,
    /// Added to the denominator.
    pub eps: f32,
    /// The number of this step, from 1.
    pub step: u64,
    /// Multiplies every gradient first: gradient clipping.
    pub grad_scale: f32,
}

const CHUNK: usize = 1 << 13;

/// AdamW as PyTorch computes it (Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019):
/// `p *= 1 - lr·weight_decay`, `m += (1 - β1)(g - m)`, `v = β2·v + (1 - β2)·g²`,
/// `p -= lr/(1 - β1^t) · m / (√v/√(1 - β2^t) + eps)`.
///
/// # Errors
/// When the step is 0, and on shapes and data types that do not fit.
pub fn adamw(params: &mut [AdamWParam], hyper: AdamWHyper) -> Result<()> {
    if hyper.step == 0 {
        return Err(Error::Argument("adamw: steps are counted from 1".into()));
    }
    let AdamWHyper {
        beta1,
        beta2,
        eps,
        grad_scale,
        ..
    } = hyper;
    let correction = |beta: f64| 1.0 - beta.powf(hyper.step as f64);
    let inv_sqrt_correction2 = (1.0 / correction(beta2).sqrt()) as f32;
    // 1 - 0.999 in f32 is wrong in the fifth digit.
    let (new1, keep2, new2) = ((1.0 - beta1) as f32, beta2 as f32, (1.0 - beta2) as f32);
    for AdamWParam {
        param,
        grad,
        m,
        v,
        lr,
        weight_decay,
    } in params
    {
        grad.check_shape("grad", param.shape())?;
        m.check_shape("m", param.shape())?;
        v.check_shape("v", param.shape())?;
        let decay = (1.0 - f64::from(*lr) * f64::from(*weight_decay)) as f32;
        let step_size = (f64::from(*lr) / correction(beta1)) as f32;
        let chunks = (
            param.f32_mut("param")?.par_chunks_mut(CHUNK),
            grad.f32("grad")?.par_chunks(CHUNK),
            m.f32_mut("m")?.par_chunks_mut(CHUNK),
            v.f32_mut("v")?.par_chunks_mut(CHUNK),
        );
        parallel::for_each(chunks.into_par_iter(), |(param, grad, m, v)| {
            simd::vectorize(
                #[inline(always)]
                || {
                    for (((p, &g), m), v) in param.iter_mut().zip(grad).zip(m).zip(v) {
                        let g = g * grad_scale;
                        *m += new1 * (g - *m);
                        *v = keep2 * *v + new2 * g * g;
                        *p = *p * decay - step_size * *m / (v.sqrt() * inv_sqrt_correction2 + eps);
                    }
                },
            );
        });
    }
    Ok(())
}

/// The Euclidean norm of all gradients together, summed in f64.
///
/// # Errors
/// When a tensor is not F32.
pub fn global_norm(grads: &[&Tensor]) -> Result<f64> {
    let mut sum = 0.0;
    for grad in grads {
        let chunks = grad.f32("grad")?.par_chunks(CHUNK);
        let partial: Vec<f64> = chunks
            .map(|chunk| chunk.iter().map(|&g| f64::from(g) * f64::from(g)).sum())
            .collect();
        sum += partial.iter().sum::<f64>();
    }
    Ok(sum.sqrt())
}
