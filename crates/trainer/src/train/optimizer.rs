//! AdamW over an adapter's pairs.

use fuselora_tensor::ops::optimizer::{AdamWHyper, AdamWParam, adamw, global_norm};
use fuselora_tensor::{DType, Tensor};
use fuselora_transformer::lora::{Lora, LoraGradients};

use crate::cli::OptimizationArgs;

/// Running means of one parameter's gradient and of its square.
pub struct Moments {
    /// First moment, F32, in the parameter's shape.
    pub m: Tensor,
    /// Second moment.
    pub v: Tensor,
}

/// The optimizer's state, pair by pair in the order of [`Lora::pairs`]: `[lora_a, lora_b]`.
pub struct Optimizer {
    /// Steps taken.
    pub step: u64,
    /// The moments of each pair.
    pub moments: Vec<[Moments; 2]>,
}

impl Optimizer {
    /// A fresh state for an adapter.
    ///
    /// # Errors
    /// No room on the device.
    pub fn new(lora: &Lora) -> anyhow::Result<Optimizer> {
        let zeros = |t: &Tensor| Tensor::zeros(t.device(), t.shape(), DType::F32);
        let fresh = |t: &Tensor| {
            anyhow::Ok(Moments {
                m: zeros(t)?,
                v: zeros(t)?,
            })
        };
        let moments = lora
            .pairs()
            .map(|(_, pair)| Ok([fresh(&pair.a)?, fresh(&pair.b)?]))
            .collect::<anyhow::Result<_>>()?;
        Ok(Optimizer { step: 0, moments })
    }

    /// One step; `grad_norm` is that of the unclipped gradients.
    ///
    /// Clipping is `torch.nn.utils.clip_grad_norm_`'s rule: gradients times `max / (norm + 1e-6)`, at most 1.
    ///
    /// # Errors
    /// Tensors that do not fit each other.
    pub fn step(
        &mut self,
        lora: &mut Lora,
        gradients: &LoraGradients,
        learning_rate: f64,
        grad_norm: f64,
        settings: &OptimizationArgs,
    ) -> anyhow::Result<()> {
        self.step += 1;
        let clip = match settings.max_grad_norm {
            0.0 => 1.0,
            max => (max / (grad_norm + 1e-6)).min(1.0),
        };
        let (lr, weight_decay) = (learning_rate as f32, settings.weight_decay as f32);
        let mut params = Vec::with_capacity(2 * self.moments.len());
        for ((pair, gradient), [a, b]) in lora
            .pairs_mut()
            .zip(gradients.iter())
            .zip(&mut self.moments)
        {
            params.push(AdamWParam {
                param: &mut pair.a,
                grad: &gradient.a,
                m: &mut a.m,
                v: &mut a.v,
                lr,
                weight_decay,
            });
            params.push(AdamWParam {
                param: &mut pair.b,
                grad: &gradient.b,
                m: &mut b.m,
                v: &mut b.v,
                lr,
                weight_decay,
            });
        }
        let hyper = AdamWHyper {
            beta1: settings.adam_beta1,
            beta2: settings.adam_beta2,
            eps: settings.adam_epsilon as f32,
            step: self.step,
            grad_scale: clip as f32,
        };
        Ok(adamw(&mut params, hyper)?)
    }
}

/// The norm of all gradients together.
///
/// # Errors
/// Gradients that are not F32.
pub fn gradient_norm(gradients: &LoraGradients) -> anyhow::Result<f64> {
    let all: Vec<&Tensor> = gradients
        .iter()
        .flat_map(|pair| [&pair.a, &pair.b])
        .collect();
    Ok(global_norm(&all)?)
}
