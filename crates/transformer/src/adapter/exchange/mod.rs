//! Adapters in the formats of other programs: llama.cpp's GGUF and mlx-lm's folder.

pub(super) mod gguf;
pub(super) mod mlx;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;

use fuselora_tensor::ops::elementwise;
use fuselora_tensor::{DType, Device, Tensor};

use super::{Adapter, AdapterConfig, LoraWeights, Module, ModuleKind, ModuleSelector, files};
use crate::checkpoint::{Checkpoint, TensorSpec};
use crate::config::DecoderConfig;
use crate::error::{Error, Result};
use crate::families::{self, Family};
use crate::model;

/// A way of storing an adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AdapterFormat {
    /// A folder with `adapter_config.json` and `adapter_model.safetensors`.
    Peft,
    /// A GGUF file of llama.cpp.
    Gguf,
    /// mlx-lm's folder, with `adapter_config.json` and `adapters.safetensors`.
    Mlx,
}

impl fmt::Display for AdapterFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            AdapterFormat::Peft => "PEFT",
            AdapterFormat::Gguf => "GGUF",
            AdapterFormat::Mlx => "mlx-lm",
        })
    }
}

impl AdapterFormat {
    /// The format of the file or folder at `path`, by what is there; nothing where it is no adapter.
    pub fn of(path: &Path) -> Option<AdapterFormat> {
        if path.is_file() {
            return gguf::is_adapter(path).then_some(AdapterFormat::Gguf);
        }
        if path.join(mlx::WEIGHTS).is_file() {
            return Some(AdapterFormat::Mlx);
        }
        let peft = path.join(files::CONFIG).is_file();
        peft.then_some(AdapterFormat::Peft)
    }
}

/// What an adapter is for: the names and extents of a model's modules.
pub struct AdaptedModel {
    family: &'static Family,
    config: DecoderConfig,
    modules: Vec<Module>,
}

impl AdaptedModel {
    /// The modules of a checkpoint.
    ///
    /// # Errors
    /// A configuration that is not supported.
    pub fn of(checkpoint: &Checkpoint) -> Result<AdaptedModel> {
        let (family, config) = families::read_config(checkpoint.config())?;
        Ok(AdaptedModel {
            family,
            modules: model::modules(family, &config),
            config,
        })
    }

    /// The modules.
    pub fn modules(&self) -> &[Module] {
        &self.modules
    }

    fn module(&self, name: &str) -> Option<&Module> {
        self.modules.iter().find(|module| module.name == name)
    }

    /// Reads an adapter of this model in any of the formats, to the host.
    ///
    /// # Errors
    /// When it is none, or a file or tensor of it is corrupt, missing or does not fit the model, by name.
    pub fn read_adapter(&self, path: &Path) -> Result<Adapter> {
        match AdapterFormat::of(path) {
            Some(AdapterFormat::Peft) => Adapter::read(path, &self.modules, &Device::cpu()),
            Some(AdapterFormat::Gguf) => gguf::read(path, self),
            Some(AdapterFormat::Mlx) => mlx::read(path, self),
            None if !path.exists() => Err(Error::file(path, "is not there")),
            None => Err(Error::file(
                path,
                "is no adapter: neither a folder of PEFT or mlx-lm, nor a GGUF file of type adapter",
            )),
        }
    }

    /// Writes an adapter of this model; a GGUF file with A and B in `dtype`, the others in f32.
    ///
    /// # Errors
    /// What the format has no place for, by module, or a file that cannot be written.
    pub fn write_adapter(
        &self,
        adapter: &Adapter,
        format: AdapterFormat,
        path: &Path,
        dtype: DType,
    ) -> Result<()> {
        match format {
            AdapterFormat::Peft => adapter.write(path),
            AdapterFormat::Gguf => gguf::write(adapter, self, path, dtype),
            AdapterFormat::Mlx => mlx::write(adapter, self, path),
        }
    }

    /// An adapter of plain updates that was read, with the configuration that PEFT would have for it.
    ///
    /// `alpha` is that of every module but those in `alphas`.
    fn adapter(
        &self,
        modules: BTreeMap<String, LoraWeights>,
        rank: usize,
        alpha: f64,
        alphas: Vec<(String, f64)>,
    ) -> Result<Adapter> {
        let last = |name: &String| name.rsplit('.').next().unwrap_or(name).to_owned();
        let short: BTreeSet<String> = modules.keys().map(last).collect();
        let names = |names: Vec<String>| {
            let mut config = AdapterConfig::new(rank, alpha, ModuleSelector::Names(names));
            let other = modules.iter().filter(|(_, lora)| lora.rank != rank);
            config.rank_pattern = other
                .map(|(name, lora)| (name.clone(), lora.rank))
                .collect();
            config.alpha_pattern = alphas.clone();
            config
        };
        // The last parts of paths, as people write them, where they choose just these modules.
        let config = names(short.into_iter().collect());
        let chosen = config.targets(&self.modules);
        let chosen = chosen.map(|targets| targets.into_iter().map(|target| target.module));
        let exact =
            chosen.is_ok_and(|chosen| chosen.collect::<BTreeSet<_>>().iter().eq(modules.keys()));
        let config = if exact {
            config
        } else {
            names(modules.keys().cloned().collect())
        };
        Ok(Adapter {
            config,
            modules,
            trained: BTreeMap::new(),
        })
    }
}

/// `b` times `scaling / of`; as it is where the two differ by the rounding of f32 alone.
fn rescaled(b: &Tensor, scaling: f64, of: f64) -> Result<Tensor> {
    let factor = scaling / of;
    let mut b = b.try_clone()?;
    if (factor - 1.0).abs() >= 1e-6 {
        elementwise::scale(&mut b, factor as f32)?;
    }
    Ok(b)
}

/// What a file is to hold of each tensor.
fn specs(tensors: &BTreeMap<String, Tensor>) -> Vec<TensorSpec> {
    let spec = |(name, tensor): (&String, &Tensor)| TensorSpec {
        name: name.clone(),
        shape: tensor.shape().to_vec(),
        dtype: tensor.dtype(),
    };
    tensors.iter().map(spec).collect()
}

/// A low-rank update that was read, once its extents are those of the module.
fn update(
    module: &Module,
    a: Tensor,
    b: Tensor,
    scaling: f32,
) -> std::result::Result<LoraWeights, String> {
    let rank = a.shape().first().copied().unwrap_or(0);
    let fits = **a.shape() == [rank, module.in_features]
        && **b.shape() == [module.out_features, rank]
        && rank > 0;
    if !fits {
        return Err(format!(
            "has an update of {} and {}, which does not fit {} outputs and {} inputs",
            b.shape(),
            a.shape(),
            module.out_features,
            module.in_features
        ));
    }
    Ok(LoraWeights {
        a,
        b,
        scaling,
        rank,
        magnitude: None,
        bias: None,
        embedding: module.kind == ModuleKind::Embedding,
        base: None,
        initial: None,
    })
}
