//! What `cargo xtask kernels` prints: for every kernel its resources on each architecture, and
//! what the simulator counts on a named shape, against the roofline; the traffic of a whole LoRA layer; the limits that
//! all of that is held to.

mod counted;
#[path = "../device/mod.rs"]
mod device;
mod layer;
mod limits;
#[path = "../lora_layer/mod.rs"]
mod lora_layer;
mod resources;
mod traffic;

use anyhow::{Context, Result, bail, ensure};
use counted::Counted;
use fuselora_kernels::modules;
use resources::Resources;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

const HELP: &str = "\
cargo xtask kernels [OPTIONS]

  --kernel NAME   only this kernel
  --shape AxBx..  on this shape, with the extents that the report names for it
  --json          as JSON
  --write         write docs/kernel-report.md
  --check         fail if a limit is broken, or if docs/kernel-report.md is not what would be written
";

#[derive(Default)]
struct Options {
    kernel: Option<String>,
    shape: Option<Vec<u64>>,
    json: bool,
    write: bool,
    check: bool,
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
    let mut options = Options::default();
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--kernel" => options.kernel = arguments.next(),
            "--shape" => options.shape = Some(shape(&arguments.next().unwrap_or_default())?),
            "--json" => options.json = true,
            "--write" => options.write = true,
            "--check" => options.check = true,
            "--bench" => {} // cargo adds it
            "--help" => {
                print!("{HELP}");
                return Ok(());
            }
            _ => bail!("there is no option {argument}\n\n{HELP}"),
        }
    }
    report(&options)
}

fn shape(text: &str) -> Result<Vec<u64>> {
    let extents: Result<Vec<u64>, _> = text.split('x').map(str::parse).collect();
    extents.with_context(|| format!("--shape {text} is not numbers with x between them"))
}

fn report(options: &Options) -> Result<()> {
    let chosen = |name: &str| options.kernel.as_ref().is_none_or(|kernel| kernel == name);
    let kernels: Vec<_> = modules::KERNELS
        .iter()
        .filter(|kernel| chosen(kernel.name))
        .collect();
    if kernels.is_empty() {
        let names: Vec<&str> = modules::KERNELS.iter().map(|kernel| kernel.name).collect();
        bail!("there is no such kernel; there are {}", names.join(", "));
    }
    let resources = resources::read(&kernels)?;
    let counted: Vec<Counted> = kernels
        .iter()
        .map(|kernel| counted::count(kernel.name, options.shape.as_deref()))
        .collect::<Result<_>>()?;

    if options.json {
        let json = serde_json::json!({
            "resources": resources.iter().map(Resources::json).collect::<Vec<_>>(),
            "counted": counted.iter().map(Counted::json).collect::<Vec<_>>(),
        });
        println!("{json:#}");
        return Ok(());
    }
    let mut markdown = markdown(&resources, &counted)?;
    if options.kernel.is_none() && options.shape.is_none() {
        markdown += &layer::markdown(&layer::simulate()?);
        markdown += &limits::markdown();
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/kernel-report.md");
    if options.write || options.check {
        ensure!(
            options.kernel.is_none() && options.shape.is_none(),
            "the report is of all kernels on their own shapes"
        );
    }
    if options.write {
        let partial = path.with_extension("md.partial");
        std::fs::write(&partial, markdown).context("cannot write the report")?;
        std::fs::rename(&partial, &path).context("cannot write the report")?;
        println!("{}", path.display());
    } else if options.check {
        let mut broken = limits::broken(&resources, &counted);
        broken.extend(layer::broken());
        ensure!(broken.is_empty(), "{}", broken.join("\n"));
        check(&path, &markdown)?;
    } else {
        print!("{markdown}");
    }
    Ok(())
}

/// The snapshot is of one compiler; another may spend registers otherwise.
fn check(path: &PathBuf, markdown: &str) -> Result<()> {
    let snapshot = std::fs::read_to_string(path).unwrap_or_default();
    let compiler = resources::compiler()?;
    if !snapshot.is_empty() && !snapshot.contains(&compiler) {
        println!("skipped: docs/kernel-report.md was made with another compiler than {compiler}");
        return Ok(());
    }
    ensure!(
        snapshot == markdown,
        "docs/kernel-report.md is not up to date: run `cargo xtask kernels --write` and commit it"
    );
    Ok(())
}

fn markdown(resources: &[Resources], counted: &[Counted]) -> Result<String> {
    let mut text = String::new();
    writeln!(
        text,
        "# Kernel report\n\n\
         Written by `cargo xtask kernels --write`, compared in CI. Compiler: {}.\n\n\
         ## Resources\n\n\
         From `ptxas -v`, per thread (registers, stack, spills) and per block (shared memory, \
         without what a launch adds); from `nvdisasm`, in the machine code: tensor-core \
         instructions and accesses of 16 bytes, each counted where it stands.\n",
        resources::compiler()?
    )?;
    text += &Resources::table(resources);
    writeln!(
        text,
        "\n## On the simulator\n\n\
         *Floor* is every 32-byte sector of global memory once; *moved* is what the warps' accesses \
         touch, before any cache, over the floor. *Sectors used* is the share of the moved bytes \
         that threads asked for; it passes 100 % where threads of a warp share an address. *Conflicts* are the extra passes per shared-memory access. The \
         times are what the roofline allows, in microseconds: the longest of the floor at the \
         device's bandwidth, tensor-core work and other floating-point work at their peaks. They \
         are limits, not measurements.\n"
    )?;
    text += &Counted::table(counted);
    Ok(text)
}

/// A Markdown table.
fn table(head: &[&str], rows: impl Iterator<Item = Vec<String>>) -> String {
    let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
    let head: Vec<String> = head.iter().map(|&cell| cell.to_owned()).collect();
    let mut text = line(&head);
    text += &line(&vec!["---".to_owned(); head.len()]);
    rows.for_each(|row| text += &line(&row));
    text
}
