//! Writing a checkpoint with its projections in NF4, in the layout of bitsandbytes (`docs/quantization.md`).

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use fuselora_tensor::{DType, Device, Nf4Weight};
use serde_json::{Value, json};

use crate::adapter::ModuleKind;
use crate::atomic_file;
use crate::checkpoint::{
    Checkpoint, Nf4Parts, SHARD_BYTES, TensorSpec, is_weight_file, nf4_parts, write_weights,
};
use crate::convert;
use crate::error::{Error, Result};
use crate::families::{self, Layout, OUTPUT_HEAD};
use crate::merge::{COMPANIONS, copy_companions};
use crate::model::{modules, transpose};

/// How weights are quantized.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nf4Options {
    /// Elements of a block: a power of two from 32 to 4096.
    pub block_size: usize,
    /// Whether the statistics are quantized too.
    pub double_quant: bool,
}

/// The projections that transformers quantizes: all but the output head.
pub(crate) fn quantized_modules(config: &Value) -> Result<BTreeSet<String>> {
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
    let mut quantizing = Quantizing::new(checkpoint, options)?;
    let mut specs = Vec::new();
    for name in checkpoint.tensor_names() {
        let info = checkpoint.info(name)?;
        let dtype = dtype.unwrap_or(info.dtype.float_dtype());
        if quantizing.names(name) {
            quantizing.dtypes.insert(name.to_owned(), dtype);
            let parts = quantizing.parts(name)?;
            specs.extend(parts.iter().map(|(spec, _)| spec.clone()));
        } else {
            specs.push(TensorSpec {
                name: name.to_owned(),
                shape: info.shape.clone(),
                dtype,
            });
        }
    }
    let replaces =
        |name: &str| name == "config.json" || COMPANIONS.contains(&name) || is_weight_file(name);
    atomic_file::write_folder(folder, replaces, |folder| {
        match checkpoint.gguf() {
            Some(gguf) => {
                convert::write_companions(gguf, &config, dtype.unwrap_or(DType::F32), folder)?;
            }
            None => copy_companions(checkpoint, config, dtype, folder)?,
        }
        write_weights(folder, &specs, SHARD_BYTES, |spec| quantizing.tensor(spec))
    })
}

struct Quantizing<'a> {
    checkpoint: &'a Checkpoint,
    layout: &'static Layout,
    options: &'a Nf4Options,
    modules: BTreeSet<String>,
    /// What each weight is read as, by its name in the checkpoint.
    dtypes: BTreeMap<String, DType>,
    /// The weight that was quantized last.
    last: Option<(String, Nf4Parts)>,
}

impl<'a> Quantizing<'a> {
    fn new(checkpoint: &'a Checkpoint, options: &'a Nf4Options) -> Result<Quantizing<'a>> {
        let (family, _) = families::read_config(checkpoint.config())?;
        Ok(Quantizing {
            checkpoint,
            layout: family.layout,
            options,
            modules: quantized_modules(checkpoint.config())?,
            dtypes: BTreeMap::new(),
            last: None,
        })
    }

    /// Whether the tensor `stored` is a weight to quantize.
    fn names(&self, stored: &str) -> bool {
        let name = self.layout.full_name(stored);
        let module = name.strip_suffix(".weight");
        module.is_some_and(|module| self.modules.contains(module))
    }

    /// The parts of a weight.
    fn parts(&mut self, name: &str) -> Result<&Nf4Parts> {
        if self.last.as_ref().is_none_or(|(last, _)| last != name) {
            let dtype = self.dtypes[name];
            let full_name = self.layout.full_name(name);
            let module = full_name.trim_end_matches(".weight");
            let transposed = self.layout.is_transposed(module);
            self.last = None;
            let weight = quantize_weight(self.checkpoint, name, dtype, transposed, self.options)?;
            self.last = Some((name.to_owned(), nf4_parts(name, &weight, dtype)?));
        }
        match &self.last {
            Some((_, parts)) => Ok(parts),
            None => unreachable!("it was just set"),
        }
    }

    /// The bytes of a tensor of the new checkpoint.
    fn tensor(&mut self, spec: &TensorSpec) -> Result<Vec<u8>> {
        let weight = spec
            .name
            .split_once(".weight")
            .map(|(module, _)| format!("{module}.weight"))
            .filter(|weight| self.dtypes.contains_key(weight));
        let Some(weight) = weight else {
            return self.checkpoint.tensor_bytes(&spec.name, spec.dtype);
        };
        let parts = self.parts(&weight)?;
        let part = parts.iter().find(|(part, _)| part.name == spec.name);
        part.map(|(_, bytes)| bytes.clone())
            .ok_or_else(|| Error::stored_tensor(self.checkpoint.path(), &spec.name, "is missing"))
    }
}

/// What transformers writes into `config.json`. Where no modules are to be skipped it skips the output head alone.
fn quantization_config(options: &Nf4Options, compute_dtype: DType) -> Result<Value> {
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
