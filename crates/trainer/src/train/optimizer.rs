//! AdamW over an adapter's parameters.

use fuselora_tensor::ops::optimizer::{
    AdamW8bitParam, AdamWHyper, AdamWParam, AdamWRate, AdamWRates, Moment8bit, adamw, adamw_8bit,
    global_norm,
};
use fuselora_tensor::{DType, Device, Purpose, Tensor};
use fuselora_transformer::adapter::{Module, ModuleKind};
use fuselora_transformer::lora::{Lora, LoraGradients};
use fuselora_transformer::memory_estimate::MIN_8BIT_SIZE;

use super::learning_rates::{self, Rate};
use crate::cli::{OptimArg, OptimizationArgs};

/// Running means of one parameter's gradient and of its square, in this order.
pub enum Moments {
    /// In F32, in the parameter's shape.
    F32(Box<[Tensor; 2]>),
    /// In 8 bits.
    Blockwise8bit(Box<[Moment8bit; 2]>),
}

impl Moments {
    fn zeros(param: &Tensor, in_8_bits: bool) -> fuselora_tensor::Result<Moments> {
        let device = param.device();
        if in_8_bits {
            let zeros = || Moment8bit::zeros(device, param.shape());
            return Ok(Moments::Blockwise8bit(Box::new([zeros()?, zeros()?])));
        }
        let zeros = || Tensor::zeros(device, param.shape(), DType::F32);
        Ok(Moments::F32(Box::new([zeros()?, zeros()?])))
    }

    /// All tensors, with what each is called in a saved state.
    pub fn named_tensors(&self) -> Vec<(&'static str, &Tensor)> {
        match self {
            Moments::F32(moments) => {
                let [m, v] = &**moments;
                vec![("m", m), ("v", v)]
            }
            Moments::Blockwise8bit(moments) => {
                let [m, v] = &**moments;
                vec![
                    ("m", &m.codes),
                    ("m.absmax", &m.absmax),
                    ("v", &v.codes),
                    ("v.absmax", &v.absmax),
                ]
            }
        }
    }

    /// As [`Moments::named_tensors`], to be read into.
    pub fn named_tensors_mut(&mut self) -> Vec<(&'static str, &mut Tensor)> {
        match self {
            Moments::F32(moments) => {
                let [m, v] = &mut **moments;
                vec![("m", m), ("v", v)]
            }
            Moments::Blockwise8bit(moments) => {
                let [m, v] = &mut **moments;
                vec![
                    ("m", &mut m.codes),
                    ("m.absmax", &mut m.absmax),
                    ("v", &mut v.codes),
                    ("v.absmax", &mut v.absmax),
                ]
            }
        }
    }
}

/// The optimizer's state, in the order of [`Lora::parameters`].
pub struct Optimizer {
    /// Steps taken.
    pub step: u64,
    /// The moments of each parameter.
    pub moments: Vec<Moments>,
    rates: Vec<Rate>,
    step_rates: AdamWRates,
}

impl Optimizer {
    /// A fresh state for an adapter on `device` of a model with these modules.
    ///
    /// # Errors
    /// No room on the device.
    pub fn new(
        device: &Device,
        lora: &Lora,
        modules: &[Module],
        settings: &OptimizationArgs,
    ) -> anyhow::Result<Optimizer> {
        let _holding = device.hold(Purpose::Optimizer);
        // As transformers has it, the moments of an embedding that is trained whole stay in f32.
        let embeddings: Vec<String> = modules
            .iter()
            .filter(|module| module.kind == ModuleKind::Embedding)
            .map(|module| format!("base_model.model.{}.weight", module.name))
            .collect();
        let moments = lora
            .parameters()
            .map(|(name, param)| {
                let in_8_bits = settings.optim == OptimArg::Adamw8bit
                    && param.element_count() >= MIN_8BIT_SIZE
                    && !embeddings.contains(&name);
                Moments::zeros(param, in_8_bits)
            })
            .collect::<Result<_, _>>()?;
        let rates = learning_rates::of(lora, modules, settings);
        let step_rates = AdamWRates::new(device, rates.len())?;
        Ok(Optimizer {
            step: 0,
            moments,
            rates,
            step_rates,
        })
    }

    /// Begins a step: what [`Optimizer::update`] needs of it goes to the device.
    ///
    /// # Errors
    /// A device that has failed.
    pub fn begin_step(
        &mut self,
        learning_rate: f64,
        settings: &OptimizationArgs,
    ) -> anyhow::Result<()> {
        self.step += 1;
        let of_step = |rate: &Rate| AdamWRate {
            lr: (learning_rate * rate.factor) as f32,
            weight_decay: rate.weight_decay as f32,
        };
        let rates: Vec<AdamWRate> = self.rates.iter().map(of_step).collect();
        Ok(self.step_rates.set(self.step, &hyper(settings), &rates)?)
    }

    /// Updates the adapter by the step that has begun; `grad_norm` is that of the unclipped gradients, from
    /// [`gradient_norm`]. Where it is not finite, the adapter and the moments stay as they are.
    ///
    /// # Errors
    /// Tensors that do not fit each other.
    pub fn update(
        &mut self,
        lora: &mut Lora,
        gradients: &LoraGradients,
        grad_norm: &Tensor,
        settings: &OptimizationArgs,
    ) -> fuselora_tensor::Result<()> {
        let (mut params, mut params_8bit) = (Vec::new(), Vec::new());
        let parameters = lora.parameters_mut().zip(gradients.tensors());
        for (rate, ((param, grad), moments)) in parameters.zip(&mut self.moments).enumerate() {
            match moments {
                Moments::F32(moments) => {
                    let [m, v] = &mut **moments;
                    params.push(AdamWParam {
                        param,
                        grad,
                        m,
                        v,
                        rate,
                    });
                }
                Moments::Blockwise8bit(moments) => {
                    let [m, v] = &mut **moments;
                    params_8bit.push(AdamW8bitParam {
                        param,
                        grad,
                        m,
                        v,
                        rate,
                    });
                }
            }
        }
        let (hyper, rates) = (hyper(settings), &self.step_rates);
        adamw(&mut params, hyper, rates, grad_norm)?;
        adamw_8bit(&mut params_8bit, hyper, rates, grad_norm)
    }
}

fn hyper(settings: &OptimizationArgs) -> AdamWHyper {
    AdamWHyper {
        beta1: settings.adam_beta1,
        beta2: settings.adam_beta2,
        eps: settings.adam_epsilon as f32,
        max_grad_norm: settings.max_grad_norm as f32,
    }
}

/// The norm of all gradients together, to `norm [1]` F32 on their device.
///
/// # Errors
/// Gradients that are not F32.
pub fn gradient_norm(gradients: &LoraGradients, norm: &mut Tensor) -> fuselora_tensor::Result<()> {
    let all: Vec<&Tensor> = gradients.tensors().collect();
    global_norm(&all, norm)
}
