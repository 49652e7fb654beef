//! The architecture `llama` of GGUF in Hugging Face's terms: configuration and tensor names.
//!
//! Key names: llama.cpp's `gguf-py/gguf/constants.py`. Its converter reorders the rows of q and k within
//! each head, from rotary halves to neighbouring pairs (`LlamaModel.permute` in `convert_hf_to_gguf.py`);
//! that is undone here.

use serde_json::{Map, Value, json};

use super::metadata::Metadata;
use crate::checkpoint::RowOrder;

/// Sizes that a llama file declares.
struct Sizes {
    hidden: u64,
    heads: u64,
    kv_heads: u64,
    head_dim: u64,
}

fn sizes(metadata: &Metadata) -> Result<Sizes, String> {
    let hidden = required(metadata, "llama.embedding_length")?;
    let heads = required(metadata, "llama.attention.head_count")?;
    let kv_heads = metadata
        .unsigned("llama.attention.head_count_kv")
        .unwrap_or(heads);
    let head_dim = metadata
        .unsigned("llama.attention.key_length")
        .unwrap_or(hidden / heads);
    if kv_heads == 0 || head_dim == 0 || !head_dim.is_multiple_of(2) {
        return Err(format!(
            "declares {kv_heads} key heads of width {head_dim}; at least 1 and an even width are needed"
        ));
    }
    Ok(Sizes {
        hidden,
        heads,
        kv_heads,
        head_dim,
    })
}

/// A positive size that must be there.
fn required(metadata: &Metadata, key: &str) -> Result<u64, String> {
    match metadata.unsigned(key) {
        Some(value @ 1..=0x7fff_ffff) => Ok(value),
        Some(value) => Err(format!("`{key}` is {value}, which is no size")),
        None => Err(format!("has no metadata `{key}`")),
    }
}

/// `config.json` as transformers writes it for a `LlamaForCausalLM`.
pub(super) fn config(
    metadata: &Metadata,
    vocab_size: usize,
    tied: bool,
    biased: bool,
    rope_factors: Option<&[f32]>,
) -> Result<Value, String> {
    let sizes = sizes(metadata)?;
    if let Some(experts @ 1..) = metadata.unsigned("llama.expert_count") {
        return Err(format!(
            "is a mixture of {experts} experts, which is not supported"
        ));
    }
    if metadata
        .unsigned("llama.rope.dimension_count")
        .is_some_and(|rotary| rotary != sizes.head_dim)
    {
        return Err(
            "rotates only part of each head (`llama.rope.dimension_count`), which is not supported"
                .into(),
        );
    }
    let value_length = metadata.unsigned("llama.attention.value_length");
    if value_length.is_some_and(|width| width != sizes.head_dim) {
        return Err(
            "has value heads of another width than its key heads, which is not supported".into(),
        );
    }
    let epsilon = metadata
        .float("llama.attention.layer_norm_rms_epsilon")
        .ok_or("has no metadata `llama.attention.layer_norm_rms_epsilon`")?;
    let mut config = Map::from_iter([
        ("architectures".to_owned(), json!(["LlamaForCausalLM"])),
        ("model_type".to_owned(), json!("llama")),
        ("vocab_size".to_owned(), json!(vocab_size)),
        ("hidden_size".to_owned(), json!(sizes.hidden)),
        (
            "intermediate_size".to_owned(),
            json!(required(metadata, "llama.feed_forward_length")?),
        ),
        (
            "num_hidden_layers".to_owned(),
            json!(required(metadata, "llama.block_count")?),
        ),
        ("num_attention_heads".to_owned(), json!(sizes.heads)),
        ("num_key_value_heads".to_owned(), json!(sizes.kv_heads)),
        ("head_dim".to_owned(), json!(sizes.head_dim)),
        ("hidden_act".to_owned(), json!("silu")),
        (
            "max_position_embeddings".to_owned(),
            json!(required(metadata, "llama.context_length")?),
        ),
        ("rms_norm_eps".to_owned(), json!(shortest(epsilon))),
        (
            "rope_theta".to_owned(),
            json!(shortest(
                metadata.float("llama.rope.freq_base").unwrap_or(10_000.0)
            )),
        ),
        (
            "rope_scaling".to_owned(),
            rope_scaling(metadata, &sizes, rope_factors)?,
        ),
        ("attention_bias".to_owned(), json!(biased)),
        ("mlp_bias".to_owned(), json!(false)),
        ("tie_word_embeddings".to_owned(), json!(tied)),
    ]);
    for (key, token) in [
        ("bos_token_id", "bos"),
        ("eos_token_id", "eos"),
        ("pad_token_id", "padding"),
    ] {
        config.insert(
            key.into(),
            json!(metadata.token(&format!("tokenizer.ggml.{token}_token_id"))),
        );
    }
    Ok(Value::Object(config))
}

/// The f64 with the fewest digits that is this f32: GGUF stores 1e-5 as an f32, the config means 1e-5.
fn shortest(value: f64) -> f64 {
    (value as f32).to_string().parse().unwrap_or(value)
}

fn rope_scaling(
    metadata: &Metadata,
    sizes: &Sizes,
    factors: Option<&[f32]>,
) -> Result<Value, String> {
    if let Some(factors) = factors {
        return llama3_scaling(metadata, sizes, factors);
    }
    match metadata.string("llama.rope.scaling.type").unwrap_or("none") {
        "none" => Ok(Value::Null),
        "linear" => {
            let factor = metadata
                .float("llama.rope.scaling.factor")
                .ok_or("has no `llama.rope.scaling.factor`")?;
            Ok(json!({ "rope_type": "linear", "factor": shortest(factor) }))
        }
        other => Err(format!(
            "scales its rotary embeddings by \"{other}\"; none, linear and Llama 3's are supported"
        )),
    }
}

/// Finds the parameters of Llama 3's rule from the divisors that it gave, and proves them by recomputing.
///
/// All published models use 1, 4 and 8192 for the last three; the factor (8 or 32) is the largest divisor.
fn llama3_scaling(metadata: &Metadata, sizes: &Sizes, factors: &[f32]) -> Result<Value, String> {
    const LOW: f64 = 1.0;
    const HIGH: f64 = 4.0;
    const ORIGINAL: f64 = 8192.0;
    let theta = metadata.float("llama.rope.freq_base").unwrap_or(10_000.0);
    let factor = f64::from(factors.iter().copied().fold(1.0, f32::max));
    let expected = |i: usize| {
        let wavelength =
            2.0 * std::f64::consts::PI * theta.powf(2.0 * i as f64 / sizes.head_dim as f64);
        if wavelength < ORIGINAL / HIGH {
            1.0
        } else if wavelength > ORIGINAL / LOW {
            factor
        } else {
            let smooth = (ORIGINAL / wavelength - LOW) / (HIGH - LOW);
            1.0 / ((1.0 - smooth) / factor + smooth)
        }
    };
    let fits = factors.len() as u64 == sizes.head_dim / 2
        && factors
            .iter()
            .enumerate()
            .all(|(i, &found)| (f64::from(found) / expected(i) - 1.0).abs() < 1e-4);
    if !fits {
        return Err("has a tensor `rope_freqs.weight` that does not follow Llama 3's rule, which is not supported".into());
    }
    Ok(json!({
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": LOW,
        "high_freq_factor": HIGH,
        "original_max_position_embeddings": ORIGINAL as u64,
    }))
}

/// The Hugging Face name of a tensor, and how its rows are ordered; `None` for a name that llama has not.
pub(super) fn tensor(
    metadata: &Metadata,
    name: &str,
) -> Result<Option<(String, RowOrder)>, String> {
    let whole = match name {
        "token_embd.weight" => Some("model.embed_tokens.weight"),
        "output_norm.weight" => Some("model.norm.weight"),
        "output.weight" => Some("lm_head.weight"),
        _ => None,
    };
    if let Some(whole) = whole {
        return Ok(Some((whole.to_owned(), RowOrder::AsStored)));
    }
    let Some((block, rest)) = name
        .strip_prefix("blk.")
        .and_then(|rest| rest.split_once('.'))
    else {
        return Ok(None);
    };
    let Some((part, kind @ ("weight" | "bias"))) = rest.rsplit_once('.') else {
        return Ok(None);
    };
    let module = match part {
        "attn_norm" => "input_layernorm",
        "attn_q" => "self_attn.q_proj",
        "attn_k" => "self_attn.k_proj",
        "attn_v" => "self_attn.v_proj",
        "attn_output" => "self_attn.o_proj",
        "ffn_norm" => "post_attention_layernorm",
        "ffn_gate" => "mlp.gate_proj",
        "ffn_up" => "mlp.up_proj",
        "ffn_down" => "mlp.down_proj",
        _ => return Ok(None),
    };
    if block.parse::<u32>().is_err() {
        return Ok(None);
    }
    let order = match part {
        "attn_q" | "attn_k" => RowOrder::PairsToHalves {
            head_dim: sizes(metadata)?.head_dim as usize,
        },
        _ => RowOrder::AsStored,
    };
    Ok(Some((
        format!("model.layers.{block}.{module}.{kind}"),
        order,
    )))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::MetadataValue;

    fn metadata(changes: &[(&str, MetadataValue)]) -> Metadata {
        let sizes = [
            ("llama.embedding_length", 2048),
            ("llama.attention.head_count", 32),
            ("llama.attention.head_count_kv", 8),
            ("llama.feed_forward_length", 8192),
            ("llama.block_count", 16),
            ("llama.context_length", 131_072),
        ];
        let mut metadata = Metadata::default();
        for (key, size) in sizes {
            metadata.0.insert(key.into(), MetadataValue::Unsigned(size));
        }
        metadata.0.insert(
            "llama.rope.freq_base".into(),
            MetadataValue::Float(500_000.0),
        );
        metadata.0.insert(
            "llama.attention.layer_norm_rms_epsilon".into(),
            MetadataValue::Float(f64::from(1e-5f32)),
        );
        metadata.0.extend(
            changes
                .iter()
                .map(|(key, value)| (key.to_string(), value.clone())),
        );
        metadata
    }

    fn read(changes: &[(&str, MetadataValue)], factors: Option<&[f32]>) -> Result<Value, String> {
        config(&metadata(changes), 128_256, true, false, factors)
    }

    #[test]
    fn llama3_scaling_is_found_in_its_divisors() {
        // transformers 5.24: the default frequencies over those of rope_type llama3, factor 32.
        let mut factors = [1.0f32; 32];
        factors[15..18].copy_from_slice(&[1.651_329, 3.292_263, 9.666_73]);
        factors[18..].fill(32.0);
        let scaling = read(&[], Some(&factors)).unwrap()["rope_scaling"].clone();
        let wanted = json!({
            "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        });
        assert_eq!(scaling, wanted);
        factors[16] = 3.4;
        assert!(
            read(&[], Some(&factors))
                .unwrap_err()
                .contains("does not follow Llama 3's rule")
        );
        assert!(read(&[], Some(&factors[..31])).is_err());
    }

    #[test]
    fn configurations_that_would_be_guesses_are_refused() {
        use MetadataValue::{Float, String, Unsigned};
        assert_eq!(read(&[], None).unwrap()["head_dim"], 64);
        let linear = [
            ("llama.rope.scaling.type", String("linear".into())),
            ("llama.rope.scaling.factor", Float(4.0)),
        ];
        let scaling = read(&linear, None).unwrap()["rope_scaling"].clone();
        assert_eq!(scaling, json!({ "rope_type": "linear", "factor": 4.0 }));
        let cases = [
            ("llama.rope.scaling.type", String("yarn".into()), "\"yarn\""),
            ("llama.expert_count", Unsigned(8), "8 experts"),
            (
                "llama.rope.dimension_count",
                Unsigned(32),
                "rotates only part",
            ),
            ("llama.attention.value_length", Unsigned(128), "value heads"),
            (
                "llama.attention.head_count",
                Unsigned(0),
                "`llama.attention.head_count` is 0",
            ),
            ("llama.attention.key_length", Unsigned(7), "even width"),
            (
                "llama.block_count",
                Float(1.0),
                "no metadata `llama.block_count`",
            ),
        ];
        for (key, value, expected) in cases {
            let error = read(&[(key, value)], None).unwrap_err();
            assert!(error.contains(expected), "{key}: {error}");
        }
    }
}
