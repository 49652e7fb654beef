//! What an adapter is, told from its own files alone.

use std::path::Path;

use serde_json::Value;

use super::exchange::{AdapterFormat, gguf, mlx};
use super::{AdapterConfig, ModuleSelector, files};
use crate::checkpoint::{read_json, safetensors};
use crate::error::Result;
use crate::gguf::GgufFile;

/// An adapter in a line.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterSummary {
    /// How it is stored.
    pub format: AdapterFormat,
    /// `LoRA`, `DoRA`, either with rank-stabilised scaling.
    pub kind: &'static str,
    /// `r`, the rank of modules that have none of their own; of a GGUF file the largest.
    pub rank: usize,
    /// The numerator of the scaling, `lora_alpha`; `scale·rank` of mlx-lm.
    pub alpha: f64,
    /// Modules with a low-rank update.
    pub modules: usize,
    /// Trained values.
    pub parameters: u64,
    /// What it adapts, as its configuration says it.
    pub targets: String,
    /// The base model, as its maker named it; of a GGUF file its architecture.
    pub base_model: Option<String>,
}

impl AdapterSummary {
    /// Reads what is at `path`; nothing where that is no adapter.
    ///
    /// # Errors
    /// A file of it that is missing or corrupt.
    pub fn read(path: &Path) -> Result<Option<AdapterSummary>> {
        Ok(match AdapterFormat::of(path) {
            None => None,
            Some(AdapterFormat::Peft) => Some(AdapterSummary::of_peft(path)?),
            Some(AdapterFormat::Gguf) => Some(AdapterSummary::of_gguf(path)?),
            Some(AdapterFormat::Mlx) => Some(AdapterSummary::of_mlx(path)?),
        })
    }

    fn of_peft(folder: &Path) -> Result<AdapterSummary> {
        let config = AdapterConfig::read(folder)?;
        let tensors = safetensors::read(&folder.join(files::WEIGHTS))?;
        // The frozen tables that PEFT saves beside updates of them are not trained.
        let trained = tensors
            .iter()
            .filter(|(name, _)| !name.ends_with("base_layer.weight"));
        let sizes = trained.map(|(name, tensor)| (&name[..], &tensor.info().shape[..]));
        let (modules, parameters) = count(sizes, &["lora_A.weight", "lora_embedding_A"]);
        Ok(AdapterSummary {
            format: AdapterFormat::Peft,
            kind: match (config.use_dora, config.use_rslora) {
                (false, false) => "LoRA",
                (false, true) => "rsLoRA",
                (true, false) => "DoRA",
                (true, true) => "rsDoRA",
            },
            rank: config.rank,
            alpha: config.alpha,
            modules,
            parameters,
            targets: match &config.target_modules {
                ModuleSelector::AllLinear => "all-linear".to_owned(),
                ModuleSelector::Names(names) => last_parts(names.iter().map(|name| &name[..])),
                ModuleSelector::Regex(pattern) => pattern.clone(),
            },
            base_model: config.base_model_name_or_path,
        })
    }

    fn of_gguf(path: &Path) -> Result<AdapterSummary> {
        let file = GgufFile::open(path)?;
        let (modules, parameters) = count(file.tensors(), &[".lora_a"]);
        let ranks = file.tensors().filter(|(name, _)| name.ends_with(".lora_b"));
        let rank = ranks
            .filter_map(|(_, shape)| shape.last().copied())
            .max()
            .unwrap_or(0);
        let weights = file
            .tensors()
            .filter_map(|(name, _)| name.strip_suffix(".weight.lora_a"));
        Ok(AdapterSummary {
            format: AdapterFormat::Gguf,
            kind: "LoRA",
            rank,
            alpha: gguf::alpha(&file).unwrap_or(rank as f64),
            modules,
            parameters,
            targets: last_parts(weights),
            base_model: file
                .metadata()
                .string("general.architecture")
                .map(str::to_owned),
        })
    }

    fn of_mlx(folder: &Path) -> Result<AdapterSummary> {
        let json = read_json(&folder.join(mlx::CONFIG))?;
        let tensors = safetensors::read(&folder.join(mlx::WEIGHTS))?;
        let sizes = tensors
            .iter()
            .map(|(name, tensor)| (&name[..], &tensor.info().shape[..]));
        let (modules, parameters) = count(sizes, &[".lora_a"]);
        let parameter = |key: &str| &json["lora_parameters"][key];
        let rank = parameter("rank").as_u64().unwrap_or(0) as usize;
        let names = tensors
            .keys()
            .filter_map(|name| name.strip_suffix(".lora_a"));
        Ok(AdapterSummary {
            format: AdapterFormat::Mlx,
            kind: match json["fine_tune_type"].as_str() {
                Some("dora") => "DoRA",
                _ => "LoRA",
            },
            rank,
            alpha: parameter("scale").as_f64().unwrap_or(0.0) * rank as f64,
            modules,
            parameters,
            targets: last_parts(names),
            base_model: json.get("model").and_then(Value::as_str).map(str::to_owned),
        })
    }
}

/// The tensors whose names end so, and the elements of all.
fn count<'a>(tensors: impl Iterator<Item = (&'a str, &'a [usize])>, of_a: &[&str]) -> (usize, u64) {
    let mut modules = 0;
    let mut parameters = 0;
    for (name, shape) in tensors {
        modules += usize::from(of_a.iter().any(|end| name.ends_with(end)));
        parameters += shape.iter().map(|&extent| extent as u64).product::<u64>();
    }
    (modules, parameters)
}

/// The last parts of paths, each once.
fn last_parts<'a>(paths: impl Iterator<Item = &'a str>) -> String {
    let mut parts: Vec<&str> = paths
        .map(|path| path.rsplit('.').next().unwrap_or(path))
        .collect();
    parts.sort_unstable();
    parts.dedup();
    parts.join(", ")
}
