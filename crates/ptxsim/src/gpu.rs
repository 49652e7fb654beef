//! The public face: a GPU to allocate on, load PTX into and launch kernels on.

use std::sync::Arc;

use crate::exec;
use crate::memory::{DeviceMemory, DevicePtr, MemoryError, MemoryInfo};
use crate::observe::{Checks, Counters};
use crate::profile::Profile;
use crate::program::{ModuleText, Param, Program, Symbols, decode, device_variables};
use crate::report::Fault;
use crate::syntax::{self, LoadError};

/// One simulated GPU. Share it between threads as you like.
pub struct Gpu {
    profile: Profile,
    memory: Arc<DeviceMemory>,
}

impl Gpu {
    /// A GPU with the properties of `profile` and empty memory.
    pub fn new(profile: Profile) -> Gpu {
        let memory = Arc::new(DeviceMemory::new(profile.memory_bytes));
        Gpu { profile, memory }
    }

    /// The device's properties.
    pub fn profile(&self) -> &Profile {
        &self.profile
    }

    /// Allocates `bytes` bytes, aligned to 256 and more; their content counts as never written.
    pub fn alloc(&self, bytes: u64) -> Result<DevicePtr, MemoryError> {
        self.memory.alloc(bytes, None)
    }

    /// Frees an allocation, by its first address.
    pub fn free(&self, ptr: DevicePtr) -> Result<(), MemoryError> {
        self.memory.free(ptr)
    }

    /// Copies `bytes` to the device.
    pub fn write(&self, ptr: DevicePtr, bytes: &[u8]) -> Result<(), MemoryError> {
        self.memory.write(ptr, bytes)
    }

    /// Copies from the device into `out`.
    pub fn read(&self, ptr: DevicePtr, out: &mut [u8]) -> Result<(), MemoryError> {
        self.memory.read(ptr, out)
    }

    /// Copies `bytes` bytes within the device.
    pub fn copy(&self, to: DevicePtr, from: DevicePtr, bytes: u64) -> Result<(), MemoryError> {
        self.memory.copy(to, from, bytes)
    }

    /// Sets `count` bytes.
    pub fn fill8(&self, ptr: DevicePtr, value: u8, count: u64) -> Result<(), MemoryError> {
        self.memory.fill(ptr, &[value], count)
    }

    /// Sets `count` 16-bit values.
    pub fn fill16(&self, ptr: DevicePtr, value: u16, count: u64) -> Result<(), MemoryError> {
        self.memory.fill(ptr, &value.to_le_bytes(), count)
    }

    /// Sets `count` 32-bit values.
    pub fn fill32(&self, ptr: DevicePtr, value: u32, count: u64) -> Result<(), MemoryError> {
        self.memory.fill(ptr, &value.to_le_bytes(), count)
    }

    /// How much memory is free.
    pub fn memory_info(&self) -> MemoryInfo {
        self.memory.info()
    }

    /// Reads PTX text and allocates the variables that it declares. They are freed with the last
    /// clone of the [`Module`] and its kernels.
    pub fn load(&self, ptx: &str) -> Result<Module, LoadError> {
        let tree = syntax::parse(ptx)?;
        self.check_target(tree.target)?;
        let mut globals = Globals {
            memory: self.memory.clone(),
            variables: Vec::new(),
        };
        let symbols = Symbols::new(&tree, |name, bytes| {
            let ptr = self
                .memory
                .alloc(bytes, Some(name.to_string()))
                .map_err(|error| LoadError::whole(format!("`{name}`: {error}")))?;
            globals.variables.push((name.to_string(), ptr, bytes));
            Ok(ptr.0)
        })?;
        for variable in device_variables(&tree) {
            let bytes = symbols.initial_bytes(variable)?;
            if let Some((_, ptr, _)) = globals.variables.iter().find(|(n, ..)| n == variable.name) {
                let written = self.memory.write(*ptr, &bytes);
                written.map_err(|error| LoadError::whole(error.to_string()))?;
            }
        }
        let files = tree
            .files
            .iter()
            .map(|&(number, name)| (number, name.into()))
            .collect();
        let text = Arc::new(ModuleText {
            source: ptx.to_string(),
            files,
        });
        let globals = Arc::new(globals);
        let mut kernels = Vec::new();
        for (number, function) in tree.functions.iter().enumerate() {
            if function.is_entry && function.body.is_some() {
                let program = Arc::new(decode(&tree, number, &symbols, &text)?);
                kernels.push(Kernel {
                    program,
                    globals: globals.clone(),
                });
            }
        }
        Ok(Module {
            kernels: kernels.into(),
            globals,
        })
    }

    /// Refuses PTX for a newer GPU than this one, or for the specific features of another.
    fn check_target(&self, target: &str) -> Result<(), LoadError> {
        let (major, minor) = self.profile.compute_capability;
        let own = major * 10 + minor;
        let digits = target.strip_prefix("sm_").unwrap_or_default();
        let specific = digits.ends_with(['a', 'f']);
        let needed: u32 = digits
            .trim_end_matches(['a', 'f'])
            .parse()
            .map_err(|_| LoadError::whole(format!("`.target {target}` is not an architecture")))?;
        if needed > own || specific && needed != own {
            let name = self.profile.name;
            let message = format!("`.target {target}`: {name} has capability {major}.{minor}");
            return Err(LoadError::whole(message));
        }
        Ok(())
    }

    /// Runs a kernel to its end. `args` holds the parameters at the offsets of
    /// [`Kernel::params`].
    pub fn launch(
        &self,
        kernel: &Kernel,
        config: &LaunchConfig,
        args: &[u8],
    ) -> Result<LaunchReport, Fault> {
        exec::run(
            &kernel.program,
            self.memory.snapshot(),
            config,
            &self.profile,
            args,
        )
    }
}

/// A module's variables in device memory; they go with it.
struct Globals {
    memory: Arc<DeviceMemory>,
    variables: Vec<(String, DevicePtr, u64)>,
}

impl Drop for Globals {
    fn drop(&mut self) {
        for (_, ptr, _) in &self.variables {
            // The user may have freed it; nothing is lost then.
            let _ = self.memory.free(*ptr);
        }
    }
}

/// A loaded PTX module.
#[derive(Clone)]
pub struct Module {
    kernels: Arc<[Kernel]>,
    globals: Arc<Globals>,
}

impl Module {
    /// The kernel (`.entry`) of that name.
    pub fn kernel(&self, name: &str) -> Option<Kernel> {
        self.kernels
            .iter()
            .find(|kernel| kernel.name() == name)
            .cloned()
    }

    /// A `.global` or `.const` variable's address and size in bytes.
    pub fn global(&self, name: &str) -> Option<(DevicePtr, u64)> {
        let variable = self.globals.variables.iter().find(|(own, ..)| own == name);
        variable.map(|(_, ptr, bytes)| (*ptr, *bytes))
    }

    /// The kernels' names.
    pub fn kernels(&self) -> impl Iterator<Item = &str> {
        self.kernels.iter().map(Kernel::name)
    }
}

/// A kernel of a loaded module.
#[derive(Clone)]
pub struct Kernel {
    program: Arc<Program>,
    /// Kept so that the module's variables outlive its kernels.
    #[expect(dead_code, reason = "held for its drop")]
    globals: Arc<Globals>,
}

impl Kernel {
    /// Its name, as in the PTX.
    pub fn name(&self) -> &str {
        &self.program.name
    }

    /// Its parameters, in order.
    pub fn params(&self) -> &[Param] {
        &self.program.params
    }

    /// The bytes that the parameters take.
    pub fn params_size(&self) -> u32 {
        self.program.params_bytes
    }

    /// Shared memory that it declares with a size, bytes.
    pub fn static_shared_bytes(&self) -> u32 {
        self.program.shared_bytes
    }

    /// Local memory of one thread, bytes.
    pub fn local_bytes(&self) -> u32 {
        self.program.local_bytes
    }

    /// The most threads that a block may have, by `.maxntid` or `.reqntid`, else 1024.
    pub fn max_threads(&self) -> u32 {
        let required = self
            .program
            .required_block
            .map(|block| block.iter().product());
        required.or(self.program.max_threads).unwrap_or(1024)
    }

    /// An upper estimate of the 32-bit registers that a thread needs; the true number is the
    /// assembler's choice. It is what is live at once in the order of the text (what is declared, for a
    /// kernel that calls functions), at most the 255 that a GPU gives and what the kernel's directives
    /// leave: `.maxnreg`, or an equal share of 65536 registers, in units of 8,
    /// among the threads that `.maxntid` and `.minnctapersm` promise.
    pub fn registers(&self) -> u32 {
        const OF_A_MULTIPROCESSOR: u32 = 65536;
        let Program {
            live_registers,
            required_block,
            max_threads,
            max_registers,
            min_blocks,
            ..
        } = &*self.program;
        let live = (*live_registers).clamp(1, 255);
        let named = max_registers.unwrap_or(255);
        let promises = required_block.is_some() || max_threads.is_some() || min_blocks.is_some();
        let share = match promises {
            true => {
                let threads = self.max_threads().saturating_mul(min_blocks.unwrap_or(1));
                OF_A_MULTIPROCESSOR / threads.max(1) / 8 * 8
            }
            false => 255,
        };
        live.min(named).min(share).max(1)
    }
}

/// How to launch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LaunchConfig {
    /// Blocks in x, y, z.
    pub grid: [u32; 3],
    /// Threads of a block in x, y, z.
    pub block: [u32; 3],
    /// Dynamic shared memory, bytes.
    pub shared_bytes: u32,
    /// Blocks of a cluster in x, y, z.
    pub cluster: [u32; 3],
    /// Decides the order of blocks and warps.
    pub seed: u64,
    /// The checks to run.
    pub checks: Checks,
    /// Whether to count.
    pub counters: bool,
    /// The watchdog: a launch that runs more warp instructions ends with a fault, within some
    /// thousands of them. `None` lets an endless kernel run for ever.
    pub max_instructions: Option<u64>,
}

impl Default for LaunchConfig {
    /// One block of one thread, every check, no counters, no watchdog.
    fn default() -> LaunchConfig {
        LaunchConfig {
            grid: [1; 3],
            block: [1; 3],
            shared_bytes: 0,
            cluster: [1; 3],
            seed: 0,
            checks: Checks::all(),
            counters: false,
            max_instructions: None,
        }
    }
}

/// What a launch leaves behind beside its effect on memory.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LaunchReport {
    /// The totals, when they were asked for.
    pub counters: Option<Counters>,
    /// What the kernel printed.
    pub printed: String,
}
