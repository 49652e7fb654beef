//! Launches and occupancy.

use crate::error::CuResult;
use crate::pointer::{In, Out};
use crate::state::{
    Context, Driver, Function, Handle, LAUNCHES, LaunchRecord, in_context, lock, report, settings,
};
use ptxsim::{Kernel, LaunchConfig, Profile};
use std::sync::atomic::Ordering;

/// `CUlaunchConfig`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Config {
    grid: [u32; 3],
    block: [u32; 3],
    shared_bytes: u32,
    stream: Handle,
    attributes: In<Attribute>,
    attribute_count: u32,
}

/// `CUlaunchAttribute`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Attribute {
    id: u32,
    pad: u32,
    value: [u32; 16],
}

/// Where the arguments are: a pointer to each, or one packed buffer.
struct Arguments {
    pointers: In<In<u8>>,
    extra: In<u64>,
}

impl Arguments {
    /// The parameters' bytes at the offsets that the kernel declares.
    fn pack(&self, kernel: &Kernel) -> Result<Vec<u8>, CuResult> {
        if !self.pointers.is_null() || kernel.params().is_empty() {
            let mut packed = vec![0; kernel.params_size() as usize];
            let pointers = self.pointers.slice(kernel.params().len())?;
            for (param, pointer) in kernel.params().iter().zip(pointers) {
                let to = param.offset as usize..(param.offset + param.size) as usize;
                packed[to].copy_from_slice(pointer.slice(param.size as usize)?);
            }
            return Ok(packed);
        }
        let (mut buffer, mut bytes) = (None, None);
        for pair in 0.. {
            let value = self.extra.offset(2 * pair + 1);
            match self.extra.offset(2 * pair).get()? {
                0 => break,
                1 => buffer = Some(In::<u8>::at(value.get()?)),
                2 => bytes = Some(In::<usize>::at(value.get()?).get()?),
                _ => return Err(CuResult::ERROR_INVALID_VALUE),
            }
        }
        match buffer.zip(bytes) {
            Some((buffer, bytes)) if bytes >= kernel.params_size() as usize => {
                Ok(buffer.slice(bytes)?.to_vec())
            }
            _ => Err(CuResult::ERROR_INVALID_VALUE),
        }
    }
}

/// The limits that the driver checks before the device sees the launch.
fn check(profile: &Profile, function: &Function, config: &Config) -> Result<(), CuResult> {
    let threads: u64 = config
        .block
        .iter()
        .map(|&extent| u64::from(extent))
        .product();
    let empty = config
        .grid
        .iter()
        .chain(&config.block)
        .any(|&extent| extent == 0);
    let refused = if empty {
        "a dimension of the grid or the block is 0".to_owned()
    } else if config.block[2] > 64 || threads > u64::from(function.kernel.max_threads()) {
        format!(
            "a block of {:?} threads, where the kernel allows {}",
            config.block,
            function.kernel.max_threads()
        )
    } else if config.grid[1] > 65535 || config.grid[2] > 65535 || config.grid[0] > i32::MAX as u32 {
        format!("a grid of {:?} blocks", config.grid)
    } else if config.shared_bytes as i32 > function.max_dynamic_shared.load(Ordering::Relaxed) {
        format!(
            "{} bytes of dynamic shared memory, where the kernel allows {} (raise \
             CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES first)",
            config.shared_bytes,
            function.max_dynamic_shared.load(Ordering::Relaxed)
        )
    } else if threads * u64::from(function.kernel.registers()) > u64::from(profile.registers_per_sm)
    {
        report(format!(
            "the launch of {} needs too many registers",
            function.kernel.name()
        ));
        return Err(CuResult::ERROR_LAUNCH_OUT_OF_RESOURCES);
    } else {
        return Ok(());
    };
    report(format!(
        "the launch of {} was refused: {refused}",
        function.kernel.name()
    ));
    Err(CuResult::ERROR_INVALID_VALUE)
}

/// The extent of a cluster that the attributes ask for.
fn cluster(config: &Config) -> Result<[u32; 3], CuResult> {
    let mut cluster = [1; 3];
    for attribute in config.attributes.slice(config.attribute_count as usize)? {
        match attribute.id {
            4 => cluster = [attribute.value[0], attribute.value[1], attribute.value[2]],
            // A grid-wide barrier would need all blocks resident at once.
            2 if attribute.value[0] != 0 => return Err(CuResult::ERROR_NOT_SUPPORTED),
            // Priorities, scheduling preferences, overlap with earlier launches: hints to an
            // in-order stream.
            0 | 2 | 3 | 5 | 6 | 8 | 9 | 10 | 14 => {}
            _ => return Err(CuResult::ERROR_NOT_SUPPORTED),
        }
    }
    Ok(cluster)
}

fn launch(
    driver: &Driver,
    context: &Context,
    function: Handle,
    config: &Config,
    arguments: &Arguments,
) -> Result<(), CuResult> {
    driver.check_stream(config.stream)?;
    let function = driver.functions.get(function)?;
    check(driver.gpu.profile(), &function, config)?;
    let geometry = LaunchConfig {
        grid: config.grid,
        block: config.block,
        shared_bytes: config.shared_bytes,
        cluster: cluster(config)?,
        ..LaunchConfig::default()
    };
    let packed = arguments.pack(&function.kernel)?;
    let kernel = function.kernel.clone();
    driver.submit(context, config.stream, move |driver, context| {
        run(driver, context, &kernel, &geometry, &packed)
    })
}

/// Runs a kernel under the present settings.
fn run(
    driver: &Driver,
    context: &Context,
    kernel: &Kernel,
    geometry: &LaunchConfig,
    arguments: &[u8],
) -> Result<(), CuResult> {
    let simulated = settings(|settings| LaunchConfig {
        seed: settings.seed,
        checks: settings.checks,
        counters: settings.counters,
        max_instructions: Some(settings.max_instructions),
        ..geometry.clone()
    });
    match driver.gpu.launch(kernel, &simulated, arguments) {
        Ok(done) => {
            print!("{}", done.printed);
            if let Some(counters) = done.counters {
                let kernel = kernel.name().to_owned();
                lock(&LAUNCHES).push(LaunchRecord { kernel, counters });
            }
            Ok(())
        }
        Err(fault) => {
            print!("{}", fault.printed);
            report(fault.to_string());
            let (code, ends_context) = CuResult::of_fault(&fault);
            if ends_context {
                *lock(&context.fault) = Some(code);
            }
            Err(code)
        }
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuLaunchKernel(
    function: Handle,
    grid_x: u32,
    grid_y: u32,
    grid_z: u32,
    block_x: u32,
    block_y: u32,
    block_z: u32,
    shared_bytes: u32,
    stream: Handle,
    pointers: In<In<u8>>,
    extra: In<u64>,
) -> CuResult {
    let config = Config {
        grid: [grid_x, grid_y, grid_z],
        block: [block_x, block_y, block_z],
        shared_bytes,
        stream,
        attributes: In::at(0),
        attribute_count: 0,
    };
    in_context(|driver, _, context| {
        launch(
            driver,
            context,
            function,
            &config,
            &Arguments { pointers, extra },
        )
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuLaunchKernelEx(
    config: In<Config>,
    function: Handle,
    pointers: In<In<u8>>,
    extra: In<u64>,
) -> CuResult {
    in_context(|driver, _, context| {
        launch(
            driver,
            context,
            function,
            &config.get()?,
            &Arguments { pointers, extra },
        )
    })
}

// ---- occupancy ----

/// Blocks of a kernel that fit on one multiprocessor at once: by blocks, threads, registers (a
/// warp takes them in units of 256) and shared memory (in units of 128 bytes, 1 KiB of each block
/// reserved for the system).
fn resident_blocks(profile: &Profile, kernel: &Kernel, threads: u32, dynamic_shared: u64) -> u32 {
    if threads == 0 || threads > kernel.max_threads() {
        return 0;
    }
    let warps = threads.div_ceil(32);
    let by_warps = profile.threads_per_sm / 32 / warps;
    let warp_registers = (32 * kernel.registers().max(1)).next_multiple_of(256);
    let by_registers = profile.registers_per_sm / warp_registers / warps;
    let shared = u64::from(kernel.static_shared_bytes()) + dynamic_shared;
    if shared > u64::from(profile.shared_per_block_optin) {
        return 0;
    }
    let by_shared = u64::from(profile.shared_per_sm) / (shared + 1024).next_multiple_of(128);
    profile
        .blocks_per_sm
        .min(by_warps)
        .min(by_registers)
        .min(by_shared as u32)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuOccupancyMaxActiveBlocksPerMultiprocessor(
    blocks: Out<i32>,
    function: Handle,
    threads: i32,
    dynamic_shared: usize,
) -> CuResult {
    in_context(|driver, _, _| {
        let function = driver.functions.get(function)?;
        let threads = u32::try_from(threads).map_err(|_| CuResult::ERROR_INVALID_VALUE)?;
        let profile = driver.gpu.profile();
        let resident = resident_blocks(profile, &function.kernel, threads, dynamic_shared as u64);
        blocks.set(resident as i32)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    blocks: Out<i32>,
    function: Handle,
    threads: i32,
    dynamic_shared: usize,
    _flags: u32,
) -> CuResult {
    cuOccupancyMaxActiveBlocksPerMultiprocessor(blocks, function, threads, dynamic_shared)
}

/// How much dynamic shared memory a block size needs, as the caller computes it.
type SharedOfBlock = Option<unsafe extern "C" fn(i32) -> usize>;

#[unsafe(no_mangle)]
pub extern "C" fn cuOccupancyMaxPotentialBlockSize(
    grid: Out<i32>,
    block: Out<i32>,
    function: Handle,
    shared_of_block: SharedOfBlock,
    dynamic_shared: usize,
    limit: i32,
) -> CuResult {
    in_context(|driver, _, _| {
        let function = driver.functions.get(function)?;
        let profile = driver.gpu.profile();
        let kernel = &function.kernel;
        let limit = match u32::try_from(limit) {
            Ok(limit) if limit > 0 => limit.min(kernel.max_threads()),
            _ => kernel.max_threads(),
        };
        // The most resident threads; among equals the largest block.
        let best = (1..=limit / 32)
            .map(|warps| {
                let threads = 32 * warps;
                let shared = match shared_of_block {
                    // SAFETY: the caller passes a function of the block size.
                    Some(shared) => unsafe { shared(threads as i32) },
                    None => dynamic_shared,
                };
                let resident = resident_blocks(profile, kernel, threads, shared as u64);
                (resident * threads, threads, resident)
            })
            .max();
        let (_, threads, resident) = best.ok_or(CuResult::ERROR_INVALID_VALUE)?;
        grid.set((resident * profile.sm_count) as i32)?;
        block.set(threads as i32)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuOccupancyMaxPotentialBlockSizeWithFlags(
    grid: Out<i32>,
    block: Out<i32>,
    function: Handle,
    shared_of_block: SharedOfBlock,
    dynamic_shared: usize,
    limit: i32,
    _flags: u32,
) -> CuResult {
    cuOccupancyMaxPotentialBlockSize(
        grid,
        block,
        function,
        shared_of_block,
        dynamic_shared,
        limit,
    )
}

#[unsafe(no_mangle)]
pub extern "C" fn cuOccupancyAvailableDynamicSMemPerBlock(
    bytes: Out<usize>,
    function: Handle,
    blocks: i32,
    threads: i32,
) -> CuResult {
    in_context(|driver, _, _| {
        let function = driver.functions.get(function)?;
        let profile = driver.gpu.profile();
        let wanted = u32::try_from(blocks).map_err(|_| CuResult::ERROR_INVALID_VALUE)?;
        let threads = u32::try_from(threads).map_err(|_| CuResult::ERROR_INVALID_VALUE)?;
        if wanted == 0 || resident_blocks(profile, &function.kernel, threads, 0) < wanted {
            return Err(CuResult::ERROR_INVALID_VALUE);
        }
        let each = profile.shared_per_sm / wanted / 128 * 128;
        let used = function.kernel.static_shared_bytes();
        let room = (each - 1024).min(profile.shared_per_block_optin);
        bytes.set(room.saturating_sub(used) as usize)
    })
}
