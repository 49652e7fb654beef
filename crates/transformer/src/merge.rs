//! Folding an adapter into its base: `W + scaling·B·A`, with DoRA `gain ∘ (W + scaling·B·A)`, and what is trained
//! whole in place of the base's own, as PEFT's `merge_and_unload` does.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use fuselora_tensor::nf4::Absmax;
use fuselora_tensor::ops::{dora, elementwise, lora_linear};
use fuselora_tensor::{DType, Device, Nf4Weight, Tensor, Weight};
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
use crate::quantize::Nf4Tensors;

/// What a folder carries besides its weights and configuration, for its tokenizer and generation.
const COMPANIONS: [&str; 10] = [
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
/// A bias of `lora_B` on a module that has none of its own, which a plain checkpoint cannot hold; a tensor that cannot be
/// read; a file that cannot be written.
pub fn merge_adapter(
    checkpoint: &Checkpoint,
    adapter: &Adapter,
    folder: &Path,
    dtype: Option<DType>,
) -> Result<()> {
    let dtype = dtype.or(checkpoint.nf4_source_dtype().map(|source| match source {
        DType::F16 => DType::F16,
        _ => DType::BF16,
    }));
    let merging = Merging::new(checkpoint, adapter)?;
    let specs = merging.float_specs(dtype)?;
    let mut config = checkpoint.config().clone();
    if let Some(config) = config.as_object_mut() {
        config.remove("quantization_config");
    }
    merging.write(folder, config, dtype, &specs, |spec| merging.tensor(spec))
}

/// What quantizing a merged weight again has changed.
#[derive(Debug, Clone, PartialEq)]
pub struct RequantizationError {
    /// The adapted module.
    pub module: String,
    /// `‖Q(W') - W'‖ / ‖W'‖`, with W' the merged weight and Frobenius norms.
    pub of_weight: f64,
    /// `‖Q(W') - W'‖ / ‖W' - W‖`: above 1 the error is larger than what the adapter has learnt here.
    pub of_update: f64,
}

/// As [`merge_adapter`], into a checkpoint in NF4 that stays in NF4: merged weights are quantized again with the block
/// size of the base's and double quantization where it has that; all others keep their bits. Says what that has
/// changed, for each weight in the checkpoint's order.
///
/// # Errors
/// A checkpoint that is not in NF4; as [`merge_adapter`].
pub fn merge_requantized(
    checkpoint: &Checkpoint,
    adapter: &Adapter,
    folder: &Path,
) -> Result<Vec<RequantizationError>> {
    if checkpoint.nf4_source_dtype().is_none() {
        let message =
            "is not in NF4, so there is nothing to quantize again; merge, and quantize the result";
        return Err(Error::file(checkpoint.path(), message));
    }
    let merging = Merging::new(checkpoint, adapter)?;
    let mut errors: BTreeMap<String, RequantizationError> = BTreeMap::new();
    let mut quantized = Nf4Tensors::new(|name| {
        let Some(stored) = checkpoint.nf4(name) else {
            return Err(Error::stored_tensor(
                checkpoint.path(),
                name,
                "is not in NF4",
            ));
        };
        let (weight, source) = (stored.load(&Device::cpu())?, stored.source_dtype());
        let Some(merged) = merging.merged(name)? else {
            return Ok((weight, source));
        };
        let merged = merged.to_device(&Device::cpu())?;
        let double_quant = matches!(weight.absmax(), Absmax::Nested(_));
        let again = Nf4Weight::quantize(&merged, weight.block_size(), double_quant)
            .map_err(|error| Error::stored_tensor(checkpoint.path(), name, error.to_string()))?;
        if !errors.contains_key(name) {
            let module = merging.layout.full_name(name);
            let module = module.strip_suffix(".weight").unwrap_or(&module);
            errors.insert(
                name.to_owned(),
                requantization_error(module, &weight, &merged, &again)?,
            );
        }
        Ok((again, source))
    });
    let mut specs = Vec::new();
    for spec in merging.float_specs(None)? {
        if checkpoint.nf4(&spec.name).is_some() {
            specs.extend(quantized.specs(&spec.name)?);
        } else {
            specs.push(spec);
        }
    }
    let config = checkpoint.config().clone();
    merging.write(folder, config, None, &specs, |spec| {
        match quantized.tensor(spec)? {
            Some(bytes) => Ok(bytes),
            None => merging.tensor(spec),
        }
    })?;
    Ok(errors.into_values().collect())
}

fn requantization_error(
    module: &str,
    before: &Nf4Weight,
    merged: &Tensor,
    after: &Nf4Weight,
) -> Result<RequantizationError> {
    let before = before.dequantize(DType::F32)?.to_f32_vec()?;
    let merged = merged.to_f32_vec()?;
    let after = after.dequantize(DType::F32)?.to_f32_vec()?;
    let norm = |differences: &mut dyn Iterator<Item = f32>| {
        let squares = differences.map(|x| f64::from(x) * f64::from(x));
        squares.sum::<f64>().sqrt()
    };
    let difference = |a: &[f32], b: &[f32]| norm(&mut a.iter().zip(b).map(|(a, b)| a - b));
    let error = difference(&after, &merged);
    Ok(RequantizationError {
        module: module.to_owned(),
        of_weight: error / norm(&mut merged.iter().copied()),
        of_update: error / difference(&merged, &before),
    })
}

struct Merging<'a> {
    checkpoint: &'a Checkpoint,
    adapter: &'a Adapter,
    layout: &'static Layout,
    device: Device,
    /// The embedding, where the head shares its table.
    tied_to: Option<String>,
}

impl<'a> Merging<'a> {
    fn new(checkpoint: &'a Checkpoint, adapter: &'a Adapter) -> Result<Merging<'a>> {
        let (family, config) = families::read_config(checkpoint.config())?;
        let layout = family.layout;
        let embedding = layout.path(layout.embedding);
        Ok(Merging {
            checkpoint,
            adapter,
            layout,
            device: adapter.device(),
            tied_to: config.tie_word_embeddings.then_some(embedding),
        })
    }

    /// The tensors of the merged checkpoint as floats: `dtype`, or as the base stores them.
    fn float_specs(&self, dtype: Option<DType>) -> Result<Vec<TensorSpec>> {
        let mut specs = self
            .checkpoint
            .tensor_names()
            .map(|name| {
                let info = self.checkpoint.info(name)?;
                let mut shape = info.shape.clone();
                if self.was_turned(name) {
                    shape.reverse();
                }
                Ok(TensorSpec {
                    name: name.to_owned(),
                    shape,
                    dtype: dtype.unwrap_or(info.dtype.float_dtype()),
                })
            })
            .collect::<Result<Vec<_>>>()?;
        self.check_biases(&specs)?;
        if let Some(embedding) = self.parted_from() {
            let table = format!("{embedding}.weight");
            let head = format!("{OUTPUT_HEAD}.weight");
            let like = specs
                .iter()
                .find(|spec| self.layout.full_name(&spec.name) == table);
            let like = like.map(|spec| TensorSpec {
                name: head.clone(),
                ..spec.clone()
            });
            specs.retain(|spec| spec.name != head);
            specs.extend(like);
        }
        Ok(specs)
    }

    /// Writes the merged checkpoint with the tokenizer.
    fn write(
        &self,
        folder: &Path,
        mut config: Value,
        dtype: Option<DType>,
        specs: &[TensorSpec],
        contents: impl FnMut(&TensorSpec) -> Result<Vec<u8>>,
    ) -> Result<()> {
        if self.parted_from().is_some() {
            config["tie_word_embeddings"] = false.into();
        }
        atomic_file::write_folder(folder, is_checkpoint_file, |folder| {
            match self.checkpoint.gguf() {
                Some(gguf) => convert::write_companions(
                    gguf,
                    &config,
                    specs.first().map_or(DType::F32, |s| s.dtype),
                    folder,
                )?,
                None => copy_companions(self.checkpoint, config, dtype, folder)?,
            }
            write_weights(folder, specs, SHARD_BYTES, contents)
        })
    }

    /// The embedding, where a head shares its table and the adapter makes the two differ.
    fn parted_from(&self) -> Option<&str> {
        let embedding = self.tied_to.as_deref()?;
        let Adapter {
            modules, trained, ..
        } = self.adapter;
        let adapted = |module: &str| {
            modules.contains_key(module) || trained.get(module).is_some_and(|t| t.weight.is_some())
        };
        let own_tokens = trained.get(OUTPUT_HEAD).is_some_and(|t| t.tokens.is_some());
        let parted = adapted(OUTPUT_HEAD) || adapted(embedding) || own_tokens;
        parted.then_some(embedding)
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

    /// Whether a tensor's floats lie `[in, out]`.
    fn lies_transposed(&self, stored_name: &str) -> bool {
        let name = self.layout.full_name(stored_name);
        let module = name.strip_suffix(".weight");
        module.is_some_and(|module| self.layout.is_transposed(module))
    }

    /// Whether such a tensor was turned to `[out, in]`, as transformers does before it quantizes.
    fn was_turned(&self, stored_name: &str) -> bool {
        self.lies_transposed(stored_name) && self.checkpoint.nf4(stored_name).is_some()
    }

    /// The bytes of one tensor of the merged checkpoint, as floats.
    fn tensor(&self, spec: &TensorSpec) -> Result<Vec<u8>> {
        let name = &spec.name;
        let tensor = match self.merged(name)? {
            Some(merged) => merged,
            None if self.was_turned(name) => {
                self.checkpoint.load(name, &self.device, DType::F32)?
            }
            None => return self.checkpoint.tensor_bytes(name, spec.dtype),
        };
        let tensor = if self.lies_transposed(name) {
            transpose(&tensor)?
        } else {
            tensor
        };
        Ok(tensor.cast(spec.dtype)?.to_bytes()?)
    }

    /// The tensor `stored_name` with the adapter folded in, F32, matrices `[out, in]`; none where it stays as the base
    /// stores it.
    fn merged(&self, stored_name: &str) -> Result<Option<Tensor>> {
        let name = self.layout.full_name(stored_name);
        let (module, part) = name.rsplit_once('.').unwrap_or((&name, ""));
        let update = self.adapter.modules.get(module);
        let trained = self.adapter.trained.get(module);
        let stored = || {
            let tied = self.tied_to.as_ref().filter(|_| module == OUTPUT_HEAD);
            let table = tied.map(|embedding| format!("{embedding}.weight"));
            let source = match &table {
                Some(table) => self.layout.stored_name(self.checkpoint, table),
                None => stored_name,
            };
            let stored = self.checkpoint.load(source, &self.device, DType::F32)?;
            if self.lies_transposed(source) && !self.was_turned(source) {
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
                    let table = with_rows(&Weight::Dense(stored()?), tokens, DType::F32)?;
                    dense(&table)?.try_clone()?
                }
                _ if self.tied_to.is_some() && module == OUTPUT_HEAD => stored()?,
                _ => return Ok(None),
            },
            "bias" => {
                let own = trained.and_then(|trained| trained.bias.as_ref());
                let of_b = update.and_then(|update| Some((update.bias.as_ref()?, update.scaling)));
                if own.is_none() && of_b.is_none() {
                    return Ok(None);
                }
                let mut bias = own.map_or_else(stored, |own| Ok(own.try_clone()?))?;
                if let Some((of_b, scaling)) = of_b {
                    let mut of_b = of_b.try_clone()?;
                    elementwise::scale(&mut of_b, scaling)?;
                    elementwise::add_assign(&mut bias, &of_b)?;
                }
                bias
            }
            _ => return Ok(None),
        };
        Ok(Some(merged))
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

/// Whether a folder's file of this name belongs to the checkpoint in it, and is replaced with it.
pub(crate) fn is_checkpoint_file(name: &str) -> bool {
    name == "config.json" || COMPANIONS.contains(&name) || is_weight_file(name)
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
