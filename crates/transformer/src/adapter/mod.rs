//! LoRA adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

mod combine;
mod config;
mod diff;
mod exchange;
mod files;
mod init;
mod residual;
mod summary;
mod target;
mod trained;

use std::collections::BTreeMap;
use std::sync::Arc;

use fuselora_tensor::ops::dora;
use fuselora_tensor::{DType, Device, Tensor, Weight};
use rayon::prelude::*;

pub(crate) use files::{Form, write};

pub use combine::{Combination, combine};
pub use config::{AdapterConfig, InitLoraWeights, ModuleSelector, TrainedBiases, TrainedTokens};
pub use diff::{ModuleDifference, diff};
pub use exchange::{AdaptedModel, AdapterFormat};
pub use residual::Initial;
pub use summary::AdapterSummary;
pub use target::{Module, ModuleKind, Target};
pub use trained::{TokenRows, Trained};

use crate::error::{Error, Result};
use crate::families::OUTPUT_HEAD;
use crate::model::Model;

/// A LoRA adapter: for each adapted module, a low-rank update of its weight; and what is trained whole.
pub struct Adapter {
    /// How it was made.
    pub config: AdapterConfig,
    /// The update of each module, by the module's path, such as `model.layers.0.self_attn.q_proj`.
    pub modules: BTreeMap<String, LoraWeights>,
    /// What stands in place of modules' own parameters, by the same paths.
    pub trained: BTreeMap<String, Trained>,
}

/// The low-rank update `scaling * B * A` of one module's weight `[out_features, in_features]`; of an embedding's
/// transposed table.
pub struct LoraWeights {
    /// `lora_A`, `[rank, in_features]`, f32.
    pub a: Tensor,
    /// `lora_B`, `[out_features, rank]`, f32.
    pub b: Tensor,
    /// `alpha / rank`, or `alpha / sqrt(rank)` for rsLoRA.
    pub scaling: f32,
    /// Columns of B, rows of A.
    pub rank: usize,
    /// DoRA's `lora_magnitude_vector`, `[out_features]`, f32.
    pub magnitude: Option<Tensor>,
    /// The bias of `lora_B`, `[out_features]`, f32; scaled as the update is.
    pub bias: Option<Tensor>,
    /// Whether the module is an embedding, of which PEFT names the tensors otherwise.
    pub embedding: bool,
    /// The frozen weight that the update is added to, where it need not be the model's own.
    pub base: Option<Arc<Weight>>,
    /// The update as it was at first, where that base is the model's weight without it.
    pub initial: Option<Initial>,
}

impl LoraWeights {
    /// Every tensor, in a fixed order.
    pub fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        let vectors = self.magnitude.iter().chain(&self.bias);
        [&self.a, &self.b].into_iter().chain(vectors)
    }

    /// The same, to change.
    pub fn tensors_mut(&mut self) -> impl Iterator<Item = &mut Tensor> {
        let vectors = self.magnitude.iter_mut().chain(&mut self.bias);
        [&mut self.a, &mut self.b].into_iter().chain(vectors)
    }

    /// Every tensor with its name in PEFT's file, for the module at this path.
    pub fn named_tensors(&self, module: &str) -> impl Iterator<Item = (String, &Tensor)> {
        let [a, b] = files::pair(self.embedding);
        let vectors = [
            self.magnitude.is_some().then_some(files::MAGNITUDE),
            self.bias.is_some().then_some(files::BIAS),
        ];
        let parts = [a, b].into_iter().chain(vectors.into_iter().flatten());
        let names: Vec<String> = parts.map(|part| files::tensor_name(module, part)).collect();
        names.into_iter().zip(self.tensors())
    }

    /// Zeros in the same shapes.
    pub(crate) fn zeros(&self) -> Result<LoraWeights> {
        let zeros = |t: &Tensor| Tensor::zeros(t.device(), t.shape(), DTYPE);
        Ok(LoraWeights {
            a: zeros(&self.a)?,
            b: zeros(&self.b)?,
            magnitude: self.magnitude.as_ref().map(zeros).transpose()?,
            bias: self.bias.as_ref().map(zeros).transpose()?,
            base: None,
            initial: None,
            ..*self
        })
    }
}

impl Adapter {
    /// A fresh adapter on a model with these modules, initialised as the configuration says.
    ///
    /// Each module draws from a random stream of its own, so its values depend on `seed` and its name alone.
    /// `model` gives what starts from its weights: DoRA's magnitudes, and whatever is trained whole.
    ///
    /// # Errors
    /// When a target matches no module, a weight that is needed is not there, or the device has no room or no
    /// kernels for the adapter.
    pub fn new(
        config: AdapterConfig,
        modules: &[Module],
        device: &Device,
        seed: u64,
        model: Option<&Model>,
    ) -> Result<Adapter> {
        let targets = config.resolve(modules)?;
        config.check_init(&targets)?;
        let weight = |module: &str| {
            model.and_then(|model| model.weight(module)).ok_or_else(|| {
                Error::adapter(format!(
                    "the weight of `{module}` is needed, and is not there"
                ))
            })
        };
        let saves_embeddings = config.saves_embeddings(modules)?;
        let init = config.init_lora_weights;
        let update = |target: &Target| -> Result<(String, LoraWeights)> {
            let module = &target.module;
            let (a, b) = if init.replaces_base() {
                let (a, b) = residual::fresh(init, target, &*weight(module)?, seed)?;
                (a.to_device(device)?, b.to_device(device)?)
            } else {
                let (a, b) = init::weights(init, target, seed);
                (
                    Tensor::from_f32(device, [target.rank, target.in_features], &a)?,
                    Tensor::from_f32(device, [target.out_features, target.rank], &b)?,
                )
            };
            let saved = saves_embeddings && is_vocabulary(modules, module);
            let mut lora = LoraWeights {
                a,
                b,
                scaling: target.scaling,
                rank: target.rank,
                magnitude: None,
                bias: config
                    .lora_bias
                    .then(|| Tensor::zeros(device, [target.out_features], DTYPE))
                    .transpose()?,
                embedding: target.kind == ModuleKind::Embedding,
                base: saved.then(|| weight(module)).transpose()?,
                initial: None,
            };
            if init.replaces_base() {
                if init.subtracts() {
                    lora.initial = Some(Initial {
                        a: lora.a.try_clone()?,
                        b: lora.b.try_clone()?,
                    });
                }
                let (base, _) = lora.base_of(init, module, &*weight(module)?)?;
                lora.base = Some(Arc::new(base));
            }
            if config.use_dora {
                let model = weight(module)?;
                let weight = lora.base.as_deref().unwrap_or(&model);
                let norm = dora::weight_norm(weight, &lora.a, &lora.b, lora.scaling)?;
                lora.magnitude = Some(norm);
            }
            Ok((module.clone(), lora))
        };
        // Decompositions take their time, and are independent of each other.
        let updates = targets.par_iter().map(update).collect::<Result<_>>()?;
        let trained = match model {
            Some(model) => config.copy_trained(modules, &targets, model)?,
            None => BTreeMap::new(),
        };
        Ok(Adapter {
            config,
            modules: updates,
            trained,
        })
    }

    /// Where its tensors are.
    pub(crate) fn device(&self) -> Device {
        let updates = self.modules.values().flat_map(LoraWeights::tensors);
        let trained = self.trained.values().flat_map(Trained::tensors);
        updates
            .chain(trained)
            .next()
            .map_or_else(Device::cpu, |t| t.device().clone())
    }

    /// The number of trainable values.
    pub fn parameter_count(&self) -> usize {
        let updates = self.modules.values().flat_map(LoraWeights::tensors);
        let trained = self.trained.values().flat_map(Trained::tensors);
        updates.chain(trained).map(Tensor::element_count).sum()
    }

    /// Fails for what is more than a low-rank update of the model as it is; `purpose` is what it cannot do.
    fn check_plain(&self, purpose: &str) -> Result<()> {
        if self.config.use_dora {
            return Err(Error::adapter(format!(
                "an adapter with DoRA cannot {purpose}"
            )));
        }
        self.check_updates_only(purpose)
    }

    /// [`Adapter::check_plain`], which DoRA passes.
    fn check_updates_only(&self, purpose: &str) -> Result<()> {
        let config = &self.config;
        let kinds = [
            (config.bias != TrainedBiases::None, "`bias`"),
            (config.lora_bias, "`lora_bias`"),
            (!config.modules_to_save.is_empty(), "`modules_to_save`"),
            (
                config.trainable_token_indices != TrainedTokens::None,
                "`trainable_token_indices`",
            ),
            (
                config.init_lora_weights.replaces_base(),
                "a base of its own (pissa, olora or loftq)",
            ),
        ];
        match kinds.iter().find(|(has, _)| *has) {
            Some((_, kind)) => Err(Error::adapter(format!(
                "an adapter with {kind} cannot {purpose}"
            ))),
            None => Ok(()),
        }
    }
}

/// Whether a module is the token embedding or the output head.
fn is_vocabulary(modules: &[Module], name: &str) -> bool {
    let embedding = trained::token_embedding(modules);
    name == OUTPUT_HEAD || embedding.is_some_and(|module| module.name == name)
}

/// The data type of adapters in files, and here.
const DTYPE: DType = DType::F32;
