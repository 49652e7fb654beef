//! What an adapter trains whole, in place of the base model's own: biases, modules to save, rows of single tokens.
//!
//! Source: `_mark_only_adapters_as_trainable` in PEFT's `tuners_utils.py`, `_set_trainable` and
//! `set_additional_trainable_modules` in `utils/other.py`.

use std::collections::BTreeMap;

use fuselora_tensor::ops::gather;
use fuselora_tensor::{DType, Tensor, Weight};

use super::{AdapterConfig, DTYPE, Module, ModuleKind, Target, TrainedBiases, TrainedTokens};
use crate::error::{Error, Result};
use crate::families::OUTPUT_HEAD;
use crate::model::Model;

/// Parameters of one module that an adapter trains in place of the base model's, all f32.
#[derive(Default)]
pub struct Trained {
    /// Its weight, as the model holds it.
    pub weight: Option<Weight>,
    /// Its bias, `[out_features]`.
    pub bias: Option<Tensor>,
    /// Rows of its weight.
    pub tokens: Option<TokenRows>,
}

/// Rows of an embedding, or of the output head, that stand in place of the frozen ones.
pub struct TokenRows {
    /// Which tokens' rows.
    pub indices: Vec<u32>,
    /// The rows in the same order, `[indices, width]`.
    pub rows: Tensor,
}

/// Which parameters of a module are trained whole.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Parts {
    pub weight: bool,
    pub bias: bool,
    pub tokens: Vec<u32>,
}

impl Trained {
    /// Every tensor, in a fixed order.
    pub fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        let weight = self.weight.as_ref().and_then(Weight::dense);
        let tokens = self.tokens.as_ref().map(|tokens| &tokens.rows);
        weight.into_iter().chain(&self.bias).chain(tokens)
    }

    /// The same, to change.
    pub fn tensors_mut(&mut self) -> impl Iterator<Item = &mut Tensor> {
        let weight = self.weight.as_mut().and_then(Weight::dense_mut);
        let tokens = self.tokens.as_mut().map(|tokens| &mut tokens.rows);
        weight.into_iter().chain(&mut self.bias).chain(tokens)
    }

    /// Every tensor with its name in PEFT's file, for the module at this path; `adapted` where the module has a
    /// low-rank update too, which puts it behind a name of its own.
    pub fn named_tensors(
        &self,
        module: &str,
        adapted: bool,
    ) -> impl Iterator<Item = (String, &Tensor)> {
        let present = [
            self.weight.is_some().then(|| weight_name(module)),
            self.bias.is_some().then(|| bias_name(module, adapted)),
            self.tokens.is_some().then(|| tokens_name(module)),
        ];
        present.into_iter().flatten().zip(self.tensors())
    }

    /// Zeros in the same shapes.
    pub(crate) fn zeros(&self) -> Result<Trained> {
        let zeros = |t: &Tensor| Tensor::zeros(t.device(), t.shape(), DTYPE);
        let weight = self.weight.as_ref().and_then(Weight::dense);
        Ok(Trained {
            weight: weight.map(zeros).transpose()?.map(Weight::Dense),
            bias: self.bias.as_ref().map(zeros).transpose()?,
            tokens: match &self.tokens {
                None => None,
                Some(tokens) => Some(TokenRows {
                    indices: tokens.indices.clone(),
                    rows: zeros(&tokens.rows)?,
                }),
            },
        })
    }
}

pub(super) fn weight_name(module: &str) -> String {
    super::files::tensor_name(module, "weight")
}

pub(super) fn bias_name(module: &str, adapted: bool) -> String {
    let part = if adapted { "base_layer.bias" } else { "bias" };
    super::files::tensor_name(module, part)
}

pub(super) fn tokens_name(module: &str) -> String {
    super::files::tensor_name(module, "token_adapter.trainable_tokens_delta")
}

impl AdapterConfig {
    /// The modules of which something is trained whole, and what.
    ///
    /// # Errors
    /// Where PEFT would refuse too: a module that has an update, or that two keys claim; and what it would keep twice.
    pub(super) fn trained_parts<'a>(
        &self,
        modules: &'a [Module],
        targets: &[Target],
    ) -> Result<Vec<(&'a Module, Parts)>> {
        let mut all = Vec::new();
        for module in modules {
            let adapted = targets.iter().any(|target| target.module == module.name);
            let parts = Parts {
                weight: self.saves(&module.name),
                bias: module.bias
                    && match self.bias {
                        TrainedBiases::None => self.saves(&module.name),
                        TrainedBiases::All => true,
                        TrainedBiases::LoraOnly => adapted || self.saves(&module.name),
                    },
                tokens: self.trained_tokens(module, modules),
            };
            let refuse = |reason: &str| Err(Error::adapter(format!("`{}` {reason}", module.name)));
            if parts.weight && adapted {
                return refuse("has an update and is in `modules_to_save`; PEFT does one of them");
            }
            if parts.weight && module.kind == ModuleKind::Conv1d {
                return refuse(
                    "is in `modules_to_save`, which is not supported for GPT-2's Conv1D",
                );
            }
            if parts.weight && parts.bias && self.bias == TrainedBiases::All {
                return refuse(
                    "has a bias that `modules_to_save` and `bias` \"all\" both train; PEFT keeps two of it",
                );
            }
            if !parts.tokens.is_empty() {
                if adapted || parts.weight {
                    return refuse(
                        "is in `trainable_token_indices`, and trained or adapted as a whole too; PEFT does one of them",
                    );
                }
                self.check_tokens(module, &parts.tokens)?;
            }
            if parts != Parts::default() {
                all.push((module, parts));
            }
        }
        Ok(all)
    }

    /// Number of values that are trained beside the updates of `targets`.
    ///
    /// # Errors
    /// A module that two keys claim.
    pub fn whole_parameter_count(&self, modules: &[Module], targets: &[Target]) -> Result<usize> {
        let count = |(module, parts): (&Module, Parts)| {
            let shape = module.weight_shape();
            let weight = if parts.weight {
                shape.iter().product()
            } else {
                0
            };
            let bias = if parts.bias { module.out_features } else { 0 };
            let width = shape.last().copied().unwrap_or(0);
            weight + bias + parts.tokens.len() * width
        };
        Ok(self
            .trained_parts(modules, targets)?
            .into_iter()
            .map(count)
            .sum())
    }

    /// Bytes of the weights that training computes anew after each step: a table with the trained rows in it, and, beside
    /// activations of 16 bits, trained weights in their type.
    ///
    /// # Errors
    /// A module that two keys claim.
    pub fn derived_bytes(
        &self,
        modules: &[Module],
        targets: &[Target],
        activations: DType,
    ) -> Result<u64> {
        let parts = self.trained_parts(modules, targets)?;
        let derived = parts.into_iter().filter(|(module, parts)| {
            let is_cast = parts.weight && module.kind != ModuleKind::Norm && activations != DTYPE;
            is_cast || !parts.tokens.is_empty()
        });
        let elements: usize = derived
            .map(|(module, _)| module.weight_shape().iter().product::<usize>())
            .sum();
        Ok((elements * activations.size_in_bytes()) as u64)
    }

    /// Copies of the model's own values, for whatever is trained whole.
    pub(super) fn copy_trained(
        &self,
        modules: &[Module],
        targets: &[Target],
        model: &Model,
    ) -> Result<BTreeMap<String, Trained>> {
        let device = model.device();
        let copy = |(module, parts): (&Module, Parts)| {
            let name = &module.name;
            let missing = || Error::adapter(format!("`{name}` is not in the model"));
            let weight = || -> Result<Tensor> {
                if let Some(norm) = model.norm(name) {
                    return Ok(norm.weight.try_clone()?);
                }
                let values = model.weight(name).ok_or_else(missing)?.to_f32_vec()?;
                Ok(Tensor::from_f32(
                    device,
                    &module.weight_shape()[..],
                    &values,
                )?)
            };
            let bias = || -> Result<Tensor> {
                let bias = model.bias(name).ok_or_else(missing)?;
                Ok(bias.try_clone()?)
            };
            let tokens = || -> Result<TokenRows> {
                let weight = model.weight(name).ok_or_else(missing)?;
                let ids = Tensor::from_u32(device, [parts.tokens.len()], &parts.tokens)?;
                Ok(TokenRows {
                    rows: gather::forward(&weight, &ids)?.cast(DTYPE)?,
                    indices: parts.tokens.clone(),
                })
            };
            let trained = Trained {
                weight: parts.weight.then(weight).transpose()?.map(Weight::Dense),
                bias: parts.bias.then(bias).transpose()?,
                tokens: (!parts.tokens.is_empty()).then(tokens).transpose()?,
            };
            Ok((name.clone(), trained))
        };
        self.trained_parts(modules, targets)?
            .into_iter()
            .map(copy)
            .collect()
    }

    /// Whether `modules_to_save` chooses a module.
    fn saves(&self, module: &str) -> bool {
        self.modules_to_save
            .iter()
            .any(|name| chooses(name, module))
    }

    fn trained_tokens(&self, module: &Module, modules: &[Module]) -> Vec<u32> {
        match &self.trainable_token_indices {
            TrainedTokens::None => Vec::new(),
            TrainedTokens::Embedding(indices) => match token_embedding(modules) {
                Some(embedding) if embedding.name == module.name => indices.clone(),
                _ => Vec::new(),
            },
            TrainedTokens::ByModule(all) => {
                let of = |module: &Module| {
                    all.iter()
                        .find(|(name, _)| module.name.ends_with(name))
                        .map(|(_, indices)| indices.clone())
                };
                let own = of(module).unwrap_or_default();
                // A tied head with the embedding's indices shares the embedding's rows.
                let shared = token_embedding(modules).and_then(of);
                if module.tied && shared.as_ref() == Some(&own) {
                    Vec::new()
                } else {
                    own
                }
            }
        }
    }

    fn check_tokens(&self, module: &Module, indices: &[u32]) -> Result<()> {
        let refuse = |reason: String| {
            Err(Error::adapter(format!(
                "`trainable_token_indices` of `{}`: {reason}",
                module.name
            )))
        };
        let known = match module.kind {
            ModuleKind::Embedding => module.in_features,
            _ if module.name == OUTPUT_HEAD => module.out_features,
            _ => return refuse("it is no embedding and not the output head".into()),
        };
        for (position, index) in indices.iter().enumerate() {
            if *index as usize >= known {
                return refuse(format!("there are {known} tokens, so none is {index}"));
            }
            if indices[..position].contains(index) {
                return refuse(format!("{index} stands in it twice"));
            }
        }
        Ok(())
    }

    /// Fails where an entry fits no module: it would silently do nothing.
    pub(super) fn check_trained(&self, modules: &[Module], targets: &[Target]) -> Result<()> {
        let unfit = |key: &str, name: &str| {
            Err(Error::adapter(format!("`{key}` \"{name}\" fits no module")))
        };
        for name in &self.modules_to_save {
            if !modules.iter().any(|module| chooses(name, &module.name)) {
                return unfit("modules_to_save", name);
            }
        }
        if let TrainedTokens::ByModule(all) = &self.trainable_token_indices {
            for (name, _) in all {
                if !modules.iter().any(|module| module.name.ends_with(name)) {
                    return unfit("trainable_token_indices", name);
                }
            }
        }
        let parts = self.trained_parts(modules, targets)?;
        if self.bias != TrainedBiases::None && !parts.iter().any(|(_, parts)| parts.bias) {
            return Err(Error::adapter(format!(
                "`bias` \"{}\" finds no bias to train in this model; leave it at \"none\"",
                self.bias.name()
            )));
        }
        Ok(())
    }

    /// Whether PEFT saves the frozen tables of embedding and head too, `save_embedding_layers="auto"`: where one of
    /// the names `embed_tokens` and `lm_head` is targeted.
    pub(super) fn saves_embeddings(&self, modules: &[Module]) -> Result<bool> {
        if self.trainable_token_indices != TrainedTokens::None {
            return Ok(false);
        }
        let known = ["embed_tokens", OUTPUT_HEAD];
        Ok(match &self.target_modules {
            super::ModuleSelector::AllLinear => false,
            super::ModuleSelector::Names(names) => {
                names.iter().any(|name| known.contains(&&name[..]))
            }
            super::ModuleSelector::Regex(pattern) => {
                let regex = super::target::full_regex("target_modules", pattern)?;
                modules.iter().any(|module| {
                    let last = module.name.rsplit('.').next();
                    last.is_some_and(|last| known.contains(&last)) && regex.is_match(&module.name)
                })
            }
        })
    }
}

/// Whether an entry of `modules_to_save` chooses a module: the end of its path, or of the path of one that holds it.
fn chooses(name: &str, module: &str) -> bool {
    let holders = module.match_indices('.').map(|(end, _)| &module[..end]);
    holders.chain([module]).any(|path| path.ends_with(name))
}

/// The first of the embeddings, that of the tokens.
pub(super) fn token_embedding(modules: &[Module]) -> Option<&Module> {
    modules
        .iter()
        .find(|module| module.kind == ModuleKind::Embedding)
}
