//! The decoder families, one small file each: from a `config.json` to the mathematics, and the
//! names of the tensors.

use crate::checkpoint::Checkpoint;
use crate::config::{ConfigJson, DecoderConfig};
use crate::error::{Error, Result};

mod gpt2;
mod llama;
mod mistral;
mod qwen2;
mod qwen3;

/// One family of checkpoints.
pub struct Family {
    /// `model_type` in `config.json`.
    pub model_type: &'static str,
    /// `general.architecture` in GGUF.
    pub gguf_architecture: &'static str,
    /// Whether GGUF holds the rows of queries and keys in the order of neighbouring rotary pairs.
    pub gguf_pairs: bool,
    /// Reads the configuration.
    pub config: fn(ConfigJson<'_>) -> Result<DecoderConfig>,
    /// The names of its tensors.
    pub layout: &'static Layout,
}

/// Module paths of a family, and how its matrices are stored.
pub struct Layout {
    /// The module that holds everything but the head. Checkpoints of that module alone leave its name out.
    pub base: &'static str,
    /// The token embedding in it.
    pub embedding: &'static str,
    /// The table of learned positions, where there is one.
    pub positions: Option<&'static str>,
    /// The list of blocks.
    pub blocks: &'static str,
    /// The norm in front of the head.
    pub norm: &'static str,
    /// In a block: the norm before attention.
    pub input_norm: &'static str,
    /// In a block: queries, keys and values.
    pub attention: AttentionNames,
    /// In a block: the attention's output.
    pub attention_output: &'static str,
    /// In a block: the norm before the MLP.
    pub post_attention_norm: &'static str,
    /// In a block: the MLP's projections.
    pub mlp: MlpNames,
    /// Whether blocks store their matrices `[in, out]`, as GPT-2's Conv1D does.
    pub transposed: bool,
}

/// Names of the projections in front of attention.
pub enum AttentionNames {
    /// Queries, keys and values apart.
    Split([&'static str; 3]),
    /// One projection whose output is queries, keys and values side by side.
    Fused(&'static str),
}

/// Names of the MLP's projections.
pub struct MlpNames {
    /// The gate, where the MLP is gated.
    pub gate: Option<&'static str>,
    /// Into the inner layer.
    pub up: &'static str,
    /// Out of it.
    pub down: &'static str,
}

/// The module path of the output head.
pub const OUTPUT_HEAD: &str = "lm_head";

impl Layout {
    /// The whole path of a module inside the base.
    pub fn path(&self, module: &str) -> String {
        format!("{}.{module}", self.base)
    }

    /// The path of a part of block `layer`.
    pub fn block(&self, layer: usize, part: &str) -> String {
        format!("{}.{}.{layer}.{part}", self.base, self.blocks)
    }

    /// The whole path of a tensor that a checkpoint may name without the base.
    pub fn full_name(&self, stored: &str) -> String {
        let inside = |part: &str| {
            stored
                .strip_prefix(part)
                .is_some_and(|rest| rest.starts_with('.'))
        };
        if inside(self.base) || inside(OUTPUT_HEAD) {
            stored.to_owned()
        } else {
            self.path(stored)
        }
    }

    /// The name by which `checkpoint` has the tensor `name`: as it is, or without the base.
    pub fn stored_name<'a>(&self, checkpoint: &Checkpoint, name: &'a str) -> &'a str {
        let short = name
            .strip_prefix(self.base)
            .and_then(|rest| rest.strip_prefix('.'));
        match short {
            Some(short) if !checkpoint.contains(name) && checkpoint.contains(short) => short,
            _ => name,
        }
    }

    /// Whether a module's matrix is stored `[in, out]`.
    pub fn is_transposed(&self, module: &str) -> bool {
        self.transposed && module.starts_with(&format!("{}.{}.", self.base, self.blocks))
    }
}

/// Every family that can be loaded.
pub const FAMILIES: &[Family] = &[
    gpt2::FAMILY,
    llama::FAMILY,
    mistral::FAMILY,
    qwen2::FAMILY,
    qwen3::FAMILY,
];

/// The family and the mathematics that a `config.json` describes.
///
/// # Errors
/// An unknown `model_type` lists the known ones; a key that changes the mathematics in a way that
/// is not computed here is named.
pub fn read_config(json: &serde_json::Value) -> Result<(&'static Family, DecoderConfig)> {
    let json = ConfigJson(json);
    let model_type = json.string("model_type")?;
    let family = FAMILIES
        .iter()
        .find(|family| family.model_type == model_type)
        .ok_or_else(|| {
            let known: Vec<&str> = FAMILIES.iter().map(|family| family.model_type).collect();
            Error::config(format!(
                "`model_type` \"{model_type}\" is not supported; supported: {}",
                known.join(", ")
            ))
        })?;
    Ok((family, (family.config)(json)?.validate()?))
}
