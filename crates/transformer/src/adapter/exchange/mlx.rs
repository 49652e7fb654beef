//! mlx-lm's adapters: a folder with `adapter_config.json` and `adapters.safetensors`.
//!
//! Source: `tuner/lora.py`, `tuner/dora.py` and `tuner/utils.py` of mlx-lm 0.32.2. A module has `lora_a` `[in, rank]` and
//! `lora_b` `[rank, out]`, both transposed beside PEFT's, DoRA's magnitudes are `m`, and the update is
//! `scale·lora_a·lora_b` with one `rank` and one `scale` for all modules. `lora_parameters.keys` names the modules inside a
//! block, or outside of all blocks.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use fuselora_tensor::ops::kv_cache;
use fuselora_tensor::{DType, Device, Tensor};
use serde_json::{Value, json};

use super::{AdaptedModel, rescaled, specs, update};
use crate::adapter::Adapter;
use crate::atomic_file;
use crate::checkpoint::{StoredTensor, read_json, safetensors, write_json, write_safetensors};
use crate::error::{Error, Result};
use crate::families::OUTPUT_HEAD;
use crate::model::transpose;

pub(in crate::adapter) const CONFIG: &str = "adapter_config.json";
pub(in crate::adapter) const WEIGHTS: &str = "adapters.safetensors";

impl AdaptedModel {
    /// The path of a module in mlx-lm's model: what holds all but the head is `model` there.
    fn mlx_name(&self, module: &str) -> String {
        match module.strip_prefix(self.family.layout.base) {
            Some(rest) => format!("model{rest}"),
            None => module.to_owned(),
        }
    }

    /// What `keys` has for a module: its path inside its block, or the whole one.
    fn mlx_key(&self, module: &str) -> String {
        let layout = self.family.layout;
        let blocks = format!("{}.{}.", layout.base, layout.blocks);
        let inside = module
            .strip_prefix(&blocks)
            .and_then(|rest| rest.split_once('.'));
        match inside {
            Some((_, part)) => part.to_owned(),
            None => self.mlx_name(module),
        }
    }

    /// mlx-lm adapts a head that shares the embedding's table with the embedding, PEFT does not.
    fn check_mlx(&self, module: &str) -> Result<()> {
        let layout = self.family.layout;
        let shared = module == OUTPUT_HEAD || module == layout.path(layout.embedding);
        if shared && self.config.tie_word_embeddings {
            return Err(Error::adapter(format!(
                "`{module}` shares its table, and mlx-lm's update of it would change embedding and head together"
            )));
        }
        Ok(())
    }
}

pub(super) fn write(adapter: &Adapter, model: &AdaptedModel, folder: &Path) -> Result<()> {
    let config = &adapter.config;
    adapter.check_updates_only(
        "become an adapter of mlx-lm, which holds low-rank updates and DoRA alone",
    )?;
    let ranks = adapter.modules.values().map(|lora| lora.rank);
    let rank = ranks.max().unwrap_or(config.rank);
    let scale = adapter.modules.values().map(|lora| f64::from(lora.scaling));
    let scale = scale.fold(0.0, |largest, scaling| {
        if scaling.abs() > f64::abs(largest) {
            scaling
        } else {
            largest
        }
    });
    let scale = if scale == 0.0 { 1.0 } else { scale };
    let mut tensors = BTreeMap::new();
    let mut keys = BTreeSet::new();
    for (module, lora) in &adapter.modules {
        model.check_mlx(module)?;
        keys.insert(model.mlx_key(module));
        let name = model.mlx_name(module);
        let b = rescaled(&lora.b, f64::from(lora.scaling), scale)?;
        let (a, b) = (filled_up(&lora.a, rank)?, filled_up(&transpose(&b)?, rank)?);
        tensors.insert(format!("{name}.lora_a"), transpose(&a)?);
        tensors.insert(format!("{name}.lora_b"), b);
        if let Some(magnitude) = &lora.magnitude {
            tensors.insert(format!("{name}.m"), magnitude.try_clone()?);
        }
    }
    let json = json!({
        "fine_tune_type": if config.use_dora { "dora" } else { "lora" },
        "model": config.base_model_name_or_path,
        "num_layers": model.config.num_layers,
        "lora_parameters": { "rank": rank, "scale": scale, "dropout": config.dropout, "keys": keys },
    });
    atomic_file::write_folder(
        folder,
        |name| name == CONFIG || name == WEIGHTS,
        |folder| {
            write_json(&folder.join(CONFIG), &json)?;
            write_safetensors(&folder.join(WEIGHTS), &specs(&tensors), |spec| {
                Ok(tensors[&spec.name].to_bytes()?)
            })
        },
    )
}

/// `matrix [rank, n]` with rows of zeros up to a larger rank: mlx-lm has one for all modules.
fn filled_up(matrix: &Tensor, rank: usize) -> Result<Tensor> {
    let columns = matrix.shape().last().copied().unwrap_or(0);
    let mut filled = Tensor::zeros(matrix.device(), [rank, columns], matrix.dtype())?;
    kv_cache::append(&mut filled, 0, matrix)?;
    Ok(filled)
}

pub(super) fn read(folder: &Path, model: &AdaptedModel) -> Result<Adapter> {
    let path = folder.join(CONFIG);
    let json = read_json(&path)?;
    let bad = |message: String| Error::file(&path, message);
    let kind = json
        .get("fine_tune_type")
        .and_then(Value::as_str)
        .unwrap_or("lora");
    if kind != "lora" && kind != "dora" {
        return Err(bad(format!(
            "has `fine_tune_type` \"{kind}\"; lora and dora are adapters"
        )));
    }
    let parameters = json.get("lora_parameters").unwrap_or(&Value::Null);
    let number = |key: &str| parameters.get(key).and_then(Value::as_f64);
    let scale = number("scale").filter(|scale| scale.is_finite());
    let scale = scale.ok_or_else(|| bad("has no number `lora_parameters.scale`".into()))?;

    let path = folder.join(WEIGHTS);
    let mut tensors = safetensors::read(&path)?;
    let mut modules = BTreeMap::new();
    let targets = model
        .modules
        .iter()
        .map(|module| (model.mlx_name(&module.name), module));
    for (name, module) in targets {
        let mut take = |part: &str| -> Result<Option<Tensor>> {
            let name = format!("{name}.{part}");
            let stored = tensors.remove(&name);
            let load = |stored: StoredTensor| stored.load_owned(&name, &Device::cpu(), DType::F32);
            stored.map(load).transpose()
        };
        let (a, b, magnitude) = (take("lora_a")?, take("lora_b")?, take("m")?);
        let refuse = |message: String| Error::stored_tensor(&path, &name, message);
        let (a, b) = match (a, b) {
            (Some(a), Some(b)) => (a, b),
            (None, None) if magnitude.is_none() => continue,
            _ => return Err(refuse("has A or B alone".into())),
        };
        model.check_mlx(&module.name)?;
        let turned = |tensor: &Tensor| transpose(tensor).map_err(|error| refuse(error.to_string()));
        let (a, b) = (turned(&a)?, turned(&b)?);
        let mut lora = update(module, a, b, scale as f32).map_err(refuse)?;
        lora.magnitude = match (kind, magnitude) {
            ("lora", None) => None,
            ("dora", Some(m)) if **m.shape() == [module.out_features] => Some(m),
            _ => {
                return Err(refuse(format!(
                    "has magnitudes `m` that do not fit a {kind} adapter"
                )));
            }
        };
        modules.insert(module.name.clone(), lora);
    }
    if let Some(name) = tensors.keys().next() {
        return Err(Error::stored_tensor(
            &path,
            name,
            "belongs to no module of this model",
        ));
    }
    let ranks: BTreeSet<usize> = modules.values().map(|lora| lora.rank).collect();
    let rank = match ranks.first() {
        Some(&rank) if ranks.len() == 1 => rank,
        Some(_) => {
            return Err(Error::file(
                &path,
                "holds updates of several ranks, which mlx-lm has not",
            ));
        }
        None => return Err(Error::file(&path, "holds no low-rank update")),
    };
    let mut adapter = model.adapter(modules, rank, scale * rank as f64, Vec::new())?;
    adapter.config.use_dora = kind == "dora";
    adapter.config.dropout = number("dropout").unwrap_or(0.0) as f32;
    let base = json.get("model").and_then(Value::as_str);
    adapter.config.base_model_name_or_path = base.map(str::to_owned);
    adapter.config.check()?;
    Ok(adapter)
}
