//! What fine-tuning a model of 7 billion parameters takes on this machine, beside what `fuselora inspect` said.

use crate::{cargo, demo, executable, run as run_command, workspace};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::fs;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

/// Tokens of the only row.
const SEQLEN: usize = 512;
const MIB: f64 = (1 << 20) as f64;

/// Writes a random base of Llama-2-7B's shape in NF4, about 4 GB, and trains all its projections with r = 16 for one
/// step of one row; `arguments` are added to the training command.
pub fn run(arguments: &[String]) -> Result<()> {
    let program = demo::build_program()?;
    let folder = workspace().join("target/bench-memory");
    let base = folder.join("llama-2-7b-nf4");
    if !base.join("config.json").exists() {
        println!("writing {}, about 4 GB", base.display());
        let mut build = cargo();
        build.args(["build", "--release", "--no-default-features"]);
        build.args(["--package", "fuselora-transformer"]);
        build.args(["--example", "random_nf4_base"]);
        fs::create_dir_all(&folder)?;
        run_command(Command::new(executable(&mut build)?).arg(&base))?;
    }
    let data = folder.join("row.jsonl");
    let ids: Vec<usize> = (0..SEQLEN).map(|i| (7 * i + 11) % 32000).collect();
    let row = serde_json::json!({ "input_ids": ids, "labels": ids });
    fs::write(&data, format!("{row}\n"))?;

    let length = SEQLEN.to_string();
    let run = [
        "--rank=16",
        "--batch-size=1",
        "--dtype=bf16",
        "--gradient-checkpointing",
    ];
    let inspected = Command::new(&program)
        .args(["inspect", "--estimate", "--json", "--model"])
        .arg(&base)
        .args(run)
        .args(["--max-seq-length", &length])
        .stderr(Stdio::inherit())
        .output()?;
    ensure!(inspected.status.success(), "fuselora inspect failed");
    let estimate: Value = serde_json::from_slice(&inspected.stdout)?;
    let estimated = estimate["training"]["memory_bytes"]["total"].as_f64();
    let estimated = estimated.context("fuselora inspect told no total")?;
    println!("estimated: {estimate}");

    let mut child = Command::new(&program)
        .args(["train", "--steps=1", "--model"])
        .arg(&base)
        .arg("--data")
        .arg(&data)
        .arg("--output")
        .arg(folder.join("adapter"))
        .args(run)
        .args(["--max-seq-length", &length])
        .args(arguments)
        .spawn()
        .context("fuselora train does not start")?;
    let peak = peak_of(&mut child)?;
    println!(
        "peak {:.0} MiB resident, mapped weights included: {:.3} of the {:.0} MiB that were estimated",
        peak / MIB,
        peak / estimated,
        estimated / MIB,
    );
    Ok(())
}

/// The most bytes that a process has resident until its end.
fn peak_of(child: &mut Child) -> Result<f64> {
    let path = format!("/proc/{}/status", child.id());
    let mut peak = None;
    loop {
        if let Some(status) = child.try_wait()? {
            ensure!(status.success(), "fuselora train failed");
            return peak.context("the peak of a process is known on Linux only");
        }
        let status = fs::read_to_string(&path).unwrap_or_default();
        let kib = status
            .lines()
            .find_map(|line| line.strip_prefix("VmHWM:")?.split_whitespace().next());
        if let Some(kib) = kib {
            peak = Some(kib.parse::<f64>()? * 1024.0);
        }
        sleep(Duration::from_millis(50));
    }
}
