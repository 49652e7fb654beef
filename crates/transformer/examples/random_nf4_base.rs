//! Writes a base with random weights in NF4, of the shape of Llama-2-7B or of any `config.json`: for measuring what a
//! model of that size takes. `cargo xtask bench-memory` runs it.
//!
//!     cargo run --release --package fuselora-transformer --example random_nf4_base -- FOLDER [CONFIG.json]
//!
//! Projections are written straight in NF4 with double quantization and were never floats: codes are drawn evenly, as
//! those of a normal distribution are, and `absmax` as the dynamic map has them. Embeddings and head are random bf16,
//! norms are ones. One weight is in memory at a time.

use std::collections::BTreeMap;
use std::path::Path;

use fuselora_tensor::nf4::{Absmax, NESTED_BLOCK_SIZE, NestedAbsmax};
use fuselora_tensor::{DType, Device, Nf4Weight, Tensor, philox};
use fuselora_transformer::adapter::ModuleKind;
use fuselora_transformer::atomic_file;
use fuselora_transformer::checkpoint::{
    SHARD_BYTES, TensorSpec, is_weight_file, nf4_tensors, write_weights,
};
use fuselora_transformer::quantize::{Nf4Options, quantization_config};
use fuselora_transformer::{families, model};
use serde_json::{Value, json};

type Failure = Box<dyn std::error::Error>;

const OPTIONS: Nf4Options = Nf4Options {
    block_size: 64,
    double_quant: true,
};
/// Of the floats around the projections.
const DTYPE: DType = DType::BF16;

fn main() -> Result<(), Failure> {
    let mut arguments = std::env::args().skip(1);
    let (Some(folder), config) = (arguments.next(), arguments.next()) else {
        return Err("which folder? random_nf4_base FOLDER [CONFIG.json]".into());
    };
    let config = match config {
        Some(path) => serde_json::from_slice(&std::fs::read(path)?)?,
        None => llama_2_7b(),
    };
    write(Path::new(&folder), config)
}

fn llama_2_7b() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096,
        "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
        "hidden_act": "silu", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": false, "torch_dtype": "bfloat16",
    })
}

fn write(folder: &Path, mut config: Value) -> Result<(), Failure> {
    let (family, decoder) = families::read_config(&config)?;
    let quantized = fuselora_transformer::quantize::quantized_modules(&config)?;
    config["quantization_config"] = quantization_config(&OPTIONS, DTYPE)?;
    let mut specs = Vec::new();
    // The weight that a tensor is a part of.
    let mut shapes: BTreeMap<String, [usize; 2]> = BTreeMap::new();
    for module in model::modules(family, &decoder) {
        let name = format!("{}.weight", module.name);
        let shape = [module.out_features, module.in_features];
        if quantized.contains(&module.name) {
            let parts = parts(&name, shape)?;
            specs.extend(parts.into_iter().map(|(spec, _)| spec));
            shapes.insert(name, shape);
            continue;
        }
        let shape = match module.kind {
            ModuleKind::Norm => vec![module.out_features],
            ModuleKind::Embedding => vec![module.in_features, module.out_features],
            _ => shape.to_vec(),
        };
        if !(decoder.tie_word_embeddings && module.name == families::OUTPUT_HEAD) {
            let dtype = DTYPE;
            specs.push(TensorSpec { name, shape, dtype });
        }
    }
    let is_replaced = |name: &str| name == "config.json" || is_weight_file(name);
    atomic_file::write_folder(folder, is_replaced, |folder| {
        atomic_file::write_bytes(&folder.join("config.json"), format!("{config:#}\n"))?;
        write_weights(folder, &specs, SHARD_BYTES, |spec| {
            let weight = shapes.iter().find(|(name, _)| spec.name.starts_with(*name));
            let Some((name, &shape)) = weight else {
                return Ok(floats(spec));
            };
            let parts = parts(name, shape)?;
            let part = parts.into_iter().find(|(part, _)| part.name == spec.name);
            Ok(part.map(|(_, bytes)| bytes).unwrap_or_default())
        })
    })?;
    Ok(())
}

/// The tensors of a random weight; the same each time that they are asked for.
fn parts(
    name: &str,
    shape: [usize; 2],
) -> fuselora_transformer::error::Result<Vec<(TensorSpec, Vec<u8>)>> {
    let cpu = Device::cpu();
    let elements = shape[0] * shape[1];
    let blocks = elements.div_ceil(OPTIONS.block_size);
    let nested_blocks = blocks.div_ceil(NESTED_BLOCK_SIZE);
    let bytes = |count: usize, stream| {
        Tensor::from_bytes(&cpu, [count], DType::U8, &random(name, stream, count))
    };
    // A tenth of the largest magnitude of 64 values of a deviation of 0.02, around it.
    let quant_map: Vec<f32> = (0..256).map(|code| (code as f32 - 128.0) / 128.0).collect();
    let absmax = Absmax::Nested(Box::new(NestedAbsmax {
        absmax: bytes(blocks, 1)?,
        quant_map: Tensor::from_f32(&cpu, [256], &quant_map)?,
        nested_absmax: Tensor::from_f32(&cpu, [nested_blocks], &vec![0.005; nested_blocks])?,
        offset: 0.05,
    }));
    let packed = bytes(elements.div_ceil(2), 0)?;
    let weight = Nf4Weight::new(shape, OPTIONS.block_size, packed, absmax)?;
    nf4_tensors(name, &weight, DTYPE)
}

/// Ones for a norm, and else values of a deviation of about 0.02.
fn floats(spec: &TensorSpec) -> Vec<u8> {
    let count = spec.shape.iter().product::<usize>();
    let value = |x: f32| half::bf16::from_f32(x).to_le_bytes();
    if spec.shape.len() == 1 {
        return value(1.0).repeat(count);
    }
    let random = random(&spec.name, 0, count);
    random
        .into_iter()
        .flat_map(|byte| value((f32::from(byte) - 127.5) * (0.02 * 3.46 / 255.0)))
        .collect()
}

/// Reproducible bytes.
fn random(name: &str, stream: u32, count: usize) -> Vec<u8> {
    let key = [
        name.bytes()
            .fold(7, |key: u32, byte| key.wrapping_mul(31) ^ u32::from(byte)),
        stream,
    ];
    let words =
        (0..count.div_ceil(16)).flat_map(|i| philox::philox4x32_10(key, [i as u32, 0, 0, 0]));
    let mut bytes: Vec<u8> = words.flat_map(u32::to_le_bytes).collect();
    bytes.truncate(count);
    bytes
}
