//! The values of a configuration's keys.

use serde_json::{Map, Value, json};

use super::{InitLoraWeights, LOFTQ_BITS, ModuleSelector, TrainedBiases, TrainedTokens};
use crate::error::{Error, Result};

/// The values of `init_lora_weights`.
const INIT_LORA_WEIGHTS: &str = "true, false, \"gaussian\", \"orthogonal\", \"pissa\", \"pissa_niter_N\" with a number N, \
     \"olora\" or \"loftq\"; other initialisations are not supported";

/// A whole number without a decimal point, as PEFT has it.
pub(super) fn number(value: f64) -> Value {
    if value.fract() == 0.0 && value.abs() < 1e15 {
        json!(value as i64)
    } else {
        json!(value)
    }
}

/// The f64 with the fewest digits that is this f32: 0.05, not 0.05000000074505806.
pub(super) fn shortest(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}

/// What PEFT takes as "not asked for".
pub(super) fn is_neutral(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    }
}

/// Typed access to the keys, with errors that name the key.
pub(super) struct Keys<'a>(pub &'a Map<String, Value>);

impl<'a> Keys<'a> {
    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    pub fn bad(key: &str, value: &Value, wanted: &str) -> Error {
        Error::adapter(format!("`{key}` is {value}; it must be {wanted}"))
    }

    pub fn rank(&self, key: &str, value: &Value) -> Result<usize> {
        // No matrix has a rank beyond this, and products of it with any width cannot overflow.
        let rank = value.as_u64().filter(|rank| (1..=1 << 20).contains(rank));
        rank.map(|rank| rank as usize)
            .ok_or_else(|| Self::bad(key, value, "a positive integer"))
    }

    pub fn number(&self, key: &str, value: &Value) -> Result<f64> {
        value
            .as_f64()
            .filter(|number| number.is_finite())
            .ok_or_else(|| Self::bad(key, value, "a number"))
    }

    pub fn bool(&self, key: &str) -> Result<bool> {
        self.get(key).map_or(Ok(false), |value| {
            value
                .as_bool()
                .ok_or_else(|| Self::bad(key, value, "true or false"))
        })
    }

    pub fn strings(&self, key: &str) -> Result<Option<Vec<String>>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        let strings = match value {
            Value::String(one) => Some(vec![one.clone()]),
            Value::Array(list) => list
                .iter()
                .map(|item| item.as_str().map(str::to_owned))
                .collect(),
            _ => None,
        };
        strings
            .map(Some)
            .ok_or_else(|| Self::bad(key, value, "a string or a list of strings"))
    }

    pub fn selector(&self, key: &str) -> Result<Option<ModuleSelector>> {
        Ok(match self.get(key) {
            Some(Value::String(all))
                if key == "target_modules" && all.eq_ignore_ascii_case("all-linear") =>
            {
                Some(ModuleSelector::AllLinear)
            }
            Some(Value::String(pattern)) => Some(ModuleSelector::Regex(pattern.clone())),
            _ => self.strings(key)?.map(ModuleSelector::Names),
        })
    }

    pub fn indices(&self, key: &str) -> Result<Option<Vec<usize>>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        let index = |value: &Value| value.as_u64().map(|index| index as usize);
        let indices = match value {
            Value::Array(list) => list.iter().map(index).collect(),
            one => index(one).map(|index| vec![index]),
        };
        let indices: Vec<usize> =
            indices.ok_or_else(|| Self::bad(key, value, "an index or a list of indices"))?;
        // As in PEFT, an empty list is no restriction.
        Ok(Some(indices).filter(|indices| !indices.is_empty()))
    }

    pub fn pattern<T>(
        &self,
        key: &str,
        parse: impl Fn(&Value) -> Result<T>,
    ) -> Result<Vec<(String, T)>> {
        match self.get(key) {
            None => Ok(Vec::new()),
            Some(Value::Object(map)) => map
                .iter()
                .map(|(pattern, value)| Ok((pattern.clone(), parse(value)?)))
                .collect(),
            Some(value) => Err(Self::bad(key, value, "an object from patterns to numbers")),
        }
    }

    pub fn biases(&self) -> Result<TrainedBiases> {
        match self.get("bias") {
            None => Ok(TrainedBiases::None),
            Some(value) => [
                TrainedBiases::None,
                TrainedBiases::All,
                TrainedBiases::LoraOnly,
            ]
            .into_iter()
            .find(|biases| value == biases.name())
            .ok_or_else(|| Self::bad("bias", value, "\"none\", \"all\" or \"lora_only\"")),
        }
    }

    pub fn tokens(&self) -> Result<TrainedTokens> {
        const KEY: &str = "trainable_token_indices";
        let Some(value) = self.get(KEY) else {
            return Ok(TrainedTokens::None);
        };
        let list = |value: &Value| -> Option<Vec<u32>> {
            let index = |value: &Value| value.as_u64().and_then(|index| u32::try_from(index).ok());
            value.as_array()?.iter().map(index).collect()
        };
        let tokens = match value {
            Value::Object(map) => map
                .iter()
                .map(|(module, value)| Some((module.clone(), list(value)?)))
                .collect::<Option<Vec<_>>>()
                .map(TrainedTokens::ByModule),
            value => list(value).map(TrainedTokens::Embedding),
        };
        tokens.ok_or_else(|| {
            Self::bad(
                KEY,
                value,
                "a list of token indices, or an object from modules to such lists",
            )
        })
    }

    pub fn init(&self) -> Result<InitLoraWeights> {
        const KEY: &str = "init_lora_weights";
        let Some(value) = self.get(KEY) else {
            return Ok(InitLoraWeights::KaimingUniform);
        };
        let init = match value {
            Value::Bool(init) => InitLoraWeights::from_name(&init.to_string()),
            Value::String(name) => InitLoraWeights::from_name(name),
            _ => None,
        };
        match init {
            Some(InitLoraWeights::Loftq { .. }) => self.loftq(),
            Some(init) => Ok(init),
            None => Err(Self::bad(KEY, value, INIT_LORA_WEIGHTS)),
        }
    }

    /// LoftQ as `loftq_config` has it, with PEFT's defaults.
    fn loftq(&self) -> Result<InitLoraWeights> {
        const KEY: &str = "loftq_config";
        let config = self.get(KEY).unwrap_or(&Value::Null);
        let number = |key: &str, default: u64| match config.get(key) {
            None | Some(Value::Null) => Some(default),
            Some(value) => value.as_u64(),
        };
        let bits = number("loftq_bits", LOFTQ_BITS);
        match number("loftq_iter", 1).filter(|iterations| *iterations > 0) {
            Some(iterations) if bits == Some(LOFTQ_BITS) => Ok(InitLoraWeights::Loftq {
                iterations: iterations as usize,
            }),
            _ => Err(Self::bad(
                KEY,
                config,
                "an object with `loftq_bits` 4 and `loftq_iter` of 1 or more",
            )),
        }
    }
}
