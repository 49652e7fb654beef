//! The decoder families, one small file each: from a `config.json` to the mathematics, and the
//! names of the tensors.

use crate::config::{ConfigJson, DecoderConfig};
use crate::error::{Error, Result};

mod llama;
mod mistral;
mod qwen2;

/// One family of checkpoints.
pub struct Family {
    /// `model_type` in `config.json`.
    pub model_type: &'static str,
    /// Reads the configuration.
    pub config: fn(ConfigJson<'_>) -> Result<DecoderConfig>,
}

/// Every family that can be loaded.
pub const FAMILIES: &[Family] = &[llama::FAMILY, mistral::FAMILY, qwen2::FAMILY];

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
