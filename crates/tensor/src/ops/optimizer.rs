//! AdamW and the gradient norm.

mod adamw_8bit;

#[cfg(feature = "cuda")]
use crate::DType;
use crate::{Device, Error, Result, Tensor, check, parallel, simd};
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
    /// Which of the [`AdamWRates`] is its own.
    pub rate: usize,
}

/// What all parameters share in every step.
#[derive(Debug, Clone, Copy)]
pub struct AdamWHyper {
    /// Decay of `m`.
    pub beta1: f64,
    /// Decay of `v`.
    pub beta2: f64,
    /// Added to the denominator.
    pub eps: f32,
    /// Gradients are clipped to this norm as `torch.nn.utils.clip_grad_norm_` does: all of them are multiplied by
    /// `max_grad_norm / (norm + 1e-6)`, at most 1. 0: they are not clipped.
    pub max_grad_norm: f32,
}

impl AdamWHyper {
    /// `1 - β1`, `β2`, `1 - β2`: 1 - 0.999 in f32 is wrong in the fifth digit.
    fn factors(&self) -> [f32; 3] {
        let AdamWHyper { beta1, beta2, .. } = self;
        [1.0 - beta1, *beta2, 1.0 - beta2].map(|factor| factor as f32)
    }

    #[cfg(feature = "cuda")]
    fn for_kernels(&self) -> fuselora_kernels::abi::AdamWStep {
        let [new1, keep2, new2] = self.factors();
        fuselora_kernels::abi::AdamWStep {
            new1,
            keep2,
            new2,
            eps: self.eps,
            max_grad_norm: self.max_grad_norm,
        }
    }
}

/// How fast a parameter learns in one step.
#[derive(Debug, Clone, Copy)]
pub struct AdamWRate {
    /// The learning rate.
    pub lr: f32,
    /// The decoupled weight decay.
    pub weight_decay: f32,
}

/// What changes from step to step, on the parameters' device: all else of a step is as it was in the one before.
#[derive(Debug)]
pub struct AdamWRates(Tensor);

/// `1 - lr·weight_decay`, `lr/(1 - β1^t)` and `1/√(1 - β2^t)`.
const RATE_LEN: usize = 3;

impl AdamWRates {
    /// Room for so many rates. Until they are [set](AdamWRates::set), a step moves nothing.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn new(device: &Device, count: usize) -> Result<AdamWRates> {
        let at_rest = [1.0, 0.0, 1.0].repeat(count);
        let values = Tensor::from_f32(device, [count, RATE_LEN], &at_rest)?;
        Ok(AdamWRates(values))
    }

    /// Sets all of them for step `step`, from 1.
    ///
    /// # Errors
    /// When the step is 0, or there are more or fewer of them.
    pub fn set(&mut self, step: u64, hyper: &AdamWHyper, rates: &[AdamWRate]) -> Result<()> {
        if step == 0 {
            return Err(Error::Argument("adamw: steps are counted from 1".into()));
        }
        // What a mean of `step` gradients lacks for having started at 0.
        let correction = |beta: f64| 1.0 - beta.powf(step as f64);
        let inv_sqrt_correction2 = (1.0 / correction(hyper.beta2).sqrt()) as f32;
        let values: Vec<f32> = rates
            .iter()
            .flat_map(|&AdamWRate { lr, weight_decay }| {
                let decay = (1.0 - f64::from(lr) * f64::from(weight_decay)) as f32;
                let step_size = (f64::from(lr) / correction(hyper.beta1)) as f32;
                [decay, step_size, inv_sqrt_correction2]
            })
            .collect();
        self.0.set_f32(&values)
    }

    /// That every one of `used` is there, on `device`.
    fn check(&self, device: &Device, used: impl Iterator<Item = usize>) -> Result<()> {
        self.0.check_device("rates", device)?;
        let count = self.0.shape()[0];
        match used.max().filter(|&index| index >= count) {
            Some(index) => Err(Error::Argument(format!(
                "adamw: a parameter has the rate {index}, but there are {count} rates"
            ))),
            None => Ok(()),
        }
    }

    /// Those of rate `index`, on the CPU.
    fn values(&self, index: usize) -> Result<[f32; RATE_LEN]> {
        let (rates, _) = self.0.f32("rates")?.as_chunks();
        Ok(rates[index])
    }
}

const CHUNK: usize = 1 << 13;

/// AdamW as PyTorch computes it (Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019):
/// `p *= 1 - lr·weight_decay`, `m += (1 - β1)(g - m)`, `v = β2·v + (1 - β2)·g²`,
/// `p -= lr/(1 - β1^t) · m / (√v/√(1 - β2^t) + eps)`.
///
/// `norm [1]` F32 is that of all gradients, from [`global_norm`]. Where it is not finite, nothing is changed.
///
/// # Errors
/// When a parameter's rate is not there, and on shapes, data types and devices that do not fit.
pub fn adamw(
    params: &mut [AdamWParam],
    hyper: AdamWHyper,
    rates: &AdamWRates,
    norm: &Tensor,
) -> Result<()> {
    norm.check_shape("norm", &[1])?;
    rates.check(norm.device(), params.iter().map(|item| item.rate))?;
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
    let [new1, keep2, new2] = hyper.factors();
    let AdamWHyper {
        eps, max_grad_norm, ..
    } = hyper;
    #[cfg(feature = "cuda")]
    if !norm.device().is_cpu() {
        let step = hyper.for_kernels();
        let params: Vec<_> = params
            .iter_mut()
            .map(|item| fuselora_kernels::optimizer::AdamWParam {
                param: item.param.operand_mut(),
                grad: item.grad.operand(),
                m: item.m.operand_mut(),
                v: item.v.operand_mut(),
                // A rate is one of those that a tensor holds, of fewer than 2^32 parameters.
                rate: item.rate as u32,
            })
            .collect();
        return norm.device().launch(|kernels| {
            let (rates, norm) = (rates.0.operand(), norm.operand());
            fuselora_kernels::optimizer::adamw(kernels, &params, step, rates, norm)
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
        rate,
    } in params
    {
        let [decay, step_size, inv_sqrt_correction2] = rates.values(*rate)?;
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

/// The Euclidean norm of all gradients together, summed in f64, to `norm [1]` F32.
///
/// # Errors
/// When there is no gradient, a tensor is not F32, or devices differ.
pub fn global_norm(grads: &[&Tensor], norm: &mut Tensor) -> Result<()> {
    if grads.is_empty() {
        return Err(Error::Argument("global_norm: there is no gradient".into()));
    }
    norm.check_shape("norm", &[1])?;
    let device = &norm.device().clone();
    for grad in grads {
        grad.check_device("grad", device)?;
    }
    #[cfg(feature = "cuda")]
    if !device.is_cpu() {
        let lengths = grads.iter().map(|grad| grad.element_count() as u64);
        let len = fuselora_kernels::optimizer::gradient_norm_workspace(lengths) as usize;
        let mut workspace = Tensor::workspace(device, [len], DType::F32)?;
        let grads: Vec<_> = grads.iter().map(|grad| grad.operand()).collect();
        return device.launch(|kernels| {
            fuselora_kernels::optimizer::gradient_norm(
                kernels,
                &grads,
                workspace.operand_mut(),
                norm.operand_mut(),
            )
        });
    }
    let mut sum = 0.0;
    for grad in grads {
        let chunks = grad.f32("grad")?.par_chunks(CHUNK);
        let partial: Vec<f64> = chunks
            .map(|chunk| chunk.iter().map(|&g| f64::from(g) * f64::from(g)).sum())
            .collect();
        sum += partial.iter().sum::<f64>();
    }
    norm.f32_mut("norm")?[0] = sum.sqrt() as f32;
    Ok(())
}
