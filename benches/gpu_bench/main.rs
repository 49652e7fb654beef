//! Times every kernel on a device. `cargo xtask gpu-bench` carries this program, with what it is compared with,
//! to a machine that has one.

mod case;
mod cases;
#[path = "../device/mod.rs"]
mod device;
#[path = "../lora_layer/mod.rs"]
mod lora_layer;
mod row;
mod timing;

use anyhow::{Context, Result, bail};
use case::Scope;
use cases::GROUPS;
use device::Device;
use row::Row;
use std::path::PathBuf;
use std::process::ExitCode;
use timing::Effort;

const HELP: &str = "\
gpu_bench [OPTIONS]

  --group NAME   only this group: copy, lora_linear, attention, nf4, elementwise, norm, dora, rope, loss, optimizer
  --quick        the main shapes, timed for a moment each
  --json FILE    write the rows there too
  --sim          on a simulated device and tiny shapes: shows that every row runs, the times mean nothing
";

const EFFORT: Effort = Effort {
    graph: 2e-3,
    warm_up: 0.2,
    replays: 0.06,
    fewest_replays: 3,
    most_sets: 32,
};

struct Options {
    group: Option<String>,
    scope: Scope,
    json: Option<PathBuf>,
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let mut options = Options {
        group: None,
        scope: Scope::Full,
        json: None,
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || {
            arguments
                .next()
                .with_context(|| format!("{argument} needs a value"))
        };
        match argument.as_str() {
            "--group" => options.group = Some(value()?),
            "--quick" => options.scope = Scope::Quick,
            "--json" => options.json = Some(value()?.into()),
            "--sim" => options.scope = Scope::Tiny,
            "--bench" => {} // cargo adds it
            "--help" => {
                print!("{HELP}");
                return Ok(());
            }
            _ => bail!("there is no option {argument}\n\n{HELP}"),
        }
    }
    measure(&options)
}

fn measure(options: &Options) -> Result<()> {
    let chosen = |name: &str| options.group.as_ref().is_none_or(|group| group == name);
    if !GROUPS.iter().any(|(name, _)| chosen(name)) {
        let names: Vec<&str> = GROUPS.iter().map(|(name, _)| *name).collect();
        bail!("there is no such group; there are {}", names.join(", "));
    }
    let effort = match options.scope {
        Scope::Full => Effort {
            replays: 0.2,
            ..EFFORT
        },
        Scope::Quick => EFFORT,
        Scope::Tiny => {
            ptxsim_driver::select("h100")?;
            Effort::LEAST
        }
    };
    let device = Device::open()?;
    let mut rows = Vec::new();
    println!("{}", row::HEAD);
    for (group, cases) in GROUPS.iter().filter(|(name, _)| chosen(name)) {
        for case in cases(options.scope) {
            let timed = timing::time(&device, case.bytes, effort, &case.make);
            let row = Row::new(group, &case, timed);
            println!("{row}");
            rows.push(row);
            if let Some(path) = &options.json {
                row::write(path, &rows)?;
            }
        }
    }
    Ok(())
}
