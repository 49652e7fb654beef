//! `ptxsim`: runs a kernel of a PTX file on the CPU, or says whether PTX files can be loaded.

mod argument;
mod number;
mod options;

use std::fmt::Write as _;
use std::io::Write as _;
use std::ops::Range;
use std::process::ExitCode;

use argument::Argument;
use options::{Command, Run};
use ptxsim::{FaultKind, Gpu, Kernel, Module, Param, Profile};

/// Why the program ends without having done what it was asked.
enum Failure {
    /// The user's mistake, in one sentence: exit code 2.
    Mistake(String),
    /// What is wrong with the PTX or its kernel: exit code 1.
    Found(String),
}

fn main() -> ExitCode {
    let done = Command::parse(std::env::args_os().skip(1))
        .map_err(Failure::Mistake)
        .and_then(execute);
    match done {
        Ok(text) => {
            show(&text);
            ExitCode::SUCCESS
        }
        Err(Failure::Found(text)) => {
            eprintln!("{text}");
            ExitCode::from(1)
        }
        Err(Failure::Mistake(text)) => {
            eprintln!("error: {text}");
            ExitCode::from(2)
        }
    }
}

fn show(text: &str) {
    // A reader that has seen enough has gone: no reason to complain.
    let _ = std::io::stdout().write_all(text.as_bytes());
}

/// Does it, and gives what to print.
fn execute(command: Command) -> Result<String, Failure> {
    match command {
        Command::Help => Ok(options::HELP.to_string()),
        Command::Check { files, profile } => check(&files, profile),
        Command::Run(run) => launch(&run),
    }
}

fn load(gpu: &Gpu, file: &str) -> Result<Module, Failure> {
    let text = std::fs::read_to_string(file)
        .map_err(|error| Failure::Mistake(format!("cannot read {file}: {error}")))?;
    gpu.load(&text)
        .map_err(|error| Failure::Found(format!("{file}: {error}")))
}

fn check(files: &[String], profile: Profile) -> Result<String, Failure> {
    let gpu = Gpu::new(profile);
    let mut out = String::new();
    let mut refused = Vec::new();
    for file in files {
        match load(&gpu, file) {
            Ok(module) => describe(file, &module, &mut out),
            Err(Failure::Found(text)) => refused.push(text),
            Err(mistake) => return Err(mistake),
        }
    }
    if refused.is_empty() {
        return Ok(out);
    }
    show(&out);
    Err(Failure::Found(refused.join("\n")))
}

fn describe(file: &str, module: &Module, out: &mut String) {
    let _ = writeln!(out, "{file}");
    for kernel in module.kernels().filter_map(|name| module.kernel(name)) {
        let sizes: Vec<String> = kernel.params().iter().map(|p| p.size.to_string()).collect();
        let params = match &sizes[..] {
            [] => "none".to_string(),
            sizes => format!("{}, of {} bytes", sizes.len(), sizes.join(", ")),
        };
        let _ = writeln!(
            out,
            "  {}\n    parameters     {params}\n    registers      at most {}\n    \
             shared memory  {} bytes\n    local memory   {} bytes\n    block          at most {} \
             threads",
            kernel.name(),
            kernel.registers(),
            kernel.static_shared_bytes(),
            kernel.local_bytes(),
            kernel.max_threads(),
        );
    }
}

fn launch(run: &Run) -> Result<String, Failure> {
    let gpu = Gpu::new(run.profile.clone());
    let module = load(&gpu, &run.file)?;
    let kernel = find(&module, run).map_err(Failure::Mistake)?;
    let mut packed = vec![0; kernel.params_size() as usize];
    let mut buffers = Vec::new();
    for (at, argument) in places(&kernel, &run.arguments).map_err(Failure::Mistake)? {
        let (bytes, buffer) = argument.place(&gpu).map_err(Failure::Mistake)?;
        let to = &mut packed[at];
        if bytes.len() != to.len() {
            return Err(Failure::Mistake(format!(
                "{} has {} bytes where the kernel takes {}",
                argument.text,
                bytes.len(),
                to.len()
            )));
        }
        to.copy_from_slice(&bytes);
        buffers.extend(buffer);
    }
    let report = gpu.launch(&kernel, &run.config, &packed).map_err(|fault| {
        print!("{}", fault.printed);
        match &*fault.kind {
            FaultKind::InvalidLaunch(_) => Failure::Mistake(fault.to_string()),
            _ => Failure::Found(fault.to_string()),
        }
    })?;
    let mut out = report.printed;
    for buffer in &buffers {
        out += &buffer.show(&gpu, run.show).map_err(Failure::Found)?;
    }
    if let Some(counters) = report.counters {
        let _ = writeln!(out, "{counters}");
    }
    Ok(out)
}

fn find(module: &Module, run: &Run) -> Result<Kernel, String> {
    let names = || module.kernels().collect::<Vec<_>>().join(", ");
    let name = run.kernel.as_ref();
    let name = name.ok_or_else(|| format!("name a kernel with --kernel: {}", names()))?;
    let kernel = module.kernel(name);
    kernel.ok_or_else(|| format!("{} has no kernel {name}, it has {}", run.file, names()))
}

/// Where in the kernel's parameters each argument goes.
fn places<'a>(
    kernel: &Kernel,
    arguments: &'a [Argument],
) -> Result<Vec<(Range<usize>, &'a Argument)>, String> {
    let params = kernel.params();
    if params.len() != arguments.len() {
        let (name, wanted, given) = (kernel.name(), params.len(), arguments.len());
        return Err(format!(
            "{name} takes {wanted} arguments, {given} are given"
        ));
    }
    let range = |param: &Param| param.offset as usize..(param.offset + param.size) as usize;
    Ok(params.iter().map(range).zip(arguments).collect())
}
