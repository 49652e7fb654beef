//! What the compiler gave each kernel, from the files that the build script leaves.

use crate::table;
use anyhow::{Context, Result};
use fuselora_kernels::modules::Kernel;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A kernel on one architecture.
pub struct Resources {
    pub kernel: &'static str,
    pub arch: String,
    registers: u64,
    shared_bytes: u64,
    stack_bytes: u64,
    pub spill_bytes: u64,
    /// Tensor-core instructions and 16-byte accesses in the machine code.
    sass: Option<(usize, usize)>,
}

/// The compiler's build, in its own words.
pub fn compiler() -> Result<String> {
    let version = std::fs::read_to_string(Path::new(env!("OUT_DIR")).join("compiler"))?;
    let build = version
        .lines()
        .find(|line| line.starts_with("Cuda compilation tools"));
    Ok(build.context("nvcc did not tell its version")?.to_owned())
}

/// The resources of the kernels on every architecture that their modules are checked for.
pub fn read(kernels: &[&&'static Kernel]) -> Result<Vec<Resources>> {
    let mut all = Vec::new();
    // A module is disassembled once: that of a whole family of tensor-core kernels takes seconds.
    let mut machine_code: HashMap<PathBuf, Option<String>> = HashMap::new();
    for kernel in kernels {
        let ptx = Path::new(env!("OUT_DIR"))
            .join("ptx")
            .join(kernel.module.source);
        let folder = ptx.parent().context("a module lies in a folder")?;
        let stem = ptx
            .file_stem()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let mut logs: Vec<PathBuf> = std::fs::read_dir(folder)?
            .filter_map(|entry| entry.ok().map(|entry| entry.path()))
            .filter(|path| {
                path.extension()
                    .is_some_and(|extension| extension == "resources")
            })
            .filter(|path| arch(path, &stem).is_some())
            .collect();
        logs.sort();
        for log in logs {
            let arch = arch(&log, &stem).context("the file's name ends with an architecture")?;
            let text = std::fs::read_to_string(&log)?;
            let cubin = log.with_extension("cubin");
            let code = machine_code
                .entry(cubin)
                .or_insert_with_key(|cubin| disassemble(cubin));
            let found = parse(kernel.name, arch, &text, code.as_deref());
            all.push(found.with_context(|| {
                format!(
                    "ptxas did not tell the resources of {} on {arch}",
                    kernel.name
                )
            })?);
        }
    }
    Ok(all)
}

/// `sm_80` of `dequantize.sm_80.resources`.
fn arch<'a>(path: &'a Path, stem: &str) -> Option<&'a str> {
    let name = path.file_name()?.to_str()?;
    let arch = name
        .strip_prefix(stem)?
        .strip_prefix('.')?
        .strip_suffix(".resources")?;
    arch.starts_with("sm_").then_some(arch)
}

/// Reads the lines of `ptxas -v` that follow the kernel's name.
fn parse(
    kernel: &'static str,
    arch: &str,
    log: &str,
    machine_code: Option<&str>,
) -> Option<Resources> {
    let own = log.split("Compiling entry function '").find(|part| {
        part.strip_prefix(kernel)
            .is_some_and(|rest| rest.starts_with('\''))
    })?;
    // The number before a phrase.
    let before = |phrase: &str| {
        let head = own
            .split(phrase)
            .next()
            .filter(|head| head.len() < own.len())?;
        head.rsplit(|c: char| !c.is_ascii_digit())
            .find(|word| !word.is_empty())?
            .parse()
            .ok()
    };
    let spills = before(" bytes spill stores")? + before(" bytes spill loads")?;
    Some(Resources {
        kernel,
        arch: arch.to_owned(),
        registers: before(" registers")?,
        shared_bytes: before(" bytes smem").unwrap_or(0),
        stack_bytes: before(" bytes stack frame")?,
        spill_bytes: spills,
        sass: machine_code.and_then(|code| sass(kernel, code)),
    })
}

/// The machine code of a module, as `NVDISASM` or the one on the path reads it; `None` where there is
/// neither.
fn disassemble(cubin: &Path) -> Option<String> {
    let nvdisasm = std::env::var_os("NVDISASM").unwrap_or_else(|| "nvdisasm".into());
    let output = Command::new(nvdisasm).arg("-c").arg(cubin).output().ok()?;
    Some(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Counts in the kernel's part of its module's machine code.
fn sass(kernel: &str, machine_code: &str) -> Option<(usize, usize)> {
    let section = machine_code
        .split("\t.section\t")
        .find(|part| part.trim_start().starts_with(&format!(".text.{kernel},")))?;
    let count = |opcodes: &[&str]| {
        let holds = |line: &&str| opcodes.iter().any(|opcode| line.contains(opcode));
        section.lines().filter(holds).count()
    };
    let wide = count(&[
        "LDG.E.128",
        "STG.E.128",
        "LDS.128",
        "STS.128",
        "LDGSTS.E.128",
        "LDGSTS.E.BYPASS.128",
    ]);
    Some((count(&["HMMA", "IMMA", "HGMMA", "IGMMA"]), wide))
}

impl Resources {
    /// All as a Markdown table.
    pub fn table(all: &[Resources]) -> String {
        let head = [
            "kernel",
            "architecture",
            "registers",
            "shared bytes",
            "stack bytes",
            "spilled bytes",
            "tensor-core instructions",
            "16-byte accesses",
        ];
        table(
            &head,
            all.iter().map(|own| {
                let sass = |count: fn((usize, usize)) -> usize| {
                    own.sass
                        .map_or("-".to_owned(), |counts| count(counts).to_string())
                };
                vec![
                    format!("`{}`", own.kernel),
                    own.arch.clone(),
                    own.registers.to_string(),
                    own.shared_bytes.to_string(),
                    own.stack_bytes.to_string(),
                    own.spill_bytes.to_string(),
                    sass(|counts| counts.0),
                    sass(|counts| counts.1),
                ]
            }),
        )
    }

    /// As JSON.
    pub fn json(&self) -> serde_json::Value {
        serde_json::json!({
            "kernel": self.kernel,
            "architecture": self.arch,
            "registers": self.registers,
            "shared_bytes": self.shared_bytes,
            "stack_bytes": self.stack_bytes,
            "spill_bytes": self.spill_bytes,
            "tensor_core_instructions": self.sass.map(|counts| counts.0),
            "accesses_of_16_bytes": self.sass.map(|counts| counts.1),
        })
    }
}
