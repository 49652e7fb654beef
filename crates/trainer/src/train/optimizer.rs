//! AdamW over an adapter's parameters.

use fuselora_tensor::ops::optimizer::{AdamWHyper, AdamWParam, adamw, global_norm};
use fuselora_tensor::{DType, Purpose, Tensor};
use fuselora_transformer::adapter::Module;
use fuselora_transformer::lora::{Lora, LoraGradients};

use super::learning_rates::{self, Rate};
use crate::cli::OptimizationArgs;

/// Running means of one parameter's gradient and of its square.
pub struct Moments {
    /// First moment, F32, in the parameter's shape.
    pub m: Tensor,
    /// Second moment.
    pub v: Tensor,
}

/// The optimizer's state, in the order of [`Lora::parameters`].
pub struct Optimizer {
    /// Steps taken.
    pub step: u64,
    /// The moments of each parameter.
    pub moments: Vec<Moments>,
    rates: Vec<Rate>,
}

impl Optimizer {
    /// A fresh state for an adapter of a model with these modules.
    ///
    /// # Errors
    /// No room on the device.
    pub fn new(
        lora: &Lora,
        modules: &[Module],
        settings: &OptimizationArgs,
    ) -> anyhow::Result<Optimizer> {
        let zeros = |t: &Tensor| {
            let _holding = t.device().hold(Purpose::Optimizer);
            Tensor::zeros(t.device(), t.shape(), DType::F32)
        };
        let moments = lora
            .parameters()
            .map(|(_, t)| {
                Ok(Moments {
                    m: zeros(t)?,
                    v: zeros(t)?,
                })
            })
            .collect::<anyhow::Result<_>>()?;
        Ok(Optimizer {
            step: 0,
            moments,
            rates: learning_rates::of(lora, modules, settings),
        })
    }

    /// One step; `grad_norm` is that of the unclipped gradients, from [`gradient_norm`]. Where it is not finite, the
    /// adapter and the moments stay as they are.
    ///
    /// # Errors
    /// Tensors that do not fit each other.
    pub fn step(
        &mut self,
        lora: &mut Lora,
        gradients: &LoraGradients,
        learning_rate: f64,
        grad_norm: &Tensor,
        settings: &OptimizationArgs,
    ) -> anyhow::Result<()> {
        self.step += 1;
        let parameters = lora.parameters_mut().zip(gradients.tensors());
        let mut params: Vec<AdamWParam> = parameters
            .zip(self.moments.iter_mut().zip(&self.rates))
            .map(|((param, grad), (moments, rate))| AdamWParam {
                param,
                grad,
                m: &mut moments.m,
                v: &mut moments.v,
                lr: (learning_rate * rate.factor) as f32,
                weight_decay: rate.weight_decay as f32,
            })
            .collect();
        let hyper = AdamWHyper {
            beta1: settings.adam_beta1,
            beta2: settings.adam_beta2,
            eps: settings.adam_epsilon as f32,
            step: self.step,
            max_grad_norm: settings.max_grad_norm as f32,
        };
        Ok(adamw(&mut params, hyper, grad_norm)?)
    }
}

/// The norm of all gradients together, `[1]` F32 on their device.
///
/// # Errors
/// Gradients that are not F32.
pub fn gradient_norm(gradients: &LoraGradients) -> anyhow::Result<Tensor> {
    let all: Vec<&Tensor> = gradients.tensors().collect();
    Ok(global_norm(&all)?)
}
