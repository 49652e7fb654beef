//! `checkpoint/` in the output folder: everything that continues a run to the bit.
//!
//! The adapter in PEFT's format, `optimizer.safetensors` with AdamW's moments, and `state.json`. The
//! folder is replaced as a whole, so that its parts always belong to one step.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;
use fuselora_tensor::{DType, Tensor};
use fuselora_transformer::atomic_file;
use fuselora_transformer::checkpoint::{TensorSpec, write_safetensors};
use fuselora_transformer::lora::Lora;
use safetensors::SafeTensors;
use serde::{Deserialize, Serialize};

use super::optimizer::Optimizer;
use crate::data::Position;
use crate::mistake;
use crate::records::Answer;

const STATE: &str = "state.json";
const OPTIMIZER: &str = "optimizer.safetensors";

/// Settings that may change when a run is continued; all others decide its numbers.
const FREE_SETTINGS: [&str; 10] = [
    "output",
    "steps",
    "num-train-epochs",
    "eval-data",
    "eval-steps",
    "save-steps",
    "logging-steps",
    "sample-answers",
    "gradient-checkpointing",
    "device",
];

/// Where a run stands besides its tensors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Optimizer steps done.
    pub step: u64,
    /// Batches passed forward, which numbers the dropout masks.
    pub micro_step: u32,
    /// Where the data order stands.
    pub position: Position,
    /// Held-out loss before the first step.
    pub eval_loss_before: Option<f64>,
    /// Prompts, references and answers before the first step.
    pub answers: Vec<Answer>,
    /// The configuration of the run.
    pub settings: BTreeMap<String, String>,
}

/// The folder of the saved state in an output folder.
pub fn folder(output: &Path) -> PathBuf {
    output.join("checkpoint")
}

/// Saves the run's state, replacing the one before as a whole.
///
/// # Errors
/// A file that cannot be written; the state before is then untouched.
pub fn save(
    output: &Path,
    lora: &Lora,
    optimizer: &Optimizer,
    state: &State,
) -> anyhow::Result<()> {
    let mut tensors: BTreeMap<String, &Tensor> = BTreeMap::new();
    for ((name, _), moments) in lora.parameters().zip(&optimizer.moments) {
        for (which, tensor) in moments.named_tensors() {
            tensors.insert(format!("{name}.{which}"), tensor);
        }
    }
    let specs: Vec<TensorSpec> = tensors
        .iter()
        .map(|(name, tensor)| TensorSpec {
            name: name.clone(),
            shape: tensor.shape().to_vec(),
            dtype: tensor.dtype(),
        })
        .collect();
    let json = serde_json::to_vec_pretty(state)?;
    atomic_file::write_folder(
        &folder(output),
        |_| true,
        |folder| {
            lora.write_for_training(folder)?;
            write_safetensors(&folder.join(OPTIMIZER), &specs, |spec| {
                Ok(tensors[&spec.name].to_bytes()?)
            })?;
            atomic_file::write_bytes(&folder.join(STATE), &json)
        },
    )?;
    Ok(())
}

/// Reads the state of the run in `output`.
///
/// # Errors
/// A [`mistake::Mistake`] where there is none, it is damaged, or the run that is asked for has other
/// settings.
pub fn read(output: &Path, settings: &BTreeMap<String, String>) -> anyhow::Result<State> {
    let path = folder(output).join(STATE);
    if !path.exists() {
        return Err(mistake!(
            "{} has no checkpoint to resume from; leave --resume out to start the run",
            output.display()
        ));
    }
    let bytes = fs::read(&path).with_context(|| format!("{} cannot be read", path.display()))?;
    let state: State = serde_json::from_slice(&bytes)
        .map_err(|error| mistake!("{} is damaged: {error}", path.display()))?;
    let keys = state
        .settings
        .keys()
        .chain(settings.keys())
        .filter(|key| !FREE_SETTINGS.contains(&key.as_str()));
    for key in keys {
        let (before, now) = (state.settings.get(key), settings.get(key));
        if before != now {
            let say = |value: Option<&String>| value.map_or("not given".to_owned(), String::clone);
            return Err(mistake!(
                "the run in {} was made with {key} = {}, and --resume is given {key} = {}: continue with the same setting, or start a new run",
                output.display(),
                say(before),
                say(now)
            ));
        }
    }
    Ok(state)
}

/// Fills the optimizer with the saved moments.
///
/// # Errors
/// A file that is missing or damaged, by name.
pub fn read_moments(output: &Path, lora: &Lora, optimizer: &mut Optimizer) -> anyhow::Result<()> {
    let path = folder(output).join(OPTIMIZER);
    let bytes = fs::read(&path).with_context(|| format!("{} cannot be read", path.display()))?;
    let damaged =
        |error: &dyn std::fmt::Display| mistake!("{} is damaged: {error}", path.display());
    let stored = SafeTensors::deserialize(&bytes).map_err(|error| damaged(&error))?;
    for ((parameter, _), moments) in lora.parameters().zip(&mut optimizer.moments) {
        for (which, tensor) in moments.named_tensors_mut() {
            let name = format!("{parameter}.{which}");
            let view = stored.tensor(&name).map_err(|error| damaged(&error))?;
            let dtype = match tensor.dtype() {
                DType::U8 => safetensors::Dtype::U8,
                _ => safetensors::Dtype::F32,
            };
            if view.shape() != &tensor.shape()[..] || view.dtype() != dtype {
                return Err(damaged(&format!(
                    "`{name}` is not {} of shape {}",
                    tensor.dtype(),
                    tensor.shape()
                )));
            }
            let shape = tensor.shape().clone();
            *tensor = Tensor::from_bytes(tensor.device(), shape, tensor.dtype(), view.data())?;
        }
    }
    Ok(())
}
