//! The adapters that a command was given, by name, and which row of the data has which.

use fuselora_transformer::lora::Lora;

use crate::base_model::BaseModel;
use crate::cli::AdapterArg;
use crate::mistake;

/// What rows without an adapter are named, as in PEFT.
const BASE: &str = "__base__";

/// Adapters of one base model.
pub struct Adapters {
    named: Vec<(Option<String>, Lora)>,
}

impl Adapters {
    /// Reads them.
    ///
    /// # Errors
    /// What is wrong with the files; several without names, or two of one name.
    pub fn load(base: &BaseModel, arguments: &[AdapterArg]) -> anyhow::Result<Adapters> {
        let mut named: Vec<(Option<String>, Lora)> = Vec::with_capacity(arguments.len());
        for AdapterArg { name, folder } in arguments {
            if name.is_none() && arguments.len() > 1 {
                return Err(mistake!(
                    "several adapters need names: --adapter NAME={}",
                    folder.display()
                ));
            }
            if named.iter().any(|(known, _)| known == name) {
                let name = name.as_deref().unwrap_or_default();
                return Err(mistake!("two adapters are named {name}"));
            }
            named.push((name.clone(), base.adapter(folder)?));
        }
        let adapters = Adapters { named };
        if adapters.are_several() {
            for (name, lora) in &adapters.named {
                lora.check_mixed(&base.model).map_err(|error| {
                    mistake!("adapter {}: {error}", name.as_deref().unwrap_or_default())
                })?;
            }
        }
        Ok(adapters)
    }

    /// Whether each row has to name its own.
    pub fn are_several(&self) -> bool {
        self.named.len() > 1
    }

    /// The adapter of what names `name`: the only one where none is named.
    ///
    /// # Errors
    /// An unknown name, or none where there are several adapters.
    pub fn of(&self, name: Option<&str>) -> anyhow::Result<Option<&Lora>> {
        let found = match name {
            Some(BASE) => return Ok(None),
            None if !self.are_several() => return Ok(self.named.first().map(|(_, lora)| lora)),
            None => None,
            Some(name) => self
                .named
                .iter()
                .find(|(known, _)| known.as_deref() == Some(name)),
        };
        found.map(|(_, lora)| Some(lora)).ok_or_else(|| {
            let names: Vec<&str> = self
                .named
                .iter()
                .filter_map(|(name, _)| name.as_deref())
                .collect();
            let known = format!("there are {} and {BASE}, the model alone", names.join(", "));
            match name {
                Some(name) => mistake!("there is no adapter {name}: {known}"),
                None => mistake!("which adapter is not said: {known}"),
            }
        })
    }
}
