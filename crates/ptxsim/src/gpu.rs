//! The public face: a GPU to allocate on, load PTX into and launch kernels on.

use std::sync::Arc;

use crate::memory::{DeviceMemory, DevicePtr, MemoryError, MemoryInfo};
use crate::observe::{Checks, Counters};
use crate::profile::Profile;
use crate::program::Param;
use crate::report::Fault;
use crate::syntax::LoadError;

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
        Err(LoadError::at(ptx, 0, "the reader is not here yet"))
    }

    /// Runs a kernel to its end. `args` holds the parameters at the offsets of
    /// [`Kernel::params`].
    pub fn launch(
        &self,
        kernel: &Kernel,
        config: &LaunchConfig,
        args: &[u8],
    ) -> Result<LaunchReport, Fault> {
        let _ = (config, args);
        Err(Fault {
            kernel: kernel.name.clone(),
            kind: Box::new(crate::FaultKind::InvalidLaunch(
                "the engine is not here yet".into(),
            )),
            party: None,
        })
    }
}

/// A loaded PTX module.
#[derive(Clone)]
pub struct Module {
    kernels: Arc<Vec<Kernel>>,
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
        let _ = name;
        None
    }

    /// The kernels' names.
    pub fn kernels(&self) -> impl Iterator<Item = &str> {
        self.kernels.iter().map(Kernel::name)
    }
}

/// A kernel of a loaded module.
#[derive(Clone)]
pub struct Kernel {
    name: Arc<str>,
    params: Arc<[Param]>,
}

impl Kernel {
    /// Its name, as in the PTX.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its parameters, in order.
    pub fn params(&self) -> &[Param] {
        &self.params
    }

    /// The bytes that the parameters take.
    pub fn params_size(&self) -> u32 {
        self.params.last().map_or(0, |last| last.offset + last.size)
    }

    /// Shared memory that it declares with a size, bytes.
    pub fn static_shared_bytes(&self) -> u32 {
        0
    }

    /// Local memory of one thread, bytes.
    pub fn local_bytes(&self) -> u32 {
        0
    }

    /// The most threads that a block may have, by `.maxntid` or `.reqntid`, else 1024.
    pub fn max_threads(&self) -> u32 {
        1024
    }

    /// An estimate of the 32-bit registers that a thread needs: the most alive at once.
    pub fn registers(&self) -> u32 {
        0
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
}

impl Default for LaunchConfig {
    /// One block of one thread, every check, no counters.
    fn default() -> LaunchConfig {
        LaunchConfig {
            grid: [1; 3],
            block: [1; 3],
            shared_bytes: 0,
            cluster: [1; 3],
            seed: 0,
            checks: Checks::all(),
            counters: false,
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
