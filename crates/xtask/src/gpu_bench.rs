//! The benchmarks of a GPU, built where there may be none: a folder that another machine runs.

use crate::{cargo, executable, run as run_command, setup, workspace};
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::Path;
use std::process::Command;

const HELP: &str = "\
cargo xtask gpu-bench [--run] [--quick]

Builds target/gpu-bench: the programs, with every kernel embedded, and run.sh, which measures on the machine
that it is started on and writes report.md there. It needs an NVIDIA driver and, for the comparisons, a python3
with torch, transformers and peft; no Rust, no CUDA toolkit, no network.

  --run     start run.sh at once
  --quick   with --run: the main shapes, in about 90 seconds instead of 4 minutes
";

/// What goes beside the programs.
const SCRIPTS: [&str; 4] = ["run.sh", "peers.py", "training.py", "report.py"];

/// Fills the folder, and runs it where `arguments` ask for that.
pub fn run(arguments: &[String]) -> Result<()> {
    let (mut now, mut quick) = (false, false);
    for argument in arguments {
        match argument.as_str() {
            "--run" => now = true,
            "--quick" => quick = true,
            "--help" => {
                print!("{HELP}");
                return Ok(());
            }
            _ => bail!("there is no option {argument}\n\n{HELP}"),
        }
    }
    setup::run()?;
    let folder = workspace().join("target/gpu-bench");
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    build("fuselora-kernels", ["--bench", "gpu_bench"], &folder)?;
    build("fuselora-trainer", ["--bin", "fuselora"], &folder)?;
    for script in SCRIPTS {
        copy(
            &workspace().join("benches/gpu_bench").join(script),
            &folder.join(script),
        )?;
    }
    println!("{}", folder.display());
    if now {
        let mut command = Command::new(folder.join("run.sh"));
        run_command(if quick {
            command.arg("--quick")
        } else {
            &mut command
        })?;
    }
    Ok(())
}

/// Builds one program of `package`, without debug information, and puts it into `folder`.
fn build(package: &str, target: [&str; 2], folder: &Path) -> Result<()> {
    let mut build = cargo();
    build.args(["build", "--profile", "dist", "--package", package]);
    let program = executable(build.args(target))?;
    copy(&program, &folder.join(target[1]))
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to)
        .with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
    Ok(())
}
