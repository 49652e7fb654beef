//! Compiles every CUDA source under `kernels/` to PTX, has `ptxas` accept it for each supported
//! architecture, binds `kernels/abi.h` to Rust, and writes the table of kernels that
//! `kernels/lib.rs` embeds. Without the feature `cuda` it does nothing.
//!
//! No GPU is looked for: what is built depends on the sources alone.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    #[cfg(feature = "cuda")]
    if let Err(error) = cuda::build() {
        println!("cargo::error={}", format!("{error:#}").replace('\n', " "));
        std::process::exit(1);
    }
}

#[cfg(feature = "cuda")]
mod cuda {
    use anyhow::{Context, Result, anyhow, bail, ensure};
    use std::collections::BTreeMap;
    use std::env;
    use std::fmt::Write as _;
    use std::fs;
    use std::path::{Path, PathBuf};
    use std::process::Command;
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// What a source file is compiled for: PTX for the virtual architecture, checked by `ptxas`
    /// for each real one.
    struct Target {
        arch: &'static str,
        validate: &'static [&'static str],
    }

    /// Every source, unless its name ends in `_sm90a`: the driver translates it for any later GPU.
    const BASELINE: Target = Target {
        arch: "80",
        validate: &["sm_80", "sm_89", "sm_90"],
    };
    /// Sources that use wgmma and tensor maps, which PTX ties to Hopper.
    const HOPPER: Target = Target {
        arch: "90a",
        validate: &["sm_90a"],
    };

    const SET_UP: &str = "run `cargo xtask setup` to provide it, or build with --no-default-features for the CPU only";

    pub fn build() -> Result<()> {
        let root = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
        let out = PathBuf::from(env::var("OUT_DIR")?);
        println!("cargo::rerun-if-changed=kernels");
        // Not PATH: it differs between a shell, an editor and a nested cargo, and a build that found
        // nvcc has no reason to start over for that.
        for name in ["NVCC", "CUDA_HOME", "CUDA_PATH", "LIBCLANG_PATH"] {
            println!("cargo::rerun-if-env-changed={name}");
        }

        let nvcc = find_nvcc(&root)?;
        println!("cargo::rerun-if-changed={}", nvcc.display());
        fs::write(
            out.join("compiler"),
            run(Command::new(&nvcc).arg("--version"))?,
        )?;
        let modules = Module::find(&root.join("kernels"), &out)?;
        compile_all(&nvcc, &root, &modules)?;
        fs::write(out.join("table.rs"), table(&modules)?)?;
        bind_abi(&root, &out)
    }

    /// `NVCC`, `CUDA_HOME`, `CUDA_PATH`, `PATH`, then what `cargo xtask setup` provided.
    fn find_nvcc(root: &Path) -> Result<PathBuf> {
        if let Some(nvcc) = env::var_os("NVCC") {
            let nvcc = PathBuf::from(nvcc);
            ensure!(
                nvcc.is_file(),
                "NVCC is set to {}, which is not a file: correct or unset it",
                nvcc.display()
            );
            return Ok(nvcc);
        }
        let homes = ["CUDA_HOME", "CUDA_PATH"]
            .into_iter()
            .filter_map(env::var_os);
        let path = env::var_os("PATH").unwrap_or_default();
        homes
            .map(|home| PathBuf::from(home).join("bin"))
            .chain(env::split_paths(&path))
            .chain([root.join(".toolchain/cuda/nvidia/cu13/bin")])
            .map(|folder| folder.join("nvcc"))
            .find(|nvcc| nvcc.is_file())
            .ok_or_else(|| anyhow!("the CUDA compiler nvcc was not found: {SET_UP}"))
    }

    /// One CUDA source and where its PTX goes.
    struct Module {
        /// Relative to `kernels/`, with forward slashes.
        source: String,
        target: &'static Target,
        ptx: PathBuf,
    }

    impl Module {
        /// Every `.cu` file below `folder`, in the order of their names.
        fn find(folder: &Path, out: &Path) -> Result<Vec<Module>> {
            let mut folders = vec![folder.to_owned()];
            let mut modules = Vec::new();
            while let Some(current) = folders.pop() {
                let entries = fs::read_dir(&current)
                    .with_context(|| format!("cannot read {}", current.display()))?;
                for entry in entries {
                    let path = entry?.path();
                    if path.is_dir() {
                        folders.push(path);
                    } else if path.extension().is_some_and(|extension| extension == "cu") {
                        let relative = path.strip_prefix(folder)?;
                        let hopper = relative
                            .with_extension("")
                            .to_string_lossy()
                            .ends_with("_sm90a");
                        modules.push(Module {
                            source: relative.to_string_lossy().replace('\\', "/"),
                            target: if hopper { &HOPPER } else { &BASELINE },
                            ptx: out.join("ptx").join(relative).with_extension("ptx"),
                        });
                    }
                }
            }
            modules.sort_by(|a, b| a.source.cmp(&b.source));
            Ok(modules)
        }

        /// The name of the module's Rust static: that of `nf4/dequantize.cu` is `MODULE_NF4_DEQUANTIZE`.
        fn constant(&self) -> String {
            let stem = self.source.trim_end_matches(".cu");
            format!("MODULE_{}", stem.replace('/', "_").to_uppercase())
        }

        fn command(&self, nvcc: &Path) -> Command {
            let mut command = Command::new(nvcc);
            command
                .arg("-ptx")
                .arg(format!("-arch=compute_{}", self.target.arch))
                .args(["-std=c++17", "-lineinfo", "-MD", "-I", "kernels"])
                .arg("-MF")
                .arg(self.ptx.with_extension("d"))
                .arg("-o")
                .arg(&self.ptx)
                .arg(format!("kernels/{}", self.source));
            command
        }

        /// The files that the last compilation read, or `None` when it has to be done (again):
        /// there is none, its command was another, or a file has changed since.
        fn up_to_date(&self, root: &Path, command: &str) -> Option<Vec<PathBuf>> {
            if fs::read_to_string(self.ptx.with_extension("command")).ok()? != command {
                return None;
            }
            let built = fs::metadata(&self.ptx).ok()?.modified().ok()?;
            let inputs = self.inputs(root)?;
            let unchanged = |input: &PathBuf| {
                fs::metadata(input)
                    .and_then(|file| file.modified())
                    .is_ok_and(|time| time < built)
            };
            inputs.iter().all(unchanged).then_some(inputs)
        }

        /// The prerequisites in nvcc's dependency file.
        fn inputs(&self, root: &Path) -> Option<Vec<PathBuf>> {
            let rule = fs::read_to_string(self.ptx.with_extension("d")).ok()?;
            let prerequisites = rule
                .split_once(": ")?
                .1
                .replace("\\\n", " ")
                .replace("\\ ", "\0");
            let names = prerequisites
                .split_whitespace()
                .map(|name| name.replace('\0', " "));
            Some(names.map(|name| root.join(name)).collect())
        }

        /// Compiles if needed, and returns the files that were read.
        fn compile(&self, nvcc: &Path, root: &Path) -> Result<Vec<PathBuf>> {
            let mut command = self.command(nvcc);
            let words = format!("{command:?}; ptxas -v {:?}", self.target.validate);
            if let Some(inputs) = self.up_to_date(root, &words) {
                return Ok(inputs);
            }
            fs::create_dir_all(self.ptx.parent().context("the output has no folder")?)?;
            let stamp = self.ptx.with_extension("command");
            let _ = fs::remove_file(&stamp);
            run(command.current_dir(root)).with_context(|| format!("kernels/{}", self.source))?;
            // nvcc copies inline assembly unread: ptxas is the first to check it.
            let ptxas = nvcc.with_file_name("ptxas");
            for arch in self.target.validate {
                let beside =
                    |extension: &str| self.ptx.with_extension(format!("{arch}.{extension}"));
                let resources = run(Command::new(&ptxas)
                    .arg("-v")
                    .arg(format!("-arch={arch}"))
                    .arg(&self.ptx)
                    .arg("-o")
                    .arg(beside("cubin")))
                .with_context(|| format!("kernels/{} for {arch}", self.source))?;
                fs::write(beside("resources"), resources)?;
            }
            fs::write(&stamp, &words)?;
            self.inputs(root)
                .with_context(|| format!("nvcc listed no inputs of kernels/{}", self.source))
        }

        /// The names of the kernels in the PTX.
        fn kernels(&self) -> Result<Vec<String>> {
            let ptx = fs::read_to_string(&self.ptx)?;
            let entries = ptx
                .lines()
                .filter_map(|line| line.strip_prefix(".visible .entry "));
            Ok(entries
                .map(|entry| entry.trim_end_matches('(').to_owned())
                .collect())
        }
    }

    /// Runs a command, and returns what it printed.
    fn run(command: &mut Command) -> Result<String> {
        let output = command
            .output()
            .with_context(|| format!("cannot run {}", command.get_program().to_string_lossy()))?;
        let printed = [output.stdout, output.stderr].concat();
        let printed = String::from_utf8_lossy(&printed).into_owned();
        ensure!(output.status.success(), printed);
        Ok(printed)
    }

    /// Compiles the modules on as many threads as cargo allows, and reports what they read.
    fn compile_all(nvcc: &Path, root: &Path, modules: &[Module]) -> Result<()> {
        let jobs = env::var("NUM_JOBS")
            .ok()
            .and_then(|jobs| jobs.parse().ok())
            .unwrap_or(1);
        let next = AtomicUsize::new(0);
        let results = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            for _ in 0..modules.len().min(jobs) {
                scope.spawn(|| {
                    while let Some(module) = modules.get(next.fetch_add(1, Ordering::Relaxed)) {
                        let result = module.compile(nvcc, root);
                        results
                            .lock()
                            .unwrap_or_else(|poisoned| poisoned.into_inner())
                            .push(result);
                    }
                });
            }
        });
        for result in results
            .into_inner()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
        {
            for input in result? {
                println!("cargo::rerun-if-changed={}", input.display());
            }
        }
        Ok(())
    }

    /// Rust source: one static per module, one per kernel, and the table of all kernels.
    fn table(modules: &[Module]) -> Result<String> {
        let mut rust = String::new();
        let mut kernels = BTreeMap::new();
        for module in modules {
            let constant = module.constant();
            let (source, arch) = (&module.source, module.target.arch);
            let (major, minor) = arch.trim_end_matches('a').split_at(1);
            writeln!(
                rust,
                "/// `kernels/{source}` for compute_{arch}.\n\
                 pub static {constant}: Module = Module {{ source: {source:?}, arch: {arch:?}, \
                 capability: ({major}, {minor}), exact: {}, ptx: include_str!({:?}) }};",
                arch.ends_with('a'),
                module.ptx,
            )?;
            for kernel in module.kernels()? {
                writeln!(
                    rust,
                    "/// `{kernel}` of `kernels/{source}`.\n\
                     pub static {}: Kernel = Kernel {{ name: {kernel:?}, module: &{constant} }};",
                    kernel.to_uppercase()
                )?;
                if let Some(other) = kernels.insert(kernel.clone(), source) {
                    bail!("the kernel {kernel} is in kernels/{source} and in kernels/{other}");
                }
            }
        }
        // The kernels of one operation for every storage type of activations, under the operation's name.
        for operation in kernels
            .keys()
            .filter_map(|kernel| kernel.strip_suffix("_f32"))
        {
            let [f32, f16, bf16] =
                ["f32", "f16", "bf16"].map(|storage| format!("{operation}_{storage}"));
            if [&f16, &bf16]
                .iter()
                .all(|kernel| kernels.contains_key(*kernel))
            {
                let [operation, f32, f16, bf16] =
                    [operation, &f32, &f16, &bf16].map(str::to_uppercase);
                writeln!(
                    rust,
                    "pub(crate) static {operation}: crate::launch::ByStorage = \
                     crate::launch::ByStorage {{ f32: &{f32}, f16: &{f16}, bf16: &{bf16} }};"
                )?;
            }
        }
        let all: String = kernels
            .keys()
            .map(|kernel| format!("&{}, ", kernel.to_uppercase()))
            .collect();
        writeln!(
            rust,
            "/// Every kernel, by name.\npub static KERNELS: &[&Kernel] = &[{all}];"
        )?;
        Ok(rust)
    }

    /// `kernels/abi.h` as Rust, so that a launcher and its kernel cannot drift apart.
    fn bind_abi(root: &Path, out: &Path) -> Result<()> {
        let provided = root.join(".toolchain/libclang/clang/native");
        if env::var_os("LIBCLANG_PATH").is_none() && provided.is_dir() {
            // SAFETY: the threads that compiled have been joined; this is the only thread.
            unsafe { env::set_var("LIBCLANG_PATH", provided) };
        }
        // bindgen panics when it finds no libclang.
        std::panic::set_hook(Box::new(|_| {}));
        let found = std::panic::catch_unwind(bindgen::clang_version).is_ok();
        let _ = std::panic::take_hook();
        ensure!(
            found,
            "libclang, which binds kernels/abi.h, was not found: {SET_UP}"
        );

        let mut builder = bindgen::Builder::default()
            .header(root.join("kernels/abi.h").to_string_lossy())
            .clang_args(["-x", "c++", "-std=c++17"])
            .allowlist_file(".*/abi\\.h")
            .derive_default(true)
            .use_core();
        // The libclang of a Python wheel comes without the compiler's own headers.
        if let Ok(output) = Command::new("gcc").arg("-print-file-name=include").output() {
            let include = String::from_utf8_lossy(&output.stdout).trim().to_owned();
            builder = builder.clang_args(["-isystem", &include]);
        }
        let bindings = builder.generate().context("kernels/abi.h")?;
        Ok(bindings.write_to_file(out.join("abi.rs"))?)
    }
}
