//! Llama 1 to 3 and what follows their layout (SmolLM2 and others).

use serde_json::json;

use super::{AttentionNames, Family, Layout, MlpNames};
use crate::config::{Biases, ConfigJson, DecoderConfig, MlpKind, NormKind, Positions};
use crate::error::Result;

pub(super) const FAMILY: Family = Family {
    model_type: "llama",
    gguf_architecture: "llama",
    gguf_pairs: true,
    config,
    layout: &LAYOUT,
};

/// The names of Llama's tensors, which many families share.
pub(super) const LAYOUT: Layout = Layout {
    base: "model",
    embedding: "embed_tokens",
    positions: None,
    blocks: "layers",
    norm: "norm",
    input_norm: "input_layernorm",
    attention: AttentionNames::Split(["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
    attention_output: "self_attn.o_proj",
    post_attention_norm: "post_attention_layernorm",
    mlp: MlpNames {
        gate: Some("mlp.gate_proj"),
        up: "mlp.up_proj",
        down: "mlp.down_proj",
    },
    transposed: false,
};

fn config(json: ConfigJson<'_>) -> Result<DecoderConfig> {
    json.require_layer_types("full_attention")?;
    let attention_bias = json.bool_or("attention_bias", false)?;
    let biases = Biases {
        qkv: attention_bias,
        output: attention_bias,
        mlp: json.bool_or("mlp_bias", false)?,
    };
    decoder(json, biases, None)
}

/// The keys that the families in Llama's layout share.
pub(super) fn decoder(
    json: ConfigJson<'_>,
    biases: Biases,
    sliding_window: Option<usize>,
) -> Result<DecoderConfig> {
    json.require_neutral(&[
        ("hidden_act", &[json!("silu"), json!("swish")]),
        ("partial_rotary_factor", &[json!(1)]),
        ("rope_interleaved", &[json!(false)]),
        ("use_qk_norm", &[json!(false)]),
        ("qk_layernorm", &[json!(false)]),
        ("clip_qkv", &[]),
        ("attn_logit_softcapping", &[]),
        ("final_logit_softcapping", &[]),
        ("logit_scale", &[json!(1)]),
        ("embedding_multiplier", &[json!(1)]),
        ("residual_multiplier", &[json!(1)]),
        ("attention_multiplier", &[]),
        ("num_experts", &[json!(0)]),
        ("num_local_experts", &[json!(0)]),
        ("attention_chunk_size", &[]),
        ("no_rope_layers", &[]),
    ])?;
    let hidden_size = json.size("hidden_size")?;
    let num_heads = json.size("num_attention_heads")?;
    Ok(DecoderConfig {
        vocab_size: json.size("vocab_size")?,
        hidden_size,
        intermediate_size: json.size("intermediate_size")?,
        num_layers: json.size("num_hidden_layers")?,
        num_heads,
        num_kv_heads: json.size_or("num_key_value_heads", Some(num_heads))?,
        head_dim: json.size_or("head_dim", Some(hidden_size / num_heads))?,
        max_position_embeddings: json.size_or("max_position_embeddings", Some(2048))?,
        norm: NormKind::Rms,
        norm_eps: json.number_or("rms_norm_eps", 1e-6)? as f32,
        qk_norm: false,
        mlp: MlpKind::SwiGlu,
        biases,
        positions: Positions::Rotary(json.rope()?),
        sliding_window,
        tie_word_embeddings: json.bool_or("tie_word_embeddings", false)?,
    })
}
