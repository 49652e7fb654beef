//! `cargo xtask TASK`: set-up and developer tasks, one file each.
//!
//! This crate depends on nothing that needs the CUDA compiler, since it is what provides it.

mod bench_cpu;
mod bench_memory;
mod demo;
mod gpu_bench;
mod kernels;
mod setup;
mod test;

use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

const HELP: &str = "\
cargo xtask TASK

Tasks:
  demo [ARGS]   fine-tune a small language model on this machine's CPU; ARGS go to `fuselora train`
  test [ARGS]   run every test; ARGS go to `cargo test`
  bench-cpu     compare training on this CPU with Hugging Face PEFT
  bench-memory  fine-tune a model of 7 billion random parameters for a step, and say what memory that took
  gpu-bench     build the benchmarks of a GPU, to run here or on another machine (--help for its options)
  kernels       report on every kernel: registers, traffic, roofline (--help for its options)
  setup         provide the compilers that the build needs, in .toolchain/

Each provides what is missing, once, in .toolchain/: pinned versions, checked by hash.
";

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let task = arguments.next();
    let rest: Vec<String> = arguments.collect();
    let result = match task.as_deref() {
        Some("bench-cpu") => bench_cpu::run(&rest),
        Some("bench-memory") => bench_memory::run(&rest),
        Some("demo") => demo::run(&rest),
        Some("gpu-bench") => gpu_bench::run(&rest),
        Some("kernels") => kernels::run(&rest),
        Some("setup") if rest.is_empty() => setup::run(),
        Some("test") => test::run(&rest),
        Some("help" | "--help" | "-h") => {
            print!("{HELP}");
            Ok(())
        }
        _ => {
            eprint!("{HELP}");
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The root of the workspace.
fn workspace() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.ancestors().nth(2).unwrap_or(manifest).to_owned()
}

/// The cargo that runs this task.
fn cargo() -> Command {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.current_dir(workspace());
    command
}

/// Runs a build of cargo's, and returns the program that it made.
fn executable(build: &mut Command) -> Result<PathBuf> {
    let output = build
        .args(["--message-format", "json-render-diagnostics"])
        .stderr(Stdio::inherit())
        .output()
        .context("cannot run cargo")?;
    anyhow::ensure!(output.status.success(), "the build failed");
    // Cargo's own word on where the program is, whatever the target folder's settings.
    output
        .stdout
        .split(|&byte| byte == b'\n')
        .filter_map(|line| serde_json::from_slice::<serde_json::Value>(line).ok())
        .find_map(|message| message["executable"].as_str().map(PathBuf::from))
        .context("cargo did not say where it put the program")
}

/// Runs a command to its end, and fails if it does.
fn run(command: &mut Command) -> Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    let status = command
        .status()
        .with_context(|| format!("cannot run {name}"))?;
    if !status.success() {
        bail!("{name} failed ({status})");
    }
    Ok(())
}
