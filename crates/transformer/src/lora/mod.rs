//! What an adapter puts into a model, by module, and its gradients.

mod pass;

use std::path::Path;
use std::sync::OnceLock;

use fuselora_tensor::ops::lora_linear;
use fuselora_tensor::{DType, Purpose, Tensor, Weight};

use crate::adapter::{Adapter, AdapterConfig, Form, LoraWeights, Trained};
use crate::error::{Error, Result};
use crate::model::Model;

use pass::Direction;
pub(crate) use pass::with_rows;
pub use pass::{AdapterRows, DropoutSeed, Pass};

/// An adapter bound to a model: one slot per module, in the order of [`crate::model::Model::modules`].
///
/// The frozen model never changes; another adapter is another `Lora` passed to the same model.
pub struct Lora {
    config: AdapterConfig,
    slots: Vec<Slot>,
    /// Of the model.
    activations: DType,
}

/// What an adapter has for one module.
struct Slot {
    module: String,
    lora: Option<LoraWeights>,
    trained: Trained,
    /// The module whose token rows this one has too: a head that shares its table with the embedding.
    shares_tokens_of: Option<usize>,
    derived: Derived,
}

impl Slot {
    /// The weight that the adapter has in place of the model's, trained or frozen.
    fn own_weight(&self) -> Option<&Weight> {
        let base = || self.lora.as_ref()?.base.as_deref();
        self.trained.weight.as_ref().or_else(base)
    }

    /// Whether passes on a CUDA device need that weight in another type, that of the activations.
    fn is_cast(&self, activations: DType) -> bool {
        let dense = self.own_weight().and_then(Weight::dense);
        dense.is_some_and(|own| !own.device().is_cpu() && own.dtype() != activations)
    }
}

/// Computed from the weights when a pass first needs it, and again after they change.
#[derive(Default)]
struct Derived {
    direction: OnceLock<Direction>,
    /// The bias of the module and that of `lora_B` in one.
    bias: OnceLock<Tensor>,
    /// The frozen weight with the trained rows in it, or a trained one, as a pass multiplies with it.
    weight: OnceLock<Weight>,
    /// Aᵀ and Bᵀ, for a few tokens in a batch of several adapters on the CPU.
    transposed: OnceLock<[Tensor; 2]>,
}

/// That the model's device takes every rank.
fn check_ranks(adapter: &Adapter, model: &Model) -> Result<()> {
    let largest = lora_linear::LARGEST_CUDA_RANK;
    let mut updates = adapter.modules.iter();
    match updates.find(|(_, update)| update.rank > largest) {
        Some((module, update)) if !model.device().is_cpu() => Err(Error::Adapter(format!(
            "`{module}` has rank {}, and {} takes ranks up to {largest}: lower it, or use the CPU",
            update.rank,
            model.device(),
        ))),
        _ => Ok(()),
    }
}

impl Lora {
    /// Binds an adapter to a model.
    ///
    /// # Errors
    /// When the adapter has a module that the model has not, a rank is higher than the model's device takes, or its
    /// initialisation needs another weight than it finds.
    pub fn bind(mut adapter: Adapter, model: &Model) -> Result<Lora> {
        let modules = model.modules();
        check_ranks(&adapter, model)?;
        adapter.leave_bases(model)?;
        let mut slots: Vec<Slot> = modules
            .iter()
            .map(|module| Slot {
                module: module.name.clone(),
                lora: adapter.modules.remove(&module.name),
                trained: adapter.trained.remove(&module.name).unwrap_or_default(),
                shares_tokens_of: None,
                derived: Derived::default(),
            })
            .collect();
        let unknown = adapter.modules.keys().chain(adapter.trained.keys()).next();
        if let Some(module) = unknown {
            return Err(Error::Adapter(format!(
                "the model has no module `{module}`"
            )));
        }
        let embedding = slots.iter().position(|slot| slot.trained.tokens.is_some());
        for (slot, module) in slots.iter_mut().zip(modules) {
            if module.tied && slot.trained.tokens.is_none() {
                slot.shares_tokens_of = embedding;
            }
        }
        Ok(Lora {
            config: adapter.config,
            slots,
            activations: model.activations(),
        })
    }

    /// Writes the adapter as PEFT does, for use, replacing the one in `folder` as a whole. Where its initialisation took
    /// a part of the base, it is written as an update of the model as it is, of twice the rank.
    ///
    /// # Errors
    /// When a file cannot be written; what was there before is then untouched.
    pub fn write(&self, folder: &Path) -> Result<()> {
        self.write_as(folder, Form::Use)
    }

    /// Writes the adapter so that training can go on with it: what is trained, and in `initial/` what the base is
    /// without.
    ///
    /// # Errors
    /// As [`Lora::write`].
    pub fn write_for_training(&self, folder: &Path) -> Result<()> {
        self.write_as(folder, Form::Training)
    }

    fn write_as(&self, folder: &Path, form: Form) -> Result<()> {
        let updates = self
            .slots
            .iter()
            .filter_map(|slot| Some((slot.module.as_str(), slot.lora.as_ref()?)));
        let trained = self
            .slots
            .iter()
            .map(|slot| (slot.module.as_str(), &slot.trained));
        crate::adapter::write(folder, &self.config, form, updates, trained)
    }

    /// PEFT's configuration.
    pub fn config(&self) -> &AdapterConfig {
        &self.config
    }

    /// The low-rank update of module `index`.
    pub fn pair(&self, index: usize) -> Option<&LoraWeights> {
        self.slots.get(index)?.lora.as_ref()
    }

    /// Whether anything of module `index` is trained.
    pub(crate) fn trains(&self, index: usize) -> bool {
        self.slots
            .get(index)
            .is_some_and(|slot| slot.lora.is_some() || slot.trained.tensors().next().is_some())
    }

    /// Whether some tokens of a batch can have this adapter while others have another: as in PEFT, an adapter of plain
    /// low-rank updates of the blocks' projections.
    ///
    /// # Errors
    /// What else the adapter has, by module.
    pub fn check_mixed(&self, model: &Model) -> Result<()> {
        let blocks: Vec<usize> = model.block_linears().map(|linear| linear.index).collect();
        for (index, slot) in self.slots.iter().enumerate() {
            let Slot {
                module,
                lora,
                trained,
                ..
            } = slot;
            let refuse = |what: &str| {
                Err(Error::Adapter(format!(
                    "{what} of `{module}` cannot be in a batch with other adapters: use this adapter by itself"
                )))
            };
            if trained.tensors().next().is_some() {
                return refuse("what is trained whole");
            }
            let Some(lora) = lora else { continue };
            if lora.magnitude.is_some() {
                return refuse("DoRA's magnitudes");
            }
            if lora.bias.is_some() {
                return refuse("the bias of lora_B");
            }
            if !blocks.contains(&index) {
                return refuse("an update");
            }
            if lora.base.is_some() {
                return refuse("a base of its own");
            }
        }
        Ok(())
    }

    /// Whether passes keep what they compute from the parameters for the passes that follow, until the parameters
    /// change: the norms of DoRA, the bias of `lora_B` with the module's own, a table with trained rows, weights of the
    /// adapter's own in the type of the activations.
    pub fn derives(&self) -> bool {
        self.slots.iter().any(|slot| {
            let of_update = |lora: &LoraWeights| lora.magnitude.is_some() || lora.bias.is_some();
            slot.lora.as_ref().is_some_and(of_update)
                || slot.trained.tokens.is_some()
                || slot.is_cast(self.activations)
        })
    }

    /// Number of modules with a low-rank update.
    pub fn module_count(&self) -> usize {
        self.slots.iter().filter(|slot| slot.lora.is_some()).count()
    }

    /// Every trained tensor by PEFT's name, module by module in the model's order.
    pub fn parameters(&self) -> impl Iterator<Item = (String, &Tensor)> {
        self.slots.iter().flat_map(|slot| {
            let module = &slot.module;
            let lora = slot.lora.iter().flat_map(|lora| lora.named_tensors(module));
            lora.chain(slot.trained.named_tensors(module, slot.lora.is_some()))
        })
    }

    /// Every trained tensor, to be updated by an optimizer, in the order of [`Lora::parameters`].
    pub fn parameters_mut(&mut self) -> impl Iterator<Item = &mut Tensor> {
        self.slots.iter_mut().flat_map(|slot| {
            slot.derived = Derived::default();
            let lora = slot.lora.iter_mut().flat_map(LoraWeights::tensors_mut);
            lora.chain(slot.trained.tensors_mut())
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
    slots: Vec<SlotGradients>,
}

/// Gradients of one slot.
struct SlotGradients {
    lora: Option<LoraWeights>,
    trained: Trained,
}

impl LoraGradients {
    /// Zeros in the shapes of `lora`.
    pub fn zeros(lora: &Lora) -> Result<LoraGradients> {
        let device = lora.parameters().next().map(|(_, t)| t.device().clone());
        let _holding = device.map(|device| device.hold(Purpose::Adapter));
        let zeros = |slot: &Slot| {
            Ok(SlotGradients {
                lora: slot.lora.as_ref().map(LoraWeights::zeros).transpose()?,
                trained: slot.trained.zeros()?,
            })
        };
        let slots = lora.slots.iter().map(zeros).collect::<Result<_>>()?;
        Ok(LoraGradients { slots })
    }

    /// Back to zero for the next optimizer step.
    pub fn clear(&mut self) -> Result<()> {
        for SlotGradients { lora, trained } in &mut self.slots {
            let lora = lora.iter_mut().flat_map(LoraWeights::tensors_mut);
            for tensor in lora.chain(trained.tensors_mut()) {
                tensor.fill_zero()?;
            }
        }
        Ok(())
    }

    /// Every gradient, in the order of [`Lora::parameters`].
    pub fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        self.slots
            .iter()
            .flat_map(|SlotGradients { lora, trained }| {
                let lora = lora.iter().flat_map(LoraWeights::tensors);
                lora.chain(trained.tensors())
            })
    }

    /// Takes the gradients of one module's update out while its backward pass adds to them.
    pub(crate) fn take(&mut self, index: usize) -> Option<LoraWeights> {
        self.slots.get_mut(index)?.lora.take()
    }

    pub(crate) fn put(&mut self, index: usize, gradient: Option<LoraWeights>) {
        if let Some(slot) = self.slots.get_mut(index) {
            slot.lora = gradient;
        }
    }

    /// The gradients of one module's update, to add to.
    pub(crate) fn update(&mut self, index: usize) -> Option<&mut LoraWeights> {
        self.slots.get_mut(index)?.lora.as_mut()
    }

    /// The gradients of what is trained whole of one module, to add to.
    pub(crate) fn trained(&mut self, index: usize) -> Option<&mut Trained> {
        Some(&mut self.slots.get_mut(index)?.trained)
    }
}
