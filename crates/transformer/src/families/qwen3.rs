//! Qwen3: Llama's layout with norms of each head's queries and keys, and heads of a width of their own.

use serde_json::json;

use super::{Family, llama};
use crate::config::{Biases, ConfigJson, DecoderConfig};
use crate::error::Result;

pub(super) const FAMILY: Family = Family {
    model_type: "qwen3",
    gguf_architecture: "qwen3",
    gguf_pairs: false,
    config,
    layout: &llama::LAYOUT,
};

fn config(json: ConfigJson<'_>) -> Result<DecoderConfig> {
    json.require_neutral(&[("use_sliding_window", &[json!(false)])])?;
    json.require_layer_types("full_attention")?;
    let bias = json.bool_or("attention_bias", false)?;
    let biases = Biases {
        qkv: bias,
        output: bias,
        mlp: false,
    };
    Ok(DecoderConfig {
        head_dim: json.size_or("head_dim", Some(128))?,
        qk_norm: true,
        ..llama::decoder(json, biases, None)?
    })
}
