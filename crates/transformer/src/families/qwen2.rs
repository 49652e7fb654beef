//! Qwen2 and Qwen2.5: Llama's layout with biases on queries, keys and values.

use serde_json::json;

use super::{Family, llama};
use crate::config::{Biases, ConfigJson, DecoderConfig};
use crate::error::Result;

pub(super) const FAMILY: Family = Family {
    model_type: "qwen2",
    gguf_architecture: "qwen2",
    gguf_pairs: false,
    config,
    layout: &llama::LAYOUT,
};

fn config(json: ConfigJson<'_>) -> Result<DecoderConfig> {
    json.require_layer_types("full_attention")?;
    json.require_neutral(&[("use_sliding_window", &[json!(false)])])?;
    llama::decoder(
        json,
        Biases {
            qkv: true,
            ..Biases::default()
        },
        None,
    )
}
