//! GGUF to a Hugging Face checkpoint.

use std::path::Path;

use fuselora_tensor::DType;
use serde_json::{Value, json};

use crate::{
    atomic_file,
    checkpoint::{Checkpoint, SHARD_BYTES, TensorSpec, is_weight_file, write_json, write_weights},
    error::{Error, Result},
    gguf::GgufFile,
    tokenizer::TokenizerFiles,
};

/// Files other than weights that a conversion writes.
const FILES: [&str; 5] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
];

/// Writes a GGUF checkpoint as a Hugging Face folder: configuration, weights as `dtype` (f32, f16 or bf16),
/// tokenizer and chat template. A conversion that is in `folder` already is replaced as a whole; other
/// files stay.
///
/// # Errors
/// When the checkpoint is no GGUF file, its tokenizer cannot be rebuilt, or a file cannot be written.
pub fn gguf_to_hugging_face(checkpoint: &Checkpoint, folder: &Path, dtype: DType) -> Result<()> {
    let gguf = checkpoint
        .gguf()
        .ok_or_else(|| Error::file(checkpoint.path(), "is not a GGUF file"))?;
    let specs = checkpoint
        .tensor_names()
        .map(|name| {
            Ok(TensorSpec {
                name: name.to_owned(),
                shape: checkpoint.info(name)?.shape.clone(),
                dtype,
            })
        })
        .collect::<Result<Vec<_>>>()?;
    atomic_file::write_folder(
        folder,
        |name| FILES.contains(&name) || is_weight_file(name),
        |folder| {
            write_companions(gguf, checkpoint.config(), dtype, folder)?;
            write_weights(folder, &specs, SHARD_BYTES, |spec| {
                checkpoint.tensor_bytes(&spec.name, dtype)
            })
        },
    )
}

/// Writes a GGUF's configuration, tokenizer and chat template as a Hugging Face checkpoint of `dtype` has them.
pub(crate) fn write_companions(
    gguf: &GgufFile,
    config: &Value,
    dtype: DType,
    folder: &Path,
) -> Result<()> {
    let tokenizer = TokenizerFiles::from_gguf(gguf)?;
    let mut config = config.clone();
    config["torch_dtype"] = json!(torch_dtype(dtype)?);
    let files = [
        &config,
        &tokenizer.generation,
        &tokenizer.tokenizer,
        &tokenizer.config,
        &tokenizer.special_tokens_map,
    ];
    for (name, value) in FILES.iter().zip(files) {
        write_json(&folder.join(name), value)?;
    }
    Ok(())
}

/// PyTorch's name of a type that weights are written in.
pub(crate) fn torch_dtype(dtype: DType) -> Result<&'static str> {
    match dtype {
        DType::F32 => Ok("float32"),
        DType::F16 => Ok("float16"),
        DType::BF16 => Ok("bfloat16"),
        other => Err(Error::Input(format!(
            "weights cannot be written as {other}; f32, f16 and bf16 can"
        ))),
    }
}
