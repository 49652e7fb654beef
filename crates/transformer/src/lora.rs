//! The low-rank pairs of a model, by projection, and their gradients.

use std::path::Path;
use std::sync::OnceLock;

use fuselora_tensor::ops::dora;
use fuselora_tensor::ops::lora_linear::{Dropout, Lora as Operand};
use fuselora_tensor::{Purpose, Tensor, Weight};

use crate::adapter::{Adapter, AdapterConfig, LinearModule, LoraWeights};
use crate::error::{Error, Result};

/// An adapter bound to a model: one optional pair per projection, in the order of
/// [`crate::model::Model::linears`].
///
/// The frozen model never changes; another adapter is another `Lora` passed to the same model.
pub struct Lora {
    config: AdapterConfig,
    pairs: Vec<Option<Pair>>,
}

struct Pair {
    module: String,
    weights: LoraWeights,
    /// Computed from the weights when a pass first needs it, and again after they change.
    direction: OnceLock<Direction>,
}

/// What DoRA multiplies the outputs of a module by.
pub(crate) struct Direction {
    /// Row norms of the adapted weight, `[out_features]`.
    pub norm: Tensor,
    /// `magnitude / norm`, `[out_features]`.
    pub gain: Tensor,
}

impl Lora {
    /// Binds an adapter to the model with these projections.
    ///
    /// # Errors
    /// When the adapter has a module that the model has not.
    pub fn bind(mut adapter: Adapter, linears: &[LinearModule]) -> Result<Lora> {
        let pairs = linears
            .iter()
            .map(|linear| {
                let (module, weights) = adapter.modules.remove_entry(&linear.name)?;
                Some(Pair {
                    module,
                    weights,
                    direction: OnceLock::new(),
                })
            })
            .collect();
        match adapter.modules.keys().next() {
            None => Ok(Lora {
                config: adapter.config,
                pairs,
            }),
            Some(module) => Err(Error::Adapter(format!(
                "the model has no linear module `{module}`"
            ))),
        }
    }

    /// Writes the adapter as PEFT does, replacing the one in `folder` as a whole.
    ///
    /// # Errors
    /// When a file cannot be written; what was there before is then untouched.
    pub fn write(&self, folder: &Path) -> Result<()> {
        let modules = self
            .pairs
            .iter()
            .flatten()
            .map(|pair| (pair.module.as_str(), &pair.weights));
        crate::adapter::write(folder, &self.config, modules)
    }

    /// PEFT's configuration.
    pub fn config(&self) -> &AdapterConfig {
        &self.config
    }

    /// The pair of projection `index`.
    pub fn pair(&self, index: usize) -> Option<&LoraWeights> {
        Some(&self.pairs.get(index)?.as_ref()?.weights)
    }

    /// Number of adapted modules.
    pub fn module_count(&self) -> usize {
        self.pairs.iter().flatten().count()
    }

    /// Every trained tensor by PEFT's name, module by module in the model's order.
    pub fn parameters(&self) -> impl Iterator<Item = (String, &Tensor)> {
        self.pairs
            .iter()
            .flatten()
            .flat_map(|pair| pair.weights.named_tensors(&pair.module))
    }

    /// Every trained tensor, to be updated by an optimizer, in the order of [`Lora::parameters`].
    pub fn parameters_mut(&mut self) -> impl Iterator<Item = &mut Tensor> {
        self.pairs.iter_mut().flatten().flat_map(|pair| {
            pair.direction = OnceLock::new();
            pair.weights.tensors_mut()
        })
    }

    /// Number of trained parameters.
    pub fn parameter_count(&self) -> usize {
        self.parameters()
            .map(|(_, tensor)| tensor.element_count())
            .sum()
    }
}

/// Gradients of a [`Lora`], accumulated over the micro-batches of an optimizer step.
pub struct LoraGradients {
    pairs: Vec<Option<LoraWeights>>,
}

impl LoraGradients {
    /// Zeros in the shapes of `lora`.
    pub fn zeros(lora: &Lora) -> Result<LoraGradients> {
        let zeros = |weights: &LoraWeights| {
            let _holding = weights.a.device().hold(Purpose::Adapter);
            weights.zeros()
        };
        let pairs = lora
            .pairs
            .iter()
            .map(|pair| pair.as_ref().map(|pair| zeros(&pair.weights)).transpose())
            .collect::<Result<_>>()?;
        Ok(LoraGradients { pairs })
    }

    /// Back to zero for the next optimizer step.
    pub fn clear(&mut self) -> Result<()> {
        for gradient in self.pairs.iter_mut().flatten() {
            for tensor in gradient.tensors_mut() {
                tensor.fill_zero()?;
            }
        }
        Ok(())
    }

    /// Every gradient, in the order of [`Lora::parameters`].
    pub fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        self.pairs.iter().flatten().flat_map(LoraWeights::tensors)
    }

    /// Takes one projection's gradients out while its backward pass adds to them.
    pub(crate) fn take(&mut self, index: usize) -> Option<LoraWeights> {
        self.pairs.get_mut(index).and_then(Option::take)
    }

    pub(crate) fn put(&mut self, index: usize, gradient: Option<LoraWeights>) {
        if let Some(slot) = self.pairs.get_mut(index) {
            *slot = gradient;
        }
    }
}

/// Where the dropout masks of a pass come from.
#[derive(Debug, Clone, Copy)]
pub struct DropoutSeed {
    /// The run's seed.
    pub seed: u64,
    /// Counts micro-batches, so that every forward draws new masks and its backward the same ones.
    pub step: u32,
}

/// What one pass over the model uses besides the frozen weights.
#[derive(Clone, Copy, Default)]
pub struct Pass<'a> {
    /// The adapter, if any.
    pub lora: Option<&'a Lora>,
    /// Set in training; without it nothing is dropped.
    pub dropout: Option<DropoutSeed>,
    /// Whether every operation's result is searched for NaN and infinity.
    pub trace: bool,
}

impl<'a> Pass<'a> {
    pub(crate) fn operand(&self, index: usize) -> Option<Operand<'a>> {
        let lora = self.lora?;
        let pair = lora.pair(index)?;
        let probability = lora.config.dropout;
        let dropout = self.dropout.filter(|_| probability > 0.0).map(|d| Dropout {
            probability,
            seed: d.seed,
            stream: index as u32,
            step: d.step,
        });
        Some(Operand {
            a: &pair.a,
            b: &pair.b,
            scaling: pair.scaling,
            dropout,
        })
    }

    /// What DoRA needs of projection `index`, which holds `weight`; nothing where it is plain LoRA.
    pub(crate) fn direction(&self, index: usize, weight: &Weight) -> Result<Option<&'a Direction>> {
        let Some(lora) = self.lora else {
            return Ok(None);
        };
        let Some(Some(pair)) = lora.pairs.get(index) else {
            return Ok(None);
        };
        let LoraWeights {
            a,
            b,
            scaling,
            magnitude: Some(magnitude),
            ..
        } = &pair.weights
        else {
            return Ok(None);
        };
        if let Some(direction) = pair.direction.get() {
            return Ok(Some(direction));
        }
        let norm = dora::weight_norm(weight, a, b, *scaling)?;
        let gain = dora::gain(magnitude, &norm)?;
        Ok(Some(
            pair.direction.get_or_init(|| Direction { norm, gain }),
        ))
    }

    /// Fails with the operation's name where tracing finds that its result is not finite.
    pub(crate) fn check(&self, result: &Tensor, operation: impl FnOnce() -> String) -> Result<()> {
        if self.trace && fuselora_tensor::ops::elementwise::find_nonfinite(result)?.is_some() {
            return Err(Error::NonFinite {
                operation: operation(),
            });
        }
        Ok(())
    }
}
