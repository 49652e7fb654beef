//! What a decoder computes, read from `config.json`: sizes, biases, positions.
//!
//! A [`DecoderConfig`] is the mathematics of a model and nothing else. Each family in
//! [`crate::families`] turns its own `config.json` into one; the layers read only this.

use fuselora_tensor::ops::gelu::GeluKind;
use serde_json::Value;

use crate::error::{Error, Result};

/// The shape and mathematics of a decoder-only Transformer.
#[derive(Debug, Clone, PartialEq)]
pub struct DecoderConfig {
    /// Rows of the embedding table and of the output head.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP's inner layer.
    pub intermediate_size: usize,
    /// Number of decoder blocks.
    pub num_layers: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads; query heads are a multiple of it.
    pub num_kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Longest position the checkpoint was trained for.
    pub max_position_embeddings: usize,
    /// Which normalisation stands before attention, MLP and head.
    pub norm: NormKind,
    /// Epsilon of every normalisation.
    pub norm_eps: f32,
    /// Whether each head's queries and keys pass an RMSNorm of their own (Henry et al. 2020).
    pub qk_norm: bool,
    /// What the MLP computes.
    pub mlp: MlpKind,
    /// Which projections have a bias.
    pub biases: Biases,
    /// How tokens know where they stand.
    pub positions: Positions,
    /// A query sees this many most recent keys, itself included; `None` is all.
    pub sliding_window: Option<usize>,
    /// Whether the head is the embedding table.
    pub tie_word_embeddings: bool,
}

/// A normalisation over the hidden dimension.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// RMSNorm (Zhang and Sennrich 2019), a weight alone.
    Rms,
    /// Layer normalisation (Ba, Kiros and Hinton 2016), weight and bias.
    Layer,
}

/// An MLP's form.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MlpKind {
    /// `down(silu(gate(x)) * up(x))` (Shazeer 2020).
    SwiGlu,
    /// `down(gelu(up(x)))` (Hendrycks and Gimpel 2016).
    Gelu(GeluKind),
}

impl MlpKind {
    /// Matrices of hidden by intermediate size.
    pub fn matrices(self) -> usize {
        match self {
            MlpKind::SwiGlu => 3,
            MlpKind::Gelu(_) => 2,
        }
    }
}

/// Positions of tokens.
#[derive(Debug, Clone, PartialEq)]
pub enum Positions {
    /// Queries and keys are turned, NeoX halves (Su et al. 2021).
    Rotary(Rope),
    /// A table of `max_position_embeddings` trained vectors is added to the embedding.
    Learned,
}

/// Which projections of a block add a bias.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Biases {
    /// `q_proj`, `k_proj`, `v_proj`.
    pub qkv: bool,
    /// `o_proj`.
    pub output: bool,
    /// The MLP's three.
    pub mlp: bool,
}

/// Rotary frequencies.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Base of the geometric progression of wavelengths.
    pub theta: f64,
    /// Change of the frequencies for longer contexts.
    pub scaling: RopeScaling,
}

/// `rope_scaling` / `rope_parameters` of a checkpoint.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Frequencies as trained.
    None,
    /// Positions divided by a factor (`linear`).
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// The base grows with the row once it is longer than in training (`dynamic`, "NTK-aware"): every
    /// frequency depends on the length of the longest row of a batch.
    Dynamic {
        /// How fast the base grows.
        factor: f64,
        /// Positions of training.
        max_position_embeddings: usize,
    },
    /// Llama 3's rule: low frequencies divided, high ones kept, a smooth ramp between.
    Llama3 {
        /// Divisor of the low frequencies.
        factor: f64,
        /// Wavelengths longer than `original / low_freq_factor` are divided.
        low_freq_factor: f64,
        /// Wavelengths shorter than `original / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Context length of pre-training.
        original_max_position_embeddings: f64,
    },
    /// One divisor per frequency, as GGUF's `rope_freqs` tensor stores Llama 3's rule.
    Factors(Vec<f64>),
}

impl Rope {
    /// `rotary_dim / 2` angular frequencies for rows of up to `seqlen` tokens, as transformers'
    /// `modeling_rope_utils` computes them.
    pub fn inv_freq(&self, rotary_dim: usize, seqlen: usize) -> Vec<f64> {
        let dim = rotary_dim as f64;
        let geometric = |theta: f64| {
            (0..rotary_dim / 2).map(move |i| theta.powf(-2.0 * i as f64 / rotary_dim as f64))
        };
        let plain = geometric(self.theta);
        match &self.scaling {
            RopeScaling::None => plain.collect(),
            RopeScaling::Dynamic {
                factor,
                max_position_embeddings: trained,
            } => {
                let stretch = seqlen.max(*trained) as f64 / *trained as f64;
                let growth = (factor * stretch - (factor - 1.0)).powf(dim / (dim - 2.0));
                geometric(self.theta * growth).collect()
            }
            RopeScaling::Linear { factor } => plain.map(|f| f / factor).collect(),
            RopeScaling::Factors(factors) => {
                plain.zip(factors).map(|(f, factor)| f / factor).collect()
            }
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings: original,
            } => plain
                .map(|f| {
                    let wavelength = 2.0 * std::f64::consts::PI / f;
                    if wavelength < original / high_freq_factor {
                        f
                    } else if wavelength > original / low_freq_factor {
                        f / factor
                    } else {
                        let smooth = (original / wavelength - low_freq_factor)
                            / (high_freq_factor - low_freq_factor);
                        (1.0 - smooth) * f / factor + smooth * f
                    }
                })
                .collect(),
        }
    }
}

/// Typed access to a `config.json`, with errors that name the key.
#[derive(Clone, Copy)]
pub struct ConfigJson<'a>(pub &'a Value);

impl<'a> ConfigJson<'a> {
    /// The value of a key, unless it is missing or null.
    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.0.get(key).filter(|v| !v.is_null())
    }

    /// A string that must be there.
    pub fn string(&self, key: &str) -> Result<&'a str> {
        self.get(key)
            .and_then(Value::as_str)
            .ok_or_else(|| Error::config(format!("`{key}` must be a string")))
    }

    /// A positive size that must be there.
    pub fn size(&self, key: &str) -> Result<usize> {
        self.size_or(key, None)
    }

    /// A positive size, or `default` where the key is missing.
    pub fn size_or(&self, key: &str, default: Option<usize>) -> Result<usize> {
        // Above 2^31 no product of two sizes can be trusted, and no checkpoint comes near.
        let valid = |v: &Value| {
            v.as_u64()
                .filter(|&n| (1..1 << 31).contains(&n))
                .map(|n| n as usize)
        };
        match (self.get(key), default) {
            (Some(v), _) => valid(v).ok_or_else(|| {
                Error::config(format!("`{key}` must be a positive integer, and is {v}"))
            }),
            (None, Some(default)) => Ok(default),
            (None, None) => Err(Error::config(format!("`{key}` is missing"))),
        }
    }

    /// A finite number, or `default` where the key is missing.
    pub fn number_or(&self, key: &str, default: f64) -> Result<f64> {
        match self.get(key) {
            None => Ok(default),
            Some(v) => v
                .as_f64()
                .filter(|n| n.is_finite())
                .ok_or_else(|| Error::config(format!("`{key}` must be a number, and is {v}"))),
        }
    }

    /// A boolean, or `default` where the key is missing.
    pub fn bool_or(&self, key: &str, default: bool) -> Result<bool> {
        match self.get(key) {
            None => Ok(default),
            Some(v) => v
                .as_bool()
                .ok_or_else(|| Error::config(format!("`{key}` must be true or false, and is {v}"))),
        }
    }

    /// Fails where a key that changes the mathematics asks for what this family does not compute.
    ///
    /// `neutral` lists keys with the values that change nothing; a missing or null key is neutral.
    pub fn require_neutral(&self, neutral: &[(&str, &[Value])]) -> Result<()> {
        for (key, values) in neutral {
            if let Some(value) = self.get(key)
                && !values.iter().any(|neutral| same_value(neutral, value))
            {
                let supported: Vec<String> = values.iter().map(Value::to_string).collect();
                return Err(Error::config(format!(
                    "`{key}` is {value}, which changes the mathematics and is not supported; supported: {}",
                    if supported.is_empty() {
                        "the key left out".to_owned()
                    } else {
                        supported.join(", ")
                    }
                )));
            }
        }
        Ok(())
    }

    /// Fails where `layer_types` has a layer of another kind than `kind`.
    pub fn require_layer_types(&self, kind: &str) -> Result<()> {
        let types = self.get("layer_types").and_then(Value::as_array);
        match types.into_iter().flatten().find(|found| **found != kind) {
            None => Ok(()),
            Some(other) => Err(Error::config(format!(
                "`layer_types` has {other}; only layers of \"{kind}\" are supported for this model"
            ))),
        }
    }

    /// Rotary parameters, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`.
    pub fn rope(&self) -> Result<Rope> {
        let parameters = self
            .get("rope_parameters")
            .or_else(|| self.get("rope_scaling"))
            .map(ConfigJson);
        let theta_default = self.number_or("rope_theta", 10_000.0)?;
        let Some(parameters) = parameters else {
            return Ok(Rope {
                theta: theta_default,
                scaling: RopeScaling::None,
            });
        };
        let theta = parameters.number_or("rope_theta", theta_default)?;
        let positive = |key: &str| -> Result<f64> {
            match parameters.number_or(key, f64::NAN)? {
                n if n > 0.0 => Ok(n),
                _ => Err(Error::config(format!(
                    "`rope_parameters.{key}` must be a positive number"
                ))),
            }
        };
        let kind = parameters
            .get("rope_type")
            .or_else(|| parameters.get("type"));
        let scaling = match kind.and_then(Value::as_str).unwrap_or("default") {
            "default" => RopeScaling::None,
            "linear" => RopeScaling::Linear {
                factor: positive("factor")?,
            },
            "dynamic" => RopeScaling::Dynamic {
                factor: positive("factor")?,
                max_position_embeddings: self.size_or("max_position_embeddings", Some(2048))?,
            },
            "llama3" => RopeScaling::Llama3 {
                factor: positive("factor")?,
                low_freq_factor: positive("low_freq_factor")?,
                high_freq_factor: positive("high_freq_factor")?,
                original_max_position_embeddings: positive("original_max_position_embeddings")?,
            },
            "factors" => RopeScaling::Factors(
                parameters
                    .get("factors")
                    .and_then(Value::as_array)
                    .and_then(|list| {
                        list.iter()
                            .map(|v| v.as_f64().filter(|f| *f > 0.0))
                            .collect()
                    })
                    .ok_or_else(|| {
                        Error::config(
                            "`rope_parameters.factors` must be a list of positive numbers",
                        )
                    })?,
            ),
            other => {
                return Err(Error::config(format!(
                    "`rope_type` is \"{other}\", which is not supported; supported: default, dynamic, linear, llama3"
                )));
            }
        };
        if theta <= 0.0 {
            return Err(Error::config("`rope_theta` must be positive"));
        }
        Ok(Rope { theta, scaling })
    }
}

fn same_value(a: &Value, b: &Value) -> bool {
    a == b || matches!((a.as_f64(), b.as_f64()), (Some(x), Some(y)) if x == y)
}

impl DecoderConfig {
    /// Checks that the sizes fit together.
    pub fn validate(self) -> Result<DecoderConfig> {
        if !self.num_heads.is_multiple_of(self.num_kv_heads) {
            return Err(Error::config(format!(
                "`num_attention_heads` ({}) must be a multiple of `num_key_value_heads` ({})",
                self.num_heads, self.num_kv_heads
            )));
        }
        let Positions::Rotary(rope) = &self.positions else {
            return Ok(self);
        };
        if !self.head_dim.is_multiple_of(2) {
            return Err(Error::config(format!(
                "`head_dim` ({}) must be even for rotary positions",
                self.head_dim
            )));
        }
        if matches!(rope.scaling, RopeScaling::Dynamic { .. }) && self.head_dim <= 2 {
            return Err(Error::config(format!(
                "`head_dim` ({}) must be above 2 for dynamic rotary positions",
                self.head_dim
            )));
        }
        if let RopeScaling::Factors(factors) = &rope.scaling
            && factors.len() != self.head_dim / 2
        {
            return Err(Error::config(format!(
                "`rope_parameters.factors` has {} entries, and `head_dim` {} wants {}",
                factors.len(),
                self.head_dim,
                self.head_dim / 2
            )));
        }
        Ok(self)
    }
}
