//! AdamW and the gradient norm.

mod adamw_8bit;

#[cfg(feature = "cuda")]
use crate::DType;
use crate::{Error, Result, Tensor, check, parallel, simd};
pub use adamw_8bit::{AdamW8bitParam, Moment8bit, adamw_8bit};
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
    /// Gradients are clipped to this norm as `torch.nn.utils.clip_grad_norm_` does: all of them are multiplied by
    /// `max_grad_norm / (norm + 1e-6)`, at most 1. 0: they are not clipped.
    pub max_grad_norm: f32,
}

impl AdamWHyper {
    /// `1 - lr·weight_decay` and `lr/(1 - β1^t)`.
    fn factors(&self, lr: f32, weight_decay: f32) -> (f32, f32) {
        let decay = (1.0 - f64::from(lr) * f64::from(weight_decay)) as f32;
        let step_size = f64::from(lr) / correction(self.beta1, self.step);
        (decay, step_size as f32)
    }

    /// `1/√(1 - β2^t)`.
    fn inv_sqrt_correction2(&self) -> f32 {
        (1.0 / correction(self.beta2, self.step).sqrt()) as f32
    }
}

/// What a mean of `step` gradients lacks for having started at 0.
fn correction(beta: f64, step: u64) -> f64 {
    1.0 - beta.powf(step as f64)
}

const CHUNK: usize = 1 << 13;

/// AdamW as PyTorch computes it (Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019):
/// `p *= 1 - lr·weight_decay`, `m += (1 - β1)(g - m)`, `v = β2·v + (1 - β2)·g²`,
/// `p -= lr/(1 - β1^t) · m / (√v/√(1 - β2^t) + eps)`.
///
/// `norm [1]` F32 is that of all gradients, from [`global_norm`]. Where it is not finite, nothing is changed.
///
/// # Errors
/// When the step is 0, and on shapes, data types and devices that do not fit.
pub fn adamw(params: &mut [AdamWParam], hyper: AdamWHyper, norm: &Tensor) -> Result<()> {
    norm.check_shape("norm", &[1])?;
    for AdamWParam {
        param, grad, m, v, ..
    } in &*params
    {
        let others = [("grad", *grad), ("m", m), ("v", v)];
        for (name, tensor) in others {
            tensor.check_shape(name, param.shape())?;
        }
        check::devices(norm.device(), [("param", &**param)])?;
        check::devices(norm.device(), others)?;
    }
    if hyper.step == 0 {
        return Err(Error::Argument("adamw: steps are counted from 1".into()));
    }
    let AdamWHyper {
        beta1,
        beta2,
        eps,
        max_grad_norm,
        ..
    } = hyper;
    let inv_sqrt_correction2 = hyper.inv_sqrt_correction2();
    // 1 - 0.999 in f32 is wrong in the fifth digit.
    let (new1, keep2, new2) = ((1.0 - beta1) as f32, beta2 as f32, (1.0 - beta2) as f32);
    #[cfg(feature = "cuda")]
    if !norm.device().is_cpu() {
        let step = fuselora_kernels::abi::AdamWStep {
            new1,
            keep2,
            new2,
            inv_sqrt_correction2,
            eps,
            max_grad_norm,
        };
        let params: Vec<_> = params
            .iter_mut()
            .map(|item| {
                let (decay, step_size) = hyper.factors(item.lr, item.weight_decay);
                fuselora_kernels::optimizer::AdamWParam {
                    param: item.param.operand_mut(),
                    grad: item.grad.operand(),
                    m: item.m.operand_mut(),
                    v: item.v.operand_mut(),
                    decay,
                    step_size,
                }
            })
            .collect();
        return norm.device().launch(|kernels| {
            fuselora_kernels::optimizer::adamw(kernels, &params, step, norm.operand())
        });
    }
    let Some(clip) = clip(norm, max_grad_norm)? else {
        return Ok(());
    };
    for AdamWParam {
        param,
        grad,
        m,
        v,
        lr,
        weight_decay,
    } in params
    {
        let (decay, step_size) = hyper.factors(*lr, *weight_decay);
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
                        let g = g * clip;
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

/// What gradients of this norm are multiplied by; nothing where it is not finite.
fn clip(norm: &Tensor, max_grad_norm: f32) -> Result<Option<f32>> {
    let norm = f64::from(norm.f32("norm")?[0]);
    if !norm.is_finite() {
        return Ok(None);
    }
    Ok(Some(match max_grad_norm {
        0.0 => 1.0,
        max => (f64::from(max) / (norm + 1e-6)).min(1.0) as f32,
    }))
}

/// The Euclidean norm of all gradients together, `[1]` F32, summed in f64.
///
/// # Errors
/// When there is no gradient, a tensor is not F32, or devices differ.
pub fn global_norm(grads: &[&Tensor]) -> Result<Tensor> {
    let Some(first) = grads.first() else {
        return Err(Error::Argument("global_norm: there is no gradient".into()));
    };
    let device = first.device();
    for grad in grads {
        grad.check_device("grad", device)?;
    }
    #[cfg(feature = "cuda")]
    if !device.is_cpu() {
        let lengths = grads.iter().map(|grad| grad.element_count() as u64);
        let len = fuselora_kernels::optimizer::gradient_norm_workspace(lengths) as usize;
        let mut workspace = Tensor::workspace(device, [len], DType::F32)?;
        let mut norm = Tensor::empty(device, [1], DType::F32)?;
        let grads: Vec<_> = grads.iter().map(|grad| grad.operand()).collect();
        device.launch(|kernels| {
            fuselora_kernels::optimizer::gradient_norm(
                kernels,
                &grads,
                workspace.operand_mut(),
                norm.operand_mut(),
            )
        })?;
        return Ok(norm);
    }
    let mut sum = 0.0;
    for grad in grads {
        let chunks = grad.f32("grad")?.par_chunks(CHUNK);
        let partial: Vec<f64> = chunks
            .map(|chunk| chunk.iter().map(|&g| f64::from(g) * f64::from(g)).sum())
            .collect();
        sum += partial.iter().sum::<f64>();
    }
    Tensor::from_f32(device, [1], &[sum.sqrt() as f32])
}
