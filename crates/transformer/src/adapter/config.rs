//! `adapter_config.json`: PEFT's `LoraConfig`, key for key.

mod init_lora_weights;
mod keys;

use serde_json::{Map, Value, json};

use crate::error::{Error, Result};
pub use init_lora_weights::InitLoraWeights;
use keys::{Keys, is_neutral, number, shortest};

/// PEFT's `LoraConfig` for what is supported here. Every other key is kept as it was read and written back.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterConfig {
    /// `r`, the rank of the update.
    pub rank: usize,
    /// `lora_alpha`, the numerator of the scaling.
    pub alpha: f64,
    /// `lora_dropout`, the probability that an input element of A is dropped in training.
    pub dropout: f32,
    /// Divides alpha by the root of the rank instead of the rank (rank-stabilised LoRA, Kalajdzievski 2023).
    pub use_rslora: bool,
    /// Trains the magnitude of each output feature apart from its direction (DoRA, Liu et al. 2024).
    pub use_dora: bool,
    /// Which linear modules get an update.
    pub target_modules: ModuleSelector,
    /// Which of those do not.
    pub exclude_modules: Option<ModuleSelector>,
    /// Indices of the layers to adapt; `None` is all.
    pub layers_to_transform: Option<Vec<usize>>,
    /// Regular expressions for the name before a layer's index; empty is any.
    pub layers_pattern: Vec<String>,
    /// Ranks of modules whose path ends in a match of the regular expression; the first match counts.
    pub rank_pattern: Vec<(String, usize)>,
    /// Alphas in the same way.
    pub alpha_pattern: Vec<(String, f64)>,
    /// Which biases are trained, in place of the base model's.
    pub bias: TrainedBiases,
    /// Whether B has a bias, which is scaled as the update is.
    pub lora_bias: bool,
    /// Ends of the paths of modules that are trained and saved whole.
    pub modules_to_save: Vec<String>,
    /// Tokens whose rows of the embedding are trained.
    pub trainable_token_indices: TrainedTokens,
    /// How fresh weights come about.
    pub init_lora_weights: InitLoraWeights,
    /// The base model, as the user named it.
    pub base_model_name_or_path: Option<String>,
    /// All keys as read.
    keys: Map<String, Value>,
}

/// Chooses modules by their paths.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModuleSelector {
    /// `"all-linear"`: every linear module but the output head.
    AllLinear,
    /// Whole paths, or their last parts: `q_proj` chooses `model.layers.0.self_attn.q_proj`.
    Names(Vec<String>),
    /// A regular expression that the whole path must match.
    Regex(String),
}

impl ModuleSelector {
    fn to_json(&self) -> Value {
        match self {
            ModuleSelector::AllLinear => json!("all-linear"),
            ModuleSelector::Names(names) => json!(names),
            ModuleSelector::Regex(pattern) => json!(pattern),
        }
    }
}

/// Which biases of the base model are trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TrainedBiases {
    /// None of them.
    None,
    /// Every one of the model's.
    All,
    /// Those of adapted modules.
    LoraOnly,
}

impl TrainedBiases {
    /// PEFT's name.
    pub fn name(self) -> &'static str {
        match self {
            TrainedBiases::None => "none",
            TrainedBiases::All => "all",
            TrainedBiases::LoraOnly => "lora_only",
        }
    }
}

/// Tokens whose rows are trained, in place of the frozen ones.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TrainedTokens {
    /// None.
    None,
    /// Of the token embedding, and of a head that shares its table.
    Embedding(Vec<u32>),
    /// Of the modules whose paths end in these names.
    ByModule(Vec<(String, Vec<u32>)>),
}

impl TrainedTokens {
    fn to_json(&self) -> Value {
        match self {
            TrainedTokens::None => Value::Null,
            TrainedTokens::Embedding(indices) => json!(indices),
            TrainedTokens::ByModule(all) => {
                let entries = all
                    .iter()
                    .map(|(module, indices)| (module.clone(), json!(indices)));
                Value::Object(entries.collect())
            }
        }
    }
}

/// Keys of PEFT 0.21.2's `LoraConfig` with their defaults, sorted.
fn defaults() -> Value {
    json!({
        "alora_invocation_tokens": null, "alpha_pattern": {}, "arrow_config": null, "auto_mapping": null,
        "base_model_name_or_path": null, "bias": "none", "corda_config": null, "ensure_weight_tying": false,
        "eva_config": null, "exclude_modules": null, "fan_in_fan_out": false, "inference_mode": true,
        "init_lora_weights": true, "kasa_config": null, "layer_replication": null, "layers_pattern": null,
        "layers_to_transform": null, "loftq_config": {}, "lora_alpha": 8, "lora_bias": false,
        "lora_dropout": 0.0, "lora_ga_config": null, "megatron_config": null,
        "megatron_core": "megatron.core", "modules_to_save": null, "monteclora_config": null,
        "peft_type": "LORA", "peft_version": "0.21.2", "qalora_group_size": 16, "r": 8, "rank_pattern": {},
        "revision": null, "target_modules": null, "target_parameters": null, "task_type": "CAUSAL_LM",
        "trainable_token_indices": null, "use_bdlora": null, "use_dora": false, "use_qalora": false,
        "use_rslora": false, "velora_config": null,
    })
}

/// Of the quantization that LoftQ prepares for.
const LOFTQ_BITS: u64 = 4;

/// Keys that change what an adapter computes or holds, in ways that are not supported.
const UNSUPPORTED: [(&str, &str); 14] = [
    (
        "alora_invocation_tokens",
        "activating an adapter by invocation tokens (aLoRA) is not supported",
    ),
    (
        "arrow_config",
        "routing between adapters (Arrow) is not supported",
    ),
    ("corda_config", "CorDA initialisation is not supported"),
    (
        "ensure_weight_tying",
        "tying the updates of tied weights is not supported",
    ),
    ("eva_config", "EVA initialisation is not supported"),
    ("kasa_config", "KaSA is not supported"),
    ("layer_replication", "replicating layers is not supported"),
    ("lora_ga_config", "LoRA-GA initialisation is not supported"),
    ("megatron_config", "Megatron layers are not supported"),
    ("monteclora_config", "Monteclora is not supported"),
    (
        "target_parameters",
        "adapting parameters that are not linear modules is not supported",
    ),
    ("use_bdlora", "block-diagonal LoRA is not supported"),
    ("use_qalora", "QALoRA is not supported"),
    ("velora_config", "VeLoRA is not supported"),
];

impl AdapterConfig {
    /// A configuration with PEFT's defaults for everything that is not given.
    pub fn new(rank: usize, alpha: f64, target_modules: ModuleSelector) -> AdapterConfig {
        AdapterConfig {
            rank,
            alpha,
            dropout: 0.0,
            use_rslora: false,
            use_dora: false,
            target_modules,
            exclude_modules: None,
            layers_to_transform: None,
            layers_pattern: Vec::new(),
            rank_pattern: Vec::new(),
            alpha_pattern: Vec::new(),
            bias: TrainedBiases::None,
            lora_bias: false,
            modules_to_save: Vec::new(),
            trainable_token_indices: TrainedTokens::None,
            init_lora_weights: InitLoraWeights::KaimingUniform,
            base_model_name_or_path: None,
            keys: Map::new(),
        }
    }

    /// Reads a configuration, of this or an older PEFT: missing keys have their defaults.
    ///
    /// # Errors
    /// When it is no LoRA configuration, a value makes no sense, or a key asks for what is not supported.
    pub fn from_json(json: &Value) -> Result<AdapterConfig> {
        let keys = json
            .as_object()
            .ok_or_else(|| Error::adapter("its configuration is not a JSON object"))?
            .clone();
        let reader = Keys(&keys);
        if reader.get("peft_type") != Some(&json!("LORA")) {
            let found = keys.get("peft_type").unwrap_or(&Value::Null);
            return Err(Error::adapter(format!(
                "`peft_type` is {found}; only \"LORA\" is supported"
            )));
        }
        let defaults = defaults();
        for (key, sentence) in UNSUPPORTED {
            if let Some(value) = reader.get(key)
                && !is_neutral(value)
                && Some(value) != defaults.get(key)
            {
                return Err(Error::adapter(format!("`{key}` is {value}: {sentence}")));
            }
        }
        let config = AdapterConfig {
            rank: reader.rank("r", reader.get("r").unwrap_or(&json!(8)))?,
            alpha: reader.number("lora_alpha", reader.get("lora_alpha").unwrap_or(&json!(8)))?,
            dropout: reader.number("lora_dropout", reader.get("lora_dropout").unwrap_or(&json!(0)))? as f32,
            use_rslora: reader.bool("use_rslora")?,
            use_dora: reader.bool("use_dora")?,
            target_modules: reader
                .selector("target_modules")?
                .ok_or_else(|| Error::adapter("`target_modules` is missing; give a list, a regular expression or \"all-linear\""))?,
            exclude_modules: reader.selector("exclude_modules")?,
            layers_to_transform: reader.indices("layers_to_transform")?,
            layers_pattern: reader.strings("layers_pattern")?.unwrap_or_default(),
            rank_pattern: reader.pattern("rank_pattern", |value| reader.rank("rank_pattern", value))?,
            alpha_pattern: reader.pattern("alpha_pattern", |value| reader.number("alpha_pattern", value))?,
            bias: reader.biases()?,
            lora_bias: reader.bool("lora_bias")?,
            modules_to_save: reader.strings("modules_to_save")?.unwrap_or_default(),
            trainable_token_indices: reader.tokens()?,
            init_lora_weights: reader.init()?,
            base_model_name_or_path: reader.get("base_model_name_or_path").and_then(Value::as_str).map(str::to_owned),
            keys,
        };
        config.check()?;
        Ok(config)
    }

    /// Fails where values make no sense, alone or together; by PEFT's rules where it has one.
    ///
    /// # Errors
    /// Names the key and what would fit.
    pub fn check(&self) -> Result<()> {
        if self.rank == 0 {
            return Err(Error::adapter("`r` is 0; it must be a positive integer"));
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return Err(Error::adapter(format!(
                "`lora_dropout` is {}; it must be at least 0 and below 1",
                self.dropout
            )));
        }
        if !self.alpha.is_finite() {
            return Err(Error::adapter(format!(
                "`lora_alpha` is {}; it must be a number",
                self.alpha
            )));
        }
        if self.lora_bias && self.use_dora {
            return Err(Error::adapter("`lora_bias` is not for DoRA"));
        }
        let by_layer = self.layers_to_transform.is_some() || !self.layers_pattern.is_empty();
        if by_layer && !matches!(self.target_modules, ModuleSelector::Names(_)) {
            return Err(Error::adapter(
                "`layers_to_transform` and `layers_pattern` need `target_modules` to be a list",
            ));
        }
        if !self.layers_pattern.is_empty() && self.layers_to_transform.is_none() {
            return Err(Error::adapter(
                "`layers_pattern` needs `layers_to_transform`",
            ));
        }
        Ok(())
    }

    /// The configuration with all of PEFT's keys, sorted, and those that were read and are not known.
    pub fn to_json(&self) -> Value {
        let Value::Object(mut json) = defaults() else {
            unreachable!("the defaults are an object")
        };
        json.extend(self.keys.clone());
        let patterns = |pairs: Vec<(String, Value)>| Value::Object(pairs.into_iter().collect());
        let known = [
            ("r", json!(self.rank)),
            ("lora_alpha", number(self.alpha)),
            ("lora_dropout", json!(shortest(self.dropout))),
            ("use_rslora", json!(self.use_rslora)),
            ("use_dora", json!(self.use_dora)),
            ("target_modules", self.target_modules.to_json()),
            (
                "exclude_modules",
                self.exclude_modules
                    .as_ref()
                    .map_or(Value::Null, ModuleSelector::to_json),
            ),
            ("layers_to_transform", json!(self.layers_to_transform)),
            (
                "layers_pattern",
                match &self.layers_pattern[..] {
                    [] => Value::Null,
                    [one] => json!(one),
                    several => json!(several),
                },
            ),
            (
                "rank_pattern",
                patterns(
                    self.rank_pattern
                        .iter()
                        .map(|(key, r)| (key.clone(), json!(r)))
                        .collect(),
                ),
            ),
            (
                "alpha_pattern",
                patterns(
                    self.alpha_pattern
                        .iter()
                        .map(|(key, a)| (key.clone(), number(*a)))
                        .collect(),
                ),
            ),
            ("bias", json!(self.bias.name())),
            ("lora_bias", json!(self.lora_bias)),
            (
                "modules_to_save",
                if self.modules_to_save.is_empty() {
                    Value::Null
                } else {
                    json!(self.modules_to_save)
                },
            ),
            (
                "trainable_token_indices",
                self.trainable_token_indices.to_json(),
            ),
            ("init_lora_weights", self.init_lora_weights.to_json()),
            (
                "base_model_name_or_path",
                json!(self.base_model_name_or_path),
            ),
            // A saved adapter is one to use; who trains it on asks for that.
            ("inference_mode", json!(true)),
        ];
        for (key, value) in known {
            json.insert(key.into(), value);
        }
        if let InitLoraWeights::Loftq { iterations } = self.init_lora_weights {
            let config = json!({ "loftq_bits": LOFTQ_BITS, "loftq_iter": iterations });
            json.insert("loftq_config".into(), config);
        }
        json.sort_keys();
        Value::Object(json)
    }
}
