//! Folding an adapter into its base: `W + scaling·B·A`, with DoRA `gain ∘ (W + scaling·B·A)`, and what is trained
//! whole in place of the base's own, as PEFT's `merge_and_unload` does.

use std::fs;
use std::path::Path;

use fuselora_tensor::ops::{dora, elementwise, lora_linear};
use fuselora_tensor::{DType, Device, Tensor, Weight};
use serde_json::Value;

use crate::adapter::{Adapter, LoraWeights, Trained};
use crate::atomic_file;
use crate::checkpoint::{
    Checkpoint, SHARD_BYTES, TensorSpec, is_weight_file, write_json, write_weights,
};
use crate::convert;
use crate::error::{Error, Result};
use crate::families::{self, Layout, OUTPUT_HEAD};
use crate::lora::with_rows;
use crate::model::transpose;

/// What a folder carries besides its weights and configuration, for its tokenizer and generation.
pub(crate) const COMPANIONS: [&str; 10] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
];

/// Writes `checkpoint` with `adapter` folded in to `folder`, a plain Hugging Face checkpoint with the
/// base's tokenizer. Weights are written as `dtype`, or as the base stores them (f32 for a GGUF); those of a base in
/// NF4 in 16 bits, f16 where they were that before they were quantized, else bf16.
///
/// A head that the base ties to its embedding is written apart from it where the adapter makes them differ. One weight
/// is in memory at a time. A checkpoint that is in `folder` already is replaced as a whole.
///
/// # Errors
/// A bias of `lora_B` on a module that has none of its own, which a plain checkpoint cannot hold; a GPT-2 in NF4, whose
/// matrices lie transposed; a tensor that cannot be read; a file that cannot be written.
pub fn merge_adapter(
    checkpoint: &Checkpoint,
    adapter: &Adapter,
    folder: &Path,
    dtype: Option<DType>,
) -> Result<()> {
    let (family, config) = families::read_config(checkpoint.config())?;
    let layout = family.layout;
    let dtype = dtype.or(checkpoint.nf4_source_dtype().map(|source| match source {
        DType::F16 => DType::F16,
        _ => DType::BF16,
    }));
    if layout.transposed && checkpoint.nf4_source_dtype().is_some() {
        return Err(Error::Input(format!(
            "{} is a quantized GPT-2, which adapters cannot be merged into; merge into the model that it was made of",
            checkpoint.path().display()
        )));
    }
    let embedding = layout.path(layout.embedding);
    let merging = Merging {
        checkpoint,
        adapter,
        layout,
        device: adapter.device(),
        tied_to: config.tie_word_embeddings.then_some(&embedding),
    };
    let mut specs = checkpoint
        .tensor_names()
        .map(|name| {
            let info = checkpoint.info(name)?;
            Ok(TensorSpec {
                name: name.to_owned(),
                shape: info.shape.clone(),
                dtype: dtype.unwrap_or(info.dtype.float_dtype()),
            })
        })
        .collect::<Result<Vec<_>>>()?;
    merging.check_biases(&specs)?;
    let mut config = checkpoint.config().clone();
    if let Some(config) = config.as_object_mut() {
        config.remove("quantization_config");
    }
    if merging.parts_head() {
        config["tie_word_embeddings"] = false.into();
        let table = format!("{embedding}.weight");
        let head = format!("{OUTPUT_HEAD}.weight");
        let like = specs
            .iter()
            .find(|spec| layout.full_name(&spec.name) == table);
        let like = like.map(|spec| TensorSpec {
            name: head.clone(),
            ..spec.clone()
        });
        specs.retain(|spec| spec.name != head);
        specs.extend(like);
    }
    let replaces =
        |name: &str| name == "config.json" || COMPANIONS.contains(&name) || is_weight_file(name);
    atomic_file::write_folder(folder, replaces, |folder| {
        match checkpoint.gguf() {
            Some(gguf) => convert::write_companions(
                gguf,
                &config,
                specs.first().map_or(DType::F32, |s| s.dtype),
                folder,
            )?,
            None => copy_companions(checkpoint, config, dtype, folder)?,
        }
        write_weights(folder, &specs, SHARD_BYTES, |spec| merging.tensor(spec))
    })
}

struct Merging<'a> {
    checkpoint: &'a Checkpoint,
    adapter: &'a Adapter,
    layout: &'static Layout,
    device: Device,
    /// The embedding, where the head shares its table.
    tied_to: Option<&'a String>,
}

impl Merging<'_> {
    /// Whether the adapter makes a difference between a head and the embedding that it shares a table with.
    fn parts_head(&self) -> bool {
        let Some(embedding) = self.tied_to else {
            return false;
        };
        let Adapter {
            modules, trained, ..
        } = self.adapter;
        let adapted = |module: &str| {
            modules.contains_key(module) || trained.get(module).is_some_and(|t| t.weight.is_some())
        };
        let own_tokens = trained.get(OUTPUT_HEAD).is_some_and(|t| t.tokens.is_some());
        adapted(OUTPUT_HEAD) || adapted(embedding) || own_tokens
    }

    fn check_biases(&self, specs: &[TensorSpec]) -> Result<()> {
        for (module, lora) in &self.adapter.modules {
            let bias = format!("{module}.bias");
            let has_bias = || specs.iter().any(|s| self.layout.full_name(&s.name) == bias);
            if lora.bias.is_some() && !has_bias() {
                return Err(Error::Adapter(format!(
                    "`lora_bias` gives `{module}` a bias, which the base model has none of, so it cannot be merged; use the adapter unmerged"
                )));
            }
        }
        Ok(())
    }

    /// The bytes of one tensor of the merged checkpoint.
    fn tensor(&self, spec: &TensorSpec) -> Result<Vec<u8>> {
        let name = self.layout.full_name(&spec.name);
        let (module, part) = name.rsplit_once('.').unwrap_or((&name, ""));
        let update = self.adapter.modules.get(module);
        let trained = self.adapter.trained.get(module);
        let transposed = self.layout.is_transposed(module);
        let stored = || {
            let tied = self.tied_to.filter(|_| module == OUTPUT_HEAD);
            let table = tied.map(|embedding| format!("{embedding}.weight"));
            let source = match &table {
                Some(table) => self.layout.stored_name(self.checkpoint, table),
                None => &spec.name,
            };
            let stored = self.checkpoint.load(source, &self.device, DType::F32)?;
            if transposed && part == "weight" {
                transpose(&stored)
            } else {
                Ok(stored)
            }
        };
        let merged = match part {
            "weight" => match (update, trained) {
                (Some(update), _) => {
                    self.update_weight(module, update, Weight::Dense(stored()?))?
                }
                (
                    _,
                    Some(Trained {
                        weight: Some(weight),
                        ..
                    }),
                ) => dense(weight)?.try_clone()?,
                (
                    _,
                    Some(Trained {
                        tokens: Some(tokens),
                        ..
                    }),
                ) => {
                    let table = with_rows(&Weight::Dense(stored()?), tokens)?;
                    dense(&table)?.try_clone()?
                }
                _ if self.tied_to.is_some() && module == OUTPUT_HEAD => stored()?,
                _ => return self.checkpoint.tensor_bytes(&spec.name, spec.dtype),
            },
            "bias" => {
                let own = trained.and_then(|trained| trained.bias.as_ref());
                let of_b = update.and_then(|update| Some((update.bias.as_ref()?, update.scaling)));
                if own.is_none() && of_b.is_none() {
                    return self.checkpoint.tensor_bytes(&spec.name, spec.dtype);
                }
                let mut bias = own.map_or_else(stored, |own| Ok(own.try_clone()?))?;
                if let Some((of_b, scaling)) = of_b {
                    let mut of_b = of_b.try_clone()?;
                    elementwise::scale(&mut of_b, scaling)?;
                    elementwise::add_assign(&mut bias, &of_b)?;
                }
                bias
            }
            _ => return self.checkpoint.tensor_bytes(&spec.name, spec.dtype),
        };
        let merged = if transposed && part == "weight" {
            transpose(&merged)?
        } else {
            merged
        };
        Ok(merged.cast(spec.dtype)?.to_bytes()?)
    }

    /// The weight that an update makes of the base's `stored` one.
    fn update_weight(&self, module: &str, update: &LoraWeights, stored: Weight) -> Result<Tensor> {
        let init = self.adapter.config.init_lora_weights;
        let own = match &update.base {
            None if init.replaces_base() => Some(update.base_of(init, module, &stored)?.0),
            _ => None,
        };
        let weight = own.as_ref().or(update.base.as_deref()).unwrap_or(&stored);
        let LoraWeights {
            a,
            b,
            scaling,
            magnitude,
            ..
        } = update;
        if update.embedding {
            // The table is stored transposed: `(B·A)ᵀ = Aᵀ·Bᵀ`.
            let (a, b) = (transpose(b)?, transpose(a)?);
            return Ok(lora_linear::merge(weight, &a, &b, *scaling)?);
        }
        let mut merged = lora_linear::merge(weight, a, b, *scaling)?;
        if let Some(magnitude) = magnitude {
            let norm = dora::weight_norm(weight, a, b, *scaling)?;
            dora::scale_rows(&mut merged, &dora::gain(magnitude, &norm)?)?;
        }
        Ok(merged)
    }
}

fn dense(weight: &Weight) -> Result<&Tensor> {
    weight
        .dense()
        .ok_or_else(|| Error::Input("a trained weight is not stored as floats".into()))
}

pub(crate) fn copy_companions(
    checkpoint: &Checkpoint,
    mut config: Value,
    dtype: Option<DType>,
    folder: &Path,
) -> Result<()> {
    if let (Some(dtype), Some(config)) = (dtype, config.as_object_mut()) {
        // transformers 5 writes `dtype`, earlier versions `torch_dtype`.
        let key = if config.contains_key("dtype") {
            "dtype"
        } else {
            "torch_dtype"
        };
        config.insert(key.to_owned(), convert::torch_dtype(dtype)?.into());
    }
    write_json(&folder.join("config.json"), &config)?;
    for name in COMPANIONS {
        let source = checkpoint.path().join(name);
        if source.is_file() {
            fs::copy(&source, folder.join(name)).map_err(|error| Error::io(&source, error))?;
        }
    }
    Ok(())
}
