//! The low-rank pairs of a model, by projection, and their gradients.

use std::path::Path;

use fuselora_tensor::ops::lora_linear::{Dropout, Gradients, Lora as Operand};
use fuselora_tensor::{DType, Tensor};

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
                Some(Pair { module, weights })
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

    /// Every pair with its module's path, in the model's order.
    pub fn pairs(&self) -> impl Iterator<Item = (&str, &LoraWeights)> {
        self.pairs
            .iter()
            .flatten()
            .map(|pair| (pair.module.as_str(), &pair.weights))
    }

    /// Every pair, to be updated by an optimizer, in the order of [`Lora::pairs`].
    pub fn pairs_mut(&mut self) -> impl Iterator<Item = &mut LoraWeights> {
        self.pairs
            .iter_mut()
            .flatten()
            .map(|pair| &mut pair.weights)
    }

    /// Number of trained parameters.
    pub fn parameter_count(&self) -> usize {
        self.pairs()
            .map(|(_, pair)| pair.a.element_count() + pair.b.element_count())
            .sum()
    }
}

/// Gradients of a [`Lora`], accumulated over the micro-batches of an optimizer step.
pub struct LoraGradients {
    pairs: Vec<Option<PairGradient>>,
}

/// Gradients of one pair, F32, in the shapes of its parameters.
pub struct PairGradient {
    /// `[rank, in_features]`.
    pub a: Tensor,
    /// `[out_features, rank]`.
    pub b: Tensor,
}

impl PairGradient {
    pub(crate) fn operand(&mut self) -> Gradients<'_> {
        Gradients {
            a: &mut self.a,
            b: &mut self.b,
        }
    }
}

impl LoraGradients {
    /// Zeros in the shapes of `lora`.
    pub fn zeros(lora: &Lora) -> Result<LoraGradients> {
        let zeros = |t: &Tensor| Tensor::zeros(t.device(), t.shape(), DType::F32);
        let pairs = lora
            .pairs
            .iter()
            .map(|pair| {
                let Some(Pair { weights, .. }) = pair else {
                    return Ok(None);
                };
                Ok(Some(PairGradient {
                    a: zeros(&weights.a)?,
                    b: zeros(&weights.b)?,
                }))
            })
            .collect::<Result<_>>()?;
        Ok(LoraGradients { pairs })
    }

    /// Back to zero for the next optimizer step.
    pub fn clear(&mut self) -> Result<()> {
        for gradient in self.pairs.iter_mut().flatten() {
            gradient.a.fill_zero()?;
            gradient.b.fill_zero()?;
        }
        Ok(())
    }

    /// Every gradient, in the same order as [`Lora::pairs`].
    pub fn iter(&self) -> impl Iterator<Item = &PairGradient> {
        self.pairs.iter().flatten()
    }

    /// Takes one projection's gradients out while its backward pass adds to them.
    pub(crate) fn take(&mut self, index: usize) -> Option<PairGradient> {
        self.pairs.get_mut(index).and_then(Option::take)
    }

    pub(crate) fn put(&mut self, index: usize, gradient: Option<PairGradient>) {
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
