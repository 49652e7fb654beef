//! Training from outside, on small random checkpoints.

mod as_peft;
mod continued;
#[cfg(feature = "cuda")]
mod devices;
mod quantized;
mod refusals;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use assert_cmd::Command;

/// A case of the shared parity data; `None`, said plainly, where the data are not there.
fn case(name: &str) -> Option<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../../shared/parity")
        .join(name);
    if !folder.is_dir() {
        eprintln!("skipped: there is no {}", folder.display());
        return None;
    }
    Some(folder)
}

/// A case of this repository, made with PEFT.
fn own_case(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../tests/parity")
        .join(name)
}

fn train(model: &Path, data: &Path, output: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fuselora"));
    command
        .arg("train")
        .arg("--model")
        .arg(model)
        .arg("--data")
        .arg(data)
        .arg("--output")
        .arg(output);
    command
}

/// What a run that the user has to mend says: one line, exit code 2.
fn complaint(command: &mut Command) -> String {
    let output = command.assert().code(2).get_output().clone();
    let message = String::from_utf8(output.stderr).unwrap();
    assert!(message.contains("error: "), "{message}");
    message
}

/// Every tensor of a safetensors file.
fn tensors(file: &Path) -> BTreeMap<String, Vec<f32>> {
    let bytes = fs::read(file).unwrap();
    let stored = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    stored
        .tensors()
        .into_iter()
        .map(|(name, view)| {
            let values = view.data().as_chunks().0;
            (
                name,
                values.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            )
        })
        .collect()
}

/// Step, loss and gradient norm of every training step, as written.
fn losses(folder: &Path) -> Vec<(u64, f64, f64)> {
    let lines = fs::read_to_string(folder.join("metrics.jsonl")).unwrap();
    lines
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap())
        .filter(|line| line.get("loss").is_some())
        .map(|line| {
            let number = |name: &str| line[name].as_f64().unwrap();
            (
                line["step"].as_u64().unwrap(),
                number("loss"),
                number("grad_norm"),
            )
        })
        .collect()
}
