//! Writing a checkpoint with its projections in NF4, in the layout of bitsandbytes (`docs/quantization.md`).

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use fuselora_tensor::nf4::NESTED_BLOCK_SIZE;
use fuselora_tensor::{DType, Device, Nf4Weight};
use serde_json::{Value, json};

use crate::adapter::ModuleKind;
use crate::atomic_file;
use crate::checkpoint::{
    Checkpoint, Nf4Parts, SHARD_BYTES, TensorSpec, nf4_tensors, write_weights,
};
use crate::convert;
use crate::error::{Error, Result};
use crate::families::{self, OUTPUT_HEAD};
use crate::merge::{copy_companions, is_checkpoint_file};
use crate::model::{modules, transpose};

/// How weights are quantized.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nf4Options {
    /// Elements of a block: a power of two from 32 to 4096.
    pub block_size: usize,
    /// Whether the statistics are quantized too.
    pub double_quant: bool,
}

impl Nf4Options {
    /// Bytes of a weight of so many elements.
    pub fn size_in_bytes(&self, elements: usize) -> usize {
        let blocks = elements.div_ceil(self.block_size);
        let f32_bytes = DType::F32.size_in_bytes();
        let statistics = if self.double_quant {
            blocks + (256 + blocks.div_ceil(NESTED_BLOCK_SIZE)) * f32_bytes
        } else {
            blocks * f32_bytes
        };
        elements.div_ceil(2) + statistics
    }
}

/// The projections that transformers quantizes: all but the output head.
///
/// # Errors
/// A configuration that is not supported.
pub fn quantized_modules(config: &Value) -> Result<BTreeSet<String>> {
    let (family, config) = families::read_config(config)?;
    let projections = modules(family, &config).into_iter().filter(|module| {
        matches!(module.kind, ModuleKind::Linear | ModuleKind::Conv1d) && module.name != OUTPUT_HEAD
    });
    Ok(projections.map(|module| module.name).collect())
}

/// A weight as it is quantized: read as `dtype`, with GPT-2's matrices turned to `[out_features, in_features]`.
pub(crate) fn quantize_weight(
    checkpoint: &Checkpoint,
    name: &str,
    dtype: DType,
    transposed: bool,
    options: &Nf4Options,
) -> Result<Nf4Weight> {
    let mut source = checkpoint.load(name, &Device::cpu(), dtype)?;
    if transposed {
        source = transpose(&source)?;
    }
    let weight = Nf4Weight::quantize(&source, options.block_size, options.double_quant);
    drop(source);
    checkpoint.release(name)?;
    weight.map_err(|error| Error::stored_tensor(checkpoint.path(), name, error.to_string()))
}

/// Writes `checkpoint` with its projections in NF4 to `folder`, with the tokenizer. What is not quantized is written
/// as `dtype`, or as it is stored (f32 for a GGUF); what is quantized is rounded to that first. `compute_dtype` is what
/// transformers will compute in.
///
/// Memory is bounded by the largest weight, which is quantized anew where its parts lie apart in the file. A checkpoint
/// that is in `folder` already is replaced as a whole.
///
/// # Errors
/// A checkpoint that is quantized already; a weight with an element that is not finite; a file that cannot be read or
/// written.
pub fn quantize_checkpoint(
    checkpoint: &Checkpoint,
    folder: &Path,
    options: &Nf4Options,
    dtype: Option<DType>,
    compute_dtype: DType,
) -> Result<()> {
    if checkpoint.nf4_source_dtype().is_some() {
        let message = "is in NF4 already; give the checkpoint that it was made of";
        return Err(Error::file(checkpoint.path(), message));
    }
    let mut config = checkpoint.config().clone();
    config["quantization_config"] = quantization_config(options, compute_dtype)?;
    let (family, _) = families::read_config(checkpoint.config())?;
    let layout = family.layout;
    let modules = quantized_modules(checkpoint.config())?;
    let stored_as = |name: &str| -> Result<DType> {
        Ok(dtype.unwrap_or(checkpoint.info(name)?.dtype.float_dtype()))
    };
    let mut quantized = Nf4Tensors::new(|name| {
        let dtype = stored_as(name)?;
        let transposed = layout.is_transposed(module_of(&layout.full_name(name)));
        let weight = quantize_weight(checkpoint, name, dtype, transposed, options)?;
        Ok((weight, dtype))
    });
    let mut specs = Vec::new();
    for name in checkpoint.tensor_names() {
        let full_name = layout.full_name(name);
        if full_name.ends_with(".weight") && modules.contains(module_of(&full_name)) {
            specs.extend(quantized.specs(name)?);
        } else {
            specs.push(TensorSpec {
                name: name.to_owned(),
                shape: checkpoint.info(name)?.shape.clone(),
                dtype: stored_as(name)?,
            });
        }
    }
    atomic_file::write_folder(folder, is_checkpoint_file, |folder| {
        match checkpoint.gguf() {
            Some(gguf) => {
                convert::write_companions(gguf, &config, dtype.unwrap_or(DType::F32), folder)?;
            }
            None => copy_companions(checkpoint, config, dtype, folder)?,
        }
        write_weights(folder, &specs, SHARD_BYTES, |spec| {
            match quantized.tensor(spec)? {
                Some(bytes) => Ok(bytes),
                None => checkpoint.tensor_bytes(&spec.name, spec.dtype),
            }
        })
    })
}

fn module_of(weight: &str) -> &str {
    weight.strip_suffix(".weight").unwrap_or(weight)
}

/// The tensors of a checkpoint's NF4 weights, in the order that a writer asks for them. Weights are made one at a time,
/// and anew where their parts lie apart in the file, so that memory is bounded by the largest.
pub(crate) struct Nf4Tensors<F> {
    /// Makes a weight, by its name in the checkpoint, and says what type it had before.
    make: F,
    /// The weight that each tensor is a part of.
    weight_of: BTreeMap<String, String>,
    last: Option<(String, Nf4Parts)>,
}

impl<F: FnMut(&str) -> Result<(Nf4Weight, DType)>> Nf4Tensors<F> {
    pub(crate) fn new(make: F) -> Nf4Tensors<F> {
        Nf4Tensors {
            make,
            weight_of: BTreeMap::new(),
            last: None,
        }
    }

    /// What the weight `name` is stored as.
    pub(crate) fn specs(&mut self, name: &str) -> Result<Vec<TensorSpec>> {
        let parts = self.parts(name)?.iter();
        let specs: Vec<TensorSpec> = parts.map(|(spec, _)| spec.clone()).collect();
        let names = specs.iter().map(|spec| spec.name.clone());
        self.weight_of
            .extend(names.map(|part| (part, name.to_owned())));
        Ok(specs)
    }

    /// The bytes of a tensor, where it is one of [`Nf4Tensors::specs`].
    pub(crate) fn tensor(&mut self, spec: &TensorSpec) -> Result<Option<Vec<u8>>> {
        let Some(weight) = self.weight_of.get(&spec.name).cloned() else {
            return Ok(None);
        };
        let mut parts = self.parts(&weight)?.iter();
        let part = parts.find(|(part, _)| part.name == spec.name);
        Ok(part.map(|(_, bytes)| bytes.clone()))
    }

    fn parts(&mut self, name: &str) -> Result<&Nf4Parts> {
        let last = self.last.take().filter(|(last, _)| last == name);
        let last = match last {
            Some(last) => last,
            None => {
                let (weight, source) = (self.make)(name)?;
                (name.to_owned(), nf4_tensors(name, &weight, source)?)
            }
        };
        Ok(&self.last.insert(last).1)
    }
}

/// The `quantization_config` that transformers writes into `config.json`. Where it names no modules to skip, the output
/// head alone is skipped.
///
/// # Errors
/// A compute type that is no float type.
pub fn quantization_config(options: &Nf4Options, compute_dtype: DType) -> Result<Value> {
    Ok(json!({
        "_load_in_4bit": true,
        "_load_in_8bit": false,
        "bnb_4bit_compute_dtype": convert::torch_dtype(compute_dtype)?,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": options.double_quant,
        "llm_int8_enable_fp32_cpu_offload": false,
        "llm_int8_has_fp16_weight": false,
        "llm_int8_skip_modules": null,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": true,
        "load_in_8bit": false,
        "quant_method": "bitsandbytes",
    }))
}
