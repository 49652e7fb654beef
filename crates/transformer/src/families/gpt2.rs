//! GPT-2: layer norms, learned positions, a fused projection in front of attention, matrices stored `[in, out]`.

use fuselora_tensor::ops::gelu::GeluKind;
use serde_json::json;

use super::{AttentionNames, Family, Layout, MlpNames};
use crate::config::{Biases, ConfigJson, DecoderConfig, MlpKind, NormKind, Positions};
use crate::error::{Error, Result};

pub(super) const FAMILY: Family = Family {
    model_type: "gpt2",
    gguf_architecture: "gpt2",
    gguf_pairs: false,
    config,
    layout: &Layout {
        base: "transformer",
        embedding: "wte",
        positions: Some("wpe"),
        blocks: "h",
        norm: "ln_f",
        input_norm: "ln_1",
        attention: AttentionNames::Fused("attn.c_attn"),
        attention_output: "attn.c_proj",
        post_attention_norm: "ln_2",
        mlp: MlpNames {
            gate: None,
            up: "mlp.c_fc",
            down: "mlp.c_proj",
        },
        transposed: true,
    },
};

fn config(json: ConfigJson<'_>) -> Result<DecoderConfig> {
    json.require_neutral(&[
        ("scale_attn_weights", &[json!(true)]),
        ("scale_attn_by_inverse_layer_idx", &[json!(false)]),
        ("add_cross_attention", &[json!(false)]),
    ])?;
    let hidden_size = json.size("n_embd")?;
    let num_heads = json.size("n_head")?;
    if !hidden_size.is_multiple_of(num_heads) {
        return Err(Error::config(format!(
            "`n_embd` ({hidden_size}) must be a multiple of `n_head` ({num_heads})"
        )));
    }
    let activation = match json.get("activation_function") {
        None => "gelu_new",
        Some(_) => json.string("activation_function")?,
    };
    let gelu = match activation {
        "gelu_new" | "gelu_pytorch_tanh" => GeluKind::Tanh,
        "gelu" => GeluKind::Erf,
        other => {
            return Err(Error::config(format!(
                "`activation_function` is \"{other}\", which is not supported; supported: gelu, gelu_new, gelu_pytorch_tanh"
            )));
        }
    };
    Ok(DecoderConfig {
        vocab_size: json.size("vocab_size")?,
        hidden_size,
        intermediate_size: json.size_or("n_inner", Some(4 * hidden_size))?,
        num_layers: json.size("n_layer")?,
        num_heads,
        num_kv_heads: num_heads,
        head_dim: hidden_size / num_heads,
        max_position_embeddings: json.size_or("n_positions", Some(1024))?,
        norm: NormKind::Layer,
        norm_eps: json.number_or("layer_norm_epsilon", 1e-5)? as f32,
        qk_norm: false,
        mlp: MlpKind::Gelu(gelu),
        biases: Biases {
            qkv: true,
            output: true,
            mlp: true,
        },
        positions: Positions::Learned,
        sliding_window: None,
        tie_word_embeddings: json.bool_or("tie_word_embeddings", true)?,
    })
}
