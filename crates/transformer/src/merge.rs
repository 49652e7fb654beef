//! Folding an adapter into its base: `W + scaling·B·A`, and with DoRA `gain ∘ (W + scaling·B·A)`, as PEFT's
//! `merge_and_unload` does.

use std::fs;
use std::path::Path;

use fuselora_tensor::ops::{dora, lora_linear};
use fuselora_tensor::{DType, Weight};

use crate::adapter::{Adapter, LoraWeights};
use crate::atomic_file;
use crate::checkpoint::{
    Checkpoint, SHARD_BYTES, StoredType, TensorSpec, is_weight_file, write_json, write_weights,
};
use crate::convert;
use crate::error::{Error, Result};
use crate::families;
use crate::model::transpose;

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
/// base's tokenizer. Weights are written as `dtype`, or as the base stores them (f32 for a GGUF).
///
/// One weight is in memory at a time. A checkpoint that is in `folder` already is replaced as a whole.
///
/// # Errors
/// An adapter on the head of a model that ties it to the embedding, which one weight cannot hold; a
/// tensor that cannot be read; a file that cannot be written.
pub fn merge_adapter(
    checkpoint: &Checkpoint,
    adapter: &Adapter,
    folder: &Path,
    dtype: Option<DType>,
) -> Result<()> {
    let (family, config) = families::read_config(checkpoint.config())?;
    let layout = family.layout;
    if config.tie_word_embeddings && adapter.modules.contains_key("lm_head") {
        return Err(Error::Adapter(
            "it adapts `lm_head`, which this model shares with its embedding, so it cannot be merged; use it unmerged".into(),
        ));
    }
    let specs = checkpoint
        .tensor_names()
        .map(|name| {
            let info = checkpoint.info(name)?;
            Ok(TensorSpec {
                name: name.to_owned(),
                shape: info.shape.clone(),
                dtype: dtype.unwrap_or(stored_dtype(info.dtype)),
            })
        })
        .collect::<Result<Vec<_>>>()?;
    let replaces =
        |name: &str| name == "config.json" || COMPANIONS.contains(&name) || is_weight_file(name);
    atomic_file::write_folder(folder, replaces, |folder| {
        match checkpoint.gguf() {
            Some(gguf) => convert::write_companions(
                gguf,
                checkpoint.config(),
                specs.first().map_or(DType::F32, |s| s.dtype),
                folder,
            )?,
            None => copy_companions(checkpoint, dtype, folder)?,
        }
        write_weights(folder, &specs, SHARD_BYTES, |spec| {
            let name = layout.full_name(&spec.name);
            let adapted = name.strip_suffix(".weight").and_then(|module| {
                Some((adapter.modules.get(module)?, layout.is_transposed(module)))
            });
            match adapted {
                Some((lora, transposed)) => merged(checkpoint, spec, lora, transposed),
                None => checkpoint.tensor_bytes(&spec.name, spec.dtype),
            }
        })
    })
}

fn merged(
    checkpoint: &Checkpoint,
    spec: &TensorSpec,
    lora: &LoraWeights,
    transposed: bool,
) -> Result<Vec<u8>> {
    let stored = checkpoint.load(&spec.name, lora.a.device(), DType::F32)?;
    let weight = Weight::Dense(if transposed {
        transpose(&stored)?
    } else {
        stored
    });
    let mut merged = lora_linear::merge(&weight, &lora.a, &lora.b, lora.scaling)?;
    if let Some(magnitude) = &lora.magnitude {
        let norm = dora::weight_norm(&weight, &lora.a, &lora.b, lora.scaling)?;
        dora::scale_rows(&mut merged, &dora::gain(magnitude, &norm)?)?;
    }
    let merged = if transposed {
        transpose(&merged)?
    } else {
        merged
    };
    Ok(merged.cast(spec.dtype)?.to_bytes()?)
}

fn stored_dtype(stored: StoredType) -> DType {
    match stored {
        StoredType::F16 => DType::F16,
        StoredType::BF16 => DType::BF16,
        _ => DType::F32,
    }
}

fn copy_companions(checkpoint: &Checkpoint, dtype: Option<DType>, folder: &Path) -> Result<()> {
    let mut config = checkpoint.config().clone();
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
