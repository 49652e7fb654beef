//! The values that a GGUF file says about its model.

use std::collections::BTreeMap;

/// A metadata value. Integers of all widths are one kind, floats too, and so are arrays of them.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)]
pub enum MetadataValue {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    String(String),
    Integers(Vec<i64>),
    Floats(Vec<f32>),
    Bools(Vec<bool>),
    Strings(Vec<String>),
    /// An array of arrays, which no key that is used here has: only its length is kept.
    Nested(u64),
}

/// All metadata of a file, by key.
#[derive(Debug, Clone, Default)]
pub struct Metadata(pub(super) BTreeMap<String, MetadataValue>);

impl Metadata {
    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&MetadataValue> {
        self.0.get(key)
    }

    /// All keys with their values, sorted.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &MetadataValue)> {
        self.0.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// A string.
    pub fn string(&self, key: &str) -> Option<&str> {
        match self.get(key)? {
            MetadataValue::String(value) => Some(value),
            _ => None,
        }
    }

    /// An integer that is not negative.
    pub fn unsigned(&self, key: &str) -> Option<u64> {
        match self.get(key)? {
            MetadataValue::Unsigned(value) => Some(*value),
            MetadataValue::Signed(value) => u64::try_from(*value).ok(),
            _ => None,
        }
    }

    /// A token id.
    pub fn token(&self, key: &str) -> Option<u32> {
        u32::try_from(self.unsigned(key)?).ok()
    }

    /// A number.
    pub fn float(&self, key: &str) -> Option<f64> {
        match self.get(key)? {
            MetadataValue::Float(value) => Some(*value),
            MetadataValue::Unsigned(value) => Some(*value as f64),
            MetadataValue::Signed(value) => Some(*value as f64),
            _ => None,
        }
    }

    /// A truth value.
    pub fn bool(&self, key: &str) -> Option<bool> {
        match self.get(key)? {
            MetadataValue::Bool(value) => Some(*value),
            _ => None,
        }
    }

    /// A list of strings.
    pub fn strings(&self, key: &str) -> Option<&[String]> {
        match self.get(key)? {
            MetadataValue::Strings(values) => Some(values),
            _ => None,
        }
    }

    /// A list of integers.
    pub fn integers(&self, key: &str) -> Option<&[i64]> {
        match self.get(key)? {
            MetadataValue::Integers(values) => Some(values),
            _ => None,
        }
    }

    /// A list of floats.
    pub fn floats(&self, key: &str) -> Option<&[f32]> {
        match self.get(key)? {
            MetadataValue::Floats(values) => Some(values),
            _ => None,
        }
    }
}
