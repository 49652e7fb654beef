//! LoRA training on this CPU, beside Hugging Face PEFT: `benches/cpu_against_peft.py`.

use crate::{demo, run as run_command, workspace};
use anyhow::{Result, bail};
use std::env;
use std::process::{Command, Stdio};

/// Builds the program, converts the demo's model for PEFT to load, and runs the comparison.
pub fn run(arguments: &[String]) -> Result<()> {
    let python = env::var("PYTHON").unwrap_or_else(|_| "python3".into());
    let has_peft = Command::new(&python)
        .args(["-c", "import torch, transformers, peft"])
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    if !has_peft {
        bail!(
            "{python} has no torch, transformers and peft to compare with: install them, or name another interpreter in PYTHON"
        );
    }
    let model = demo::model()?;
    let program = demo::build_program()?;
    let base = workspace().join("target/bench-cpu/base");
    if !base.join("config.json").exists() {
        run_command(
            Command::new(&program)
                .args(["convert", "--model"])
                .arg(&model)
                .arg("--output")
                .arg(&base),
        )?;
    }
    run_command(
        Command::new(python)
            .arg(workspace().join("benches/cpu_against_peft.py"))
            .arg("--bin")
            .arg(program)
            .arg("--model")
            .arg(base)
            .arg("--demo-data")
            .arg(workspace().join("crates/trainer/demo/data/train.jsonl"))
            .args(arguments),
    )
}
