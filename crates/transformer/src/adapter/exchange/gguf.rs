//! llama.cpp's adapters: a GGUF file of type `adapter` with `NAME.lora_a` and `NAME.lora_b` for weights `NAME`.
//!
//! Source: `convert_lora_to_gguf.py` for what is written, `llama-adapter.cpp` for what is read: `alpha / rank` scales
//! each pair, with the rank that the pair has and one alpha for all; 0 stands for a scaling of 1. A is `[rank, in]`, that of
//! the token embedding `[tokens, rank]`; B is `[out, rank]`, and its rows of Llama's queries and keys go with the weight's,
//! whose heads are in the order of neighbouring rotary pairs.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use fuselora_tensor::ops::gather;
use fuselora_tensor::{DType, Device, Tensor};

use super::{AdaptedModel, rescaled, specs, update};
use crate::adapter::{Adapter, LoraWeights, Module, ModuleKind};
use crate::checkpoint::RowOrder;
use crate::error::{Error, Result};
use crate::families::{AttentionNames, OUTPUT_HEAD};
use crate::gguf::{self, GgufFile, WrittenValue as Value};
use crate::model::transpose;

const ALPHA: &str = "adapter.lora.alpha";

/// A weight of llama.cpp.
struct Named {
    name: String,
    order: RowOrder,
}

/// Whether the file is a GGUF adapter: a model is none, and what is wrong with a broken file is said when it is read.
pub(super) fn is_adapter(path: &Path) -> bool {
    let mut magic = [0; 4];
    let read = File::open(path).and_then(|mut file| file.read_exact(&mut magic));
    if read.is_err() || magic != *b"GGUF" {
        return false;
    }
    match GgufFile::open(path) {
        Ok(file) => file.metadata().string("general.type") == Some("adapter"),
        Err(_) => true,
    }
}

impl AdaptedModel {
    /// llama.cpp's names of the weights that take an update there, by module.
    fn gguf_names(&self) -> BTreeMap<String, Named> {
        let layout = self.family.layout;
        let heads = RowOrder::PairsToHalves {
            head_dim: self.config.head_dim,
        };
        let pairs = if self.family.gguf_pairs {
            heads
        } else {
            RowOrder::AsStored
        };
        let as_stored = RowOrder::AsStored;
        let mut parts = match layout.attention {
            AttentionNames::Split([q, k, v]) => {
                vec![
                    (q, "attn_q", pairs),
                    (k, "attn_k", pairs),
                    (v, "attn_v", as_stored),
                ]
            }
            AttentionNames::Fused(name) => vec![(name, "attn_qkv", as_stored)],
        };
        parts.push((layout.attention_output, "attn_output", as_stored));
        parts.extend(layout.mlp.gate.map(|gate| (gate, "ffn_gate", as_stored)));
        parts.push((layout.mlp.up, "ffn_up", as_stored));
        parts.push((layout.mlp.down, "ffn_down", as_stored));
        let mut names = BTreeMap::new();
        for layer in 0..self.config.num_layers {
            for &(part, name, order) in &parts {
                let name = format!("blk.{layer}.{name}.weight");
                names.insert(layout.block(layer, part), Named { name, order });
            }
        }
        let whole = |name: &str| Named {
            name: name.to_owned(),
            order: as_stored,
        };
        names.insert(layout.path(layout.embedding), whole("token_embd.weight"));
        // A head that shares the embedding's table is no tensor of a GGUF model.
        if !self.config.tie_word_embeddings {
            names.insert(OUTPUT_HEAD.to_owned(), whole("output.weight"));
        }
        names
    }
}

/// The rows of `matrix`, row `i` at the place that `order` has for it, or, with `back`, from there.
fn reordered(matrix: &Tensor, order: RowOrder, back: bool) -> Result<Tensor> {
    let rows = matrix.shape().first().copied().unwrap_or(0);
    let stored: Vec<u32> = (0..rows).map(|row| order.stored_row(row) as u32).collect();
    let ids = if back {
        stored
    } else {
        let mut row_at = vec![0; rows];
        (0..)
            .zip(&stored)
            .for_each(|(row, &at)| row_at[at as usize] = row);
        row_at
    };
    let ids = Tensor::from_u32(matrix.device(), [rows], &ids)?;
    Ok(gather::rows(matrix, &ids)?)
}

pub(super) fn write(
    adapter: &Adapter,
    model: &AdaptedModel,
    path: &Path,
    dtype: DType,
) -> Result<()> {
    adapter.check_plain("become a GGUF file of llama.cpp, which holds low-rank updates alone")?;
    let names = model.gguf_names();
    let config = &adapter.config;
    let alpha = if config.alpha == 0.0 {
        config.rank as f64
    } else {
        config.alpha
    };
    let mut tensors = BTreeMap::new();
    for (module, lora) in &adapter.modules {
        let named = names.get(module).ok_or_else(|| {
            Error::adapter(format!(
                "llama.cpp takes no low-rank update of `{module}` in this model"
            ))
        })?;
        let a = if lora.embedding {
            transpose(&lora.a)?
        } else {
            lora.a.try_clone()?
        };
        let scaling = f64::from(lora.scaling) * lora.rank as f64;
        let b = reordered(&rescaled(&lora.b, scaling, alpha)?, named.order, false)?;
        for (part, tensor) in [("lora_a", a), ("lora_b", b)] {
            tensors.insert(format!("{}.{part}", named.name), tensor.cast(dtype)?);
        }
    }
    let metadata = [
        ("general.type", Value::String("adapter")),
        (
            "general.architecture",
            Value::String(model.family.gguf_architecture),
        ),
        ("adapter.type", Value::String("lora")),
        (ALPHA, Value::Float(alpha as f32)),
    ];
    gguf::write(path, &metadata, &specs(&tensors), |spec| {
        Ok(tensors[&spec.name].to_bytes()?)
    })
}

pub(super) fn read(path: &Path, model: &AdaptedModel) -> Result<Adapter> {
    let file = GgufFile::open(path)?;
    let expected = model.family.gguf_architecture;
    for (key, expected) in [("adapter.type", "lora"), ("general.architecture", expected)] {
        let found = file.metadata().string(key).unwrap_or_default();
        if found != expected {
            return Err(Error::file(
                path,
                format!("has `{key}` \"{found}\", and this model takes \"{expected}\""),
            ));
        }
    }
    let alpha = alpha(&file);
    let mut pairs: BTreeMap<String, [Option<Tensor>; 2]> = BTreeMap::new();
    for (name, shape) in file.tensors() {
        let refuse = |message: &str| Err(Error::stored_tensor(path, name, message));
        let (weight, index) = match name.rsplit_once(".lora_") {
            Some((weight, "a")) => (weight, 0),
            Some((weight, "b")) => (weight, 1),
            _ => return refuse("is no A or B of a low-rank update"),
        };
        let &[rows, columns] = shape else {
            return refuse("is no matrix");
        };
        let tensor = Tensor::from_f32(&Device::cpu(), [rows, columns], &file.tensor_f32(name)?)?;
        pairs.entry(weight.to_owned()).or_default()[index] = Some(tensor);
    }
    let names = model.gguf_names();
    let mut modules: BTreeMap<String, LoraWeights> = BTreeMap::new();
    for (weight, pair) in pairs {
        let refuse = |message: String| Error::stored_tensor(path, &weight, message);
        let module = names.iter().find(|(_, named)| named.name == weight);
        let (module, named) = module
            .ok_or_else(|| refuse("is no weight of this model that takes an update".into()))?;
        let [Some(a), Some(b)] = pair else {
            return Err(refuse("has A or B alone".into()));
        };
        let module: &Module = model
            .module(module)
            .ok_or_else(|| refuse("is no weight of this model".into()))?;
        let a = match module.kind {
            ModuleKind::Embedding => transpose(&a)?,
            _ => a,
        };
        let mut lora = update(module, a, b, 1.0).map_err(refuse)?;
        // The rows are those of the module, so they are whole heads.
        lora.b = reordered(&lora.b, named.order, true)?;
        if let Some(alpha) = alpha {
            lora.scaling = (alpha / lora.rank as f64) as f32;
        }
        modules.insert(module.name.clone(), lora);
    }
    let Some(rank) = modules.values().map(|lora| lora.rank).max() else {
        return Err(Error::file(path, "holds no low-rank update"));
    };
    // A scaling of 1 is an alpha that is the rank.
    let (alpha, alphas) = match alpha {
        Some(alpha) => (alpha, Vec::new()),
        None => {
            let other = modules.iter().filter(|(_, lora)| lora.rank != rank);
            let alphas = other.map(|(name, lora)| (name.clone(), lora.rank as f64));
            (rank as f64, alphas.collect())
        }
    };
    model.adapter(modules, rank, alpha, alphas)
}

/// The alpha of every pair; nothing where their scaling is 1, for which the file has 0 or none.
pub(in crate::adapter) fn alpha(file: &GgufFile) -> Option<f64> {
    file.metadata().float(ALPHA).filter(|&alpha| alpha != 0.0)
}
