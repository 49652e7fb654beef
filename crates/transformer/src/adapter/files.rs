//! An adapter's folder.

use std::{collections::BTreeMap, path::Path};

use fuselora_tensor::Device;

use super::{Adapter, AdapterConfig, DTYPE, LinearModule, LoraWeights};
use crate::{
    atomic_file,
    checkpoint::{TensorSpec, read_json, safetensors, write_json, write_safetensors},
    error::{Error, Result},
};

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";

const A: &str = "lora_A.weight";
const B: &str = "lora_B.weight";
const MAGNITUDE: &str = "lora_magnitude_vector";
/// What PEFT names the tensors of [`LoraWeights::tensors`].
pub(super) const PARTS: [&str; 3] = [A, B, MAGNITUDE];

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
    /// Reads an adapter for a model with these linear modules, from the folder that PEFT or [`Adapter::write`] wrote.
    ///
    /// # Errors
    /// When a file is missing or corrupt, or a tensor is missing, misshapen, or belongs to no adapted module.
    pub fn read(folder: &Path, linear: &[LinearModule], device: &Device) -> Result<Adapter> {
        let config = AdapterConfig::read(folder)?;
        super::check_device(&config, device)?;
        let path = folder.join(WEIGHTS);
        if !path.is_file() {
            let bin = if folder.join("adapter_model.bin").exists() {
                "; its adapter_model.bin is a format that can run code: save it as safetensors first"
            } else {
                ""
            };
            return Err(Error::file(folder, format!("holds no {WEIGHTS}{bin}")));
        }
        let mut stored = safetensors::read(&path)?;
        let mut modules = BTreeMap::new();
        let targets = config
            .targets(linear)
            .map_err(|error| Error::file(folder.join(CONFIG), error.to_string()))?;
        for target in &targets {
            let mut take = |part: &str, shape: &[usize]| {
                let name = tensor_name(&target.module, part);
                let bad = |message: String| Error::stored_tensor(&path, &name, message);
                let tensor = stored
                    .remove(&name)
                    .ok_or_else(|| bad(format!("is missing; the base model and adapter_config.json want it with shape {shape:?}")))?;
                if tensor.info().shape != shape {
                    return Err(bad(format!(
                        "has shape {:?}; the base model and adapter_config.json want {shape:?}",
                        tensor.info().shape
                    )));
                }
                tensor.load_owned(&name, device, DTYPE)
            };
            let lora = LoraWeights {
                a: take(A, &[target.rank, target.in_features])?,
                b: take(B, &[target.out_features, target.rank])?,
                scaling: target.scaling,
                rank: target.rank,
                magnitude: if config.use_dora {
                    Some(take(MAGNITUDE, &[target.out_features])?)
                } else {
                    None
                },
            };
            modules.insert(target.module.clone(), lora);
        }
        if let Some(name) = stored.keys().next() {
            let fitting = targets
                .first()
                .map(|target| tensor_name(&target.module, A))
                .unwrap_or_default();
            let message = format!(
                "belongs to no module that the base model has and adapter_config.json adapts; a name such as {fitting} would"
            );
            return Err(Error::stored_tensor(path, name, message));
        }
        Ok(Adapter { config, modules })
    }

    /// Writes the adapter as PEFT does, into `folder`. An adapter that is there already is replaced as a
    /// whole; other files stay.
    ///
    /// # Errors
    /// When a file cannot be written; what was there before is then untouched.
    pub fn write(&self, folder: &Path) -> Result<()> {
        let modules = self
            .modules
            .iter()
            .map(|(module, lora)| (module.as_str(), lora));
        write(folder, &self.config, modules)
    }
}

/// Writes an adapter of these modules; see [`Adapter::write`].
pub(crate) fn write<'a>(
    folder: &Path,
    config: &AdapterConfig,
    modules: impl Iterator<Item = (&'a str, &'a LoraWeights)>,
) -> Result<()> {
    let mut tensors = BTreeMap::new();
    for (module, lora) in modules {
        tensors.extend(lora.named_tensors(module));
    }
    let specs: Vec<TensorSpec> = tensors
        .iter()
        .map(|(name, tensor)| TensorSpec {
            name: name.clone(),
            shape: tensor.shape().to_vec(),
            dtype: DTYPE,
        })
        .collect();
    atomic_file::write_folder(
        folder,
        |name| name == CONFIG || name == WEIGHTS,
        |folder| {
            write_json(&folder.join(CONFIG), &config.to_json())?;
            write_safetensors(&folder.join(WEIGHTS), &specs, |spec| {
                Ok(tensors[&spec.name].to_bytes()?)
            })
        },
    )
}

/// PEFT's name of a tensor: the path of the module inside the wrapped model.
pub(super) fn tensor_name(module: &str, part: &str) -> String {
    format!("base_model.model.{module}.{part}")
}
