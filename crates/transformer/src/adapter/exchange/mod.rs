//! Adapters in the formats of other programs: llama.cpp's GGUF and mlx-lm's folder.

mod gguf;
mod mlx;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;

use fuselora_tensor::{DType, Device, Tensor};

use super::{Adapter, AdapterConfig, LoraWeights, Module, ModuleKind, ModuleSelector};
use crate::checkpoint::Checkpoint;
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
        let peft = path.join("adapter_config.json").is_file();
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

/// A matrix on the host.
struct Host {
    values: Vec<f32>,
    rows: usize,
    columns: usize,
}

impl Host {
    fn of(tensor: &Tensor) -> Result<Host> {
        let [rows, columns] = **tensor.shape() else {
            return Err(Error::Input(format!("{} is no matrix", tensor.shape())));
        };
        Ok(Host {
            values: tensor.to_f32_vec()?,
            rows,
            columns,
        })
    }

    fn tensor(&self) -> Result<Tensor> {
        let shape = [self.rows, self.columns];
        Ok(Tensor::from_f32(&Device::cpu(), shape, &self.values)?)
    }

    fn row(&self, row: usize) -> &[f32] {
        &self.values[row * self.columns..][..self.columns]
    }

    fn transposed(&self) -> Host {
        let column = |column: usize| self.values.iter().skip(column).step_by(self.columns);
        Host {
            values: (0..self.columns).flat_map(column).copied().collect(),
            rows: self.columns,
            columns: self.rows,
        }
    }

    /// With zeros up to these extents.
    fn padded(&self, rows: usize, columns: usize) -> Host {
        let mut values = vec![0.0; rows * columns];
        for (row, padded) in values.chunks_exact_mut(columns).take(self.rows).enumerate() {
            padded[..self.columns].copy_from_slice(self.row(row));
        }
        Host {
            values,
            rows,
            columns,
        }
    }

    fn scaled(mut self, factor: f64) -> Host {
        if factor != 1.0 {
            let scale = |value: &mut f32| *value = (f64::from(*value) * factor) as f32;
            self.values.iter_mut().for_each(scale);
        }
        self
    }
}

/// `scaling` as a multiple of another: 1 where they differ by the rounding of f32 alone.
fn factor(scaling: f64, of: f64) -> f64 {
    let factor = scaling / of;
    if (factor - 1.0).abs() < 1e-6 {
        1.0
    } else {
        factor
    }
}

/// A low-rank update that was read, once its extents are those of the module.
fn update(
    module: &Module,
    a: &Host,
    b: &Host,
    scaling: f32,
) -> std::result::Result<LoraWeights, String> {
    let rank = a.rows;
    if rank == 0
        || b.columns != rank
        || a.columns != module.in_features
        || b.rows != module.out_features
    {
        return Err(format!(
            "has an update of [{}, {}] and [{}, {}], which does not fit {} outputs and {} inputs",
            b.rows, b.columns, a.rows, a.columns, module.out_features, module.in_features
        ));
    }
    let tensor = |host: &Host| host.tensor().map_err(|error| error.to_string());
    Ok(LoraWeights {
        a: tensor(a)?,
        b: tensor(b)?,
        scaling,
        rank,
        magnitude: None,
        bias: None,
        embedding: module.kind == ModuleKind::Embedding,
        base: None,
        initial: None,
    })
}
