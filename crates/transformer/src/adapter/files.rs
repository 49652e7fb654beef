//! An adapter's folder.

use std::{collections::BTreeMap, fs, path::Path, sync::Arc};

use fuselora_tensor::{Device, Tensor, Weight};

use super::trained::{self, Parts, TokenRows, Trained};
use super::{
    Adapter, AdapterConfig, DTYPE, InitLoraWeights, Initial, LoraWeights, Module, ModuleKind,
};
use crate::{
    atomic_file,
    checkpoint::{StoredTensor, TensorSpec, read_json, safetensors, write_json, write_safetensors},
    error::{Error, Result},
    families::OUTPUT_HEAD,
};

pub(super) const CONFIG: &str = "adapter_config.json";
pub(super) const WEIGHTS: &str = "adapter_model.safetensors";
/// Beside an adapter to be trained on: what it was at first, as PEFT's `path_initial_model_for_weight_conversion` is.
const INITIAL: &str = "initial";

pub(super) const MAGNITUDE: &str = "lora_magnitude_vector";
pub(super) const BIAS: &str = "lora_B.bias";
/// The frozen table of an embedding or a head, which PEFT saves beside its update.
const BASE: &str = "base_layer.weight";

/// What PEFT names A and B.
pub(super) fn pair(embedding: bool) -> [&'static str; 2] {
    if embedding {
        ["lora_embedding_A", "lora_embedding_B"]
    } else {
        ["lora_A.weight", "lora_B.weight"]
    }
}

impl AdapterConfig {
    /// Reads `adapter_config.json` of an adapter's folder.
    ///
    /// # Errors
    /// When there is none, or as [`AdapterConfig::from_json`].
    pub fn read(folder: &Path) -> Result<AdapterConfig> {
        if !folder.is_dir() {
            return Err(Error::file(
                folder,
                "is no folder; give one with adapter_config.json and adapter_model.safetensors",
            ));
        }
        let path = folder.join(CONFIG);
        if !path.is_file() {
            return Err(Error::file(
                folder,
                "holds no adapter_config.json: it is no LoRA adapter",
            ));
        }
        AdapterConfig::from_json(&read_json(&path)?)
            .map_err(|error| Error::file(path, error.to_string()))
    }
}

impl Adapter {
    /// Reads an adapter for a model with these modules, from the folder that PEFT or [`Adapter::write`] wrote.
    ///
    /// # Errors
    /// When a file is missing or corrupt, or a tensor is missing, misshapen, or belongs to no adapted module.
    pub fn read(folder: &Path, modules: &[Module], device: &Device) -> Result<Adapter> {
        let config = AdapterConfig::read(folder)?;
        let targets = config
            .targets(modules)
            .map_err(|error| Error::file(folder.join(CONFIG), error.to_string()))?;
        config.check_init(&targets)?;
        let path = folder.join(WEIGHTS);
        if !path.is_file() {
            let bin = if folder.join("adapter_model.bin").exists() {
                "; its adapter_model.bin is a format that can run code: save it as safetensors first"
            } else {
                ""
            };
            return Err(Error::file(folder, format!("holds no {WEIGHTS}{bin}")));
        }
        let mut stored = Stored {
            tensors: safetensors::read(&path)?,
            path: &path,
            device,
        };
        let initial_path = folder.join(INITIAL).join(WEIGHTS);
        let has_initial = config.init_lora_weights.subtracts() && initial_path.is_file();
        let mut at_first = has_initial
            .then(|| safetensors::read(&initial_path))
            .transpose()?
            .map(|tensors| Stored {
                tensors,
                path: &initial_path,
                device,
            });
        let saves_embeddings = config.saves_embeddings(modules)?;
        let mut updates = BTreeMap::new();
        for target in &targets {
            let module = &target.module;
            let embedding = target.kind == ModuleKind::Embedding;
            let [a, b] = pair(embedding).map(|part| tensor_name(module, part));
            let mut vector = |part: &str, asked: bool| {
                let name = tensor_name(module, part);
                let take = || stored.take(&name, &[target.out_features]);
                asked.then(take).transpose()
            };
            let magnitude = vector(MAGNITUDE, config.use_dora)?;
            let bias = vector(BIAS, config.lora_bias)?;
            let base = if saves_embeddings && super::is_vocabulary(modules, module) {
                let shape = if embedding {
                    [target.in_features, target.out_features]
                } else {
                    [target.out_features, target.in_features]
                };
                stored.take_as_stored(&tensor_name(module, BASE), &shape)?
            } else {
                None
            };
            let (a_shape, b_shape) = (
                [target.rank, target.in_features],
                [target.out_features, target.rank],
            );
            let initial = at_first.as_mut().map(|stored| {
                Ok::<_, Error>(Initial {
                    a: stored.take(&a, &a_shape)?,
                    b: stored.take(&b, &b_shape)?,
                })
            });
            let lora = LoraWeights {
                a: stored.take(&a, &a_shape)?,
                b: stored.take(&b, &b_shape)?,
                scaling: target.scaling,
                rank: target.rank,
                magnitude,
                bias,
                embedding,
                base: base.map(Weight::Dense).map(Arc::new),
                initial: initial.transpose()?,
            };
            updates.insert(module.clone(), lora);
        }
        let trained = config
            .trained_parts(modules, &targets)?
            .into_iter()
            .map(|(module, parts)| {
                let adapted = updates.contains_key(&module.name);
                Ok((module.name.clone(), stored.trained(module, parts, adapted)?))
            })
            .collect::<Result<_>>()?;
        if let Some(name) = stored.tensors.keys().next() {
            let fitting = targets.first().map(|target| {
                let [a, _] = pair(target.kind == ModuleKind::Embedding);
                tensor_name(&target.module, a)
            });
            let message = format!(
                "belongs to no module that the base model has and adapter_config.json adapts; a name such as {} would",
                fitting.unwrap_or_default()
            );
            return Err(Error::stored_tensor(&path, name, message));
        }
        Ok(Adapter {
            config,
            modules: updates,
            trained,
        })
    }

    /// Writes the adapter as PEFT does, into `folder`. An adapter that is there already is replaced as a
    /// whole; other files stay.
    ///
    /// # Errors
    /// When a file cannot be written; what was there before is then untouched.
    pub fn write(&self, folder: &Path) -> Result<()> {
        let updates = self.modules.iter();
        let updates = updates.map(|(module, lora)| (module.as_str(), lora));
        let trained = self.trained.iter();
        let trained = trained.map(|(module, trained)| (module.as_str(), trained));
        write(folder, &self.config, Form::Use, updates, trained)
    }
}

/// The tensors of an adapter's file that are not taken yet.
struct Stored<'a> {
    tensors: BTreeMap<String, StoredTensor>,
    path: &'a Path,
    device: &'a Device,
}

impl Stored<'_> {
    /// A tensor that must be there, as f32.
    fn take(&mut self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let tensor = self.remove(name, shape)?.ok_or_else(|| {
            let message = format!(
                "is missing; the base model and adapter_config.json want it with shape {shape:?}"
            );
            Error::stored_tensor(self.path, name, message)
        })?;
        tensor.load_owned(name, self.device, DTYPE)
    }

    /// A tensor that need not be there, in the type that it has.
    fn take_as_stored(&mut self, name: &str, shape: &[usize]) -> Result<Option<Tensor>> {
        let tensor = self.remove(name, shape)?;
        let load = |tensor: StoredTensor| {
            let dtype = tensor.info().dtype.float_dtype();
            tensor.load_owned(name, self.device, dtype)
        };
        tensor.map(load).transpose()
    }

    fn remove(&mut self, name: &str, shape: &[usize]) -> Result<Option<StoredTensor>> {
        let tensor = self.tensors.remove(name);
        match &tensor {
            Some(tensor) if tensor.info().shape != shape => {
                let message = format!(
                    "has shape {:?}; the base model and adapter_config.json want {shape:?}",
                    tensor.info().shape
                );
                Err(Error::stored_tensor(self.path, name, message))
            }
            _ => Ok(tensor),
        }
    }

    /// What is trained whole of a module.
    fn trained(&mut self, module: &Module, parts: Parts, adapted: bool) -> Result<Trained> {
        let name = &module.name;
        let shape = module.weight_shape();
        let mut trained = Trained::default();
        if parts.weight {
            let weight = self.take(&trained::weight_name(name), &shape)?;
            trained.weight = Some(Weight::Dense(weight));
        }
        if parts.bias {
            let bias = self.take(&trained::bias_name(name, adapted), &[module.out_features])?;
            trained.bias = Some(bias);
        }
        if !parts.tokens.is_empty() {
            let shape = [parts.tokens.len(), shape[1]];
            trained.tokens = Some(TokenRows {
                rows: self.take(&trained::tokens_name(name), &shape)?,
                indices: parts.tokens,
            });
        }
        Ok(trained)
    }
}

/// What a written adapter is for, which makes a difference where its initialisation left another base.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// To be used: a plain update of the model as it is.
    Use,
    /// To be trained on: what is trained, and in a folder beside it what it was at first.
    Training,
}

/// Writes an adapter of these updates and parameters; see [`Adapter::write`].
pub(crate) fn write<'a>(
    folder: &Path,
    config: &AdapterConfig,
    form: Form,
    updates: impl Iterator<Item = (&'a str, &'a LoraWeights)>,
    trained: impl Iterator<Item = (&'a str, &'a Trained)>,
) -> Result<()> {
    let updates: Vec<_> = updates.collect();
    let mut tensors = BTreeMap::new();
    let mut initial = BTreeMap::new();
    let mut joined = BTreeMap::new();
    for &(module, lora) in &updates {
        tensors.extend(lora.named_tensors(module));
        let base = lora.base.as_ref().and_then(|base| base.dense());
        if let Some(base) = base
            && (lora.embedding || module == OUTPUT_HEAD)
        {
            tensors.insert(tensor_name(module, BASE), base);
        }
        let names = pair(lora.embedding).map(|part| tensor_name(module, part));
        match &lora.initial {
            Some(Initial { a, b }) if form == Form::Training => {
                initial.extend(names.into_iter().zip([a, b]));
            }
            _ => joined.extend(
                lora.joined()?
                    .into_iter()
                    .flat_map(|pair| names.clone().into_iter().zip(pair)),
            ),
        }
    }
    for (module, trained) in trained {
        let adapted = updates.iter().any(|(adapted, _)| *adapted == module);
        tensors.extend(trained.named_tensors(module, adapted));
    }
    let config = if joined.is_empty() {
        config.clone()
    } else {
        config.joined()
    };
    tensors.extend(joined.iter().map(|(name, tensor)| (name.clone(), tensor)));
    atomic_file::write_folder(
        folder,
        |name| name == CONFIG || name == WEIGHTS,
        |folder| {
            write_files(folder, &config, &tensors)?;
            if initial.is_empty() {
                return Ok(());
            }
            let folder = folder.join(INITIAL);
            fs::create_dir(&folder).map_err(|error| Error::io(&folder, error))?;
            let mut config = config.clone();
            config.init_lora_weights = InitLoraWeights::KaimingUniform;
            write_files(&folder, &config, &initial)
        },
    )
}

fn write_files(
    folder: &Path,
    config: &AdapterConfig,
    tensors: &BTreeMap<String, &Tensor>,
) -> Result<()> {
    let specs: Vec<TensorSpec> = tensors
        .iter()
        .map(|(name, tensor)| TensorSpec {
            name: name.clone(),
            shape: tensor.shape().to_vec(),
            dtype: tensor.dtype(),
        })
        .collect();
    write_json(&folder.join(CONFIG), &config.to_json())?;
    write_safetensors(&folder.join(WEIGHTS), &specs, |spec| {
        Ok(tensors[&spec.name].to_bytes()?)
    })
}

/// PEFT's name of a tensor: the path of the module inside the wrapped model.
pub(super) fn tensor_name(module: &str, part: &str) -> String {
    format!("base_model.model.{module}.{part}")
}
