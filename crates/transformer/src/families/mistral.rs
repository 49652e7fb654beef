//! Mistral: Llama's layout with a sliding window.

use super::{Family, llama};
use crate::config::{Biases, ConfigJson, DecoderConfig};
use crate::error::Result;

pub(super) const FAMILY: Family = Family {
    model_type: "mistral",
    gguf_architecture: "llama",
    gguf_pairs: true,
    config,
    layout: &llama::LAYOUT,
};

fn config(json: ConfigJson<'_>) -> Result<DecoderConfig> {
    let window = json
        .get("sliding_window")
        .map(|_| json.size("sliding_window"))
        .transpose()?;
    json.require_layer_types(if window.is_some() {
        "sliding_attention"
    } else {
        "full_attention"
    })?;
    llama::decoder(json, Biases::default(), window)
}
