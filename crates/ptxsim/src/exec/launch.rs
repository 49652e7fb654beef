//! A grid: checked, handed out block by block, its faults and figures brought together.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

use rayon::prelude::*;

use super::block::Progress;
use super::cluster::Gang;
use crate::gpu::{LaunchConfig, LaunchReport};
use crate::memory::Snapshot;
use crate::observe::{Observer, Watch, Watcher};
use crate::profile::Profile;
use crate::program::Program;
use crate::report::{Fault, FaultKind, Party};

/// What all blocks of a launch share.
pub(crate) struct Launch<'a> {
    pub program: &'a Program,
    pub memory: Snapshot<'a>,
    pub config: &'a LaunchConfig,
    pub profile: &'a Profile,
    /// The kernel's parameters.
    pub arguments: &'a [u8],
    /// Static and dynamic shared memory of a block, bytes.
    pub shared_bytes: u32,
    pub printed: Mutex<String>,
    /// Warp instructions that all blocks have run, where the launch limits them.
    pub spent: AtomicU64,
}

impl Launch<'_> {
    /// Threads of a block.
    pub fn threads(&self) -> u32 {
        self.config.block.iter().product()
    }

    /// Warps of a block.
    pub fn warps(&self) -> usize {
        self.threads().div_ceil(32) as usize
    }

    /// Blocks of a cluster.
    pub fn cluster_blocks(&self) -> usize {
        self.config.cluster.iter().product::<u32>() as usize
    }

    pub fn clusters(&self) -> u32 {
        self.blocks() / self.cluster_blocks() as u32
    }

    /// Number in the grid of the block of that rank in a cluster.
    pub fn block_number(&self, cluster: u32, rank: u32) -> u32 {
        let (grid, shape) = (self.config.grid, self.config.cluster);
        let corner = unflatten(cluster, [0, 1, 2].map(|axis| grid[axis] / shape[axis]));
        let within = unflatten(rank, shape);
        let [x, y, z] = [0, 1, 2].map(|axis| corner[axis] * shape[axis] + within[axis]);
        x + grid[0] * (y + grid[1] * z)
    }

    pub fn blocks(&self) -> u32 {
        self.config.grid.iter().product()
    }

    /// A thread at an instruction, in words.
    pub fn party(&self, block: u32, thread: u32, pc: u32) -> Party {
        Party {
            block: unflatten(block, self.config.grid),
            thread: unflatten(thread, self.config.block),
            location: self.program.location(pc),
        }
    }
}

/// The coordinates of number `index` in a box, x fastest.
pub(super) fn unflatten(index: u32, [x, y, _]: [u32; 3]) -> [u32; 3] {
    [index % x, index / x % y, index / x / y]
}

fn check(
    program: &Program,
    config: &LaunchConfig,
    profile: &Profile,
    arguments: &[u8],
) -> Result<(), String> {
    let product = |dims: [u32; 3]| dims.iter().map(|&d| u64::from(d)).product::<u64>();
    let threads = product(config.block);
    let limit = u64::from(program.max_threads.unwrap_or(1024)).min(1024);
    if threads == 0 || product(config.grid) == 0 || product(config.cluster) == 0 {
        return Err("every dimension of grid, block and cluster must be at least 1".into());
    }
    if threads > limit || config.block[2] > 64 {
        return Err(format!(
            "{threads} threads per block, at most {limit} are allowed"
        ));
    }
    if product(config.grid) > u64::from(u32::MAX) {
        return Err("the grid has more than 2^32 blocks".into());
    }
    if config.grid[1] > 65535 || config.grid[2] > 65535 {
        return Err("the grid has more than 65535 blocks in y or z".into());
    }
    if let Some(required) = program.required_block
        && required != config.block
    {
        return Err(format!(
            "the kernel requires blocks of {required:?} threads"
        ));
    }
    if let Some(required) = program.required_cluster
        && required != config.cluster
    {
        return Err(format!(
            "the kernel requires clusters of {required:?} blocks"
        ));
    }
    let shared = u64::from(program.shared_bytes) + u64::from(config.shared_bytes);
    if shared > u64::from(profile.shared_per_block_optin) {
        return Err(format!(
            "{shared} bytes of shared memory per block, {} has {}",
            profile.name, profile.shared_per_block_optin
        ));
    }
    if arguments.len() < program.params_bytes as usize {
        return Err(format!(
            "the kernel takes {} bytes of arguments, {} were given",
            program.params_bytes,
            arguments.len()
        ));
    }
    let divisible = config
        .grid
        .iter()
        .zip(&config.cluster)
        .all(|(grid, cluster)| grid % cluster == 0);
    if !divisible || product(config.cluster) > 16 {
        return Err("the grid must be made of whole clusters of at most 16 blocks".into());
    }
    if let Some(required) = program.required_cluster
        && required != config.cluster
    {
        return Err(format!(
            "the kernel requires clusters of {required:?} blocks"
        ));
    }
    if product(config.cluster) > 1 && profile.compute_capability < (9, 0) {
        return Err(format!("{} has no clusters", profile.name));
    }
    Ok(())
}

/// Runs a kernel to its end.
pub(crate) fn run(
    program: &Program,
    memory: Snapshot<'_>,
    config: &LaunchConfig,
    profile: &Profile,
    arguments: &[u8],
) -> Result<LaunchReport, Fault> {
    // A kernel that was compiled for a cluster is launched in that one.
    let config = &LaunchConfig {
        cluster: match config.cluster {
            [1, 1, 1] => program.required_cluster.unwrap_or([1; 3]),
            asked => asked,
        },
        ..config.clone()
    };
    if let Err(why) = check(program, config, profile, arguments) {
        let kind = Box::new(FaultKind::InvalidLaunch(why));
        return Err(Fault {
            kernel: program.name.clone(),
            kind,
            party: None,
            printed: String::new(),
        });
    }
    if !config.checks.uninitialized {
        memory.assume_written();
    }
    let launch = Launch {
        program,
        memory,
        config,
        profile,
        arguments,
        shared_bytes: program.shared_bytes + config.shared_bytes,
        printed: Mutex::new(String::new()),
        spent: AtomicU64::new(0),
    };
    let watch = Watch::new(&launch);
    let outcome = if watch.is_idle() {
        run_blocks(&launch, |_| ())
    } else {
        run_blocks(&launch, |cluster| Watcher::new(&watch, &launch, cluster))
    };
    let counters = watch.into_counters();
    let printed = launch
        .printed
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner);
    match outcome {
        Ok(()) => Ok(LaunchReport { counters, printed }),
        Err(fault) => Err(Fault { printed, ..fault }),
    }
}

/// The blocks in an order that the seed decides.
fn order(blocks: u32, seed: u64) -> impl Fn(usize) -> u32 {
    // A stride coprime to the number of blocks visits each once.
    let count = u64::from(blocks);
    let mut stride = if seed == 0 { 1 } else { mix(seed) % count + 1 };
    while gcd(stride, count) != 1 {
        stride += 1;
    }
    let start = if seed == 0 { 0 } else { mix(seed ^ 1) % count };
    move |index| ((start + index as u64 * stride) % count) as u32
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// The next number of a splitmix64 generator.
pub(super) fn mix(seed: u64) -> u64 {
    let z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Runs every cluster, on all threads of the pool. One that has run long makes room for others:
/// it may be waiting for one of them.
fn run_blocks<'l, O: Observer + Send>(
    launch: &'l Launch<'l>,
    observer: impl Fn(u32) -> O + Sync,
) -> Result<(), Fault> {
    let clusters = launch.clusters() as usize;
    let order = order(launch.clusters(), launch.config.seed);
    let next = AtomicUsize::new(0);
    let stop = AtomicBool::new(false);
    let waiting: Mutex<VecDeque<Gang<'l, O>>> = Mutex::new(VecDeque::new());
    let fault: Mutex<Option<Fault>> = Mutex::new(None);
    let take_waiting = || {
        waiting
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop_front()
    };
    let worker = |_| {
        while !stop.load(Relaxed) {
            let index = next.fetch_add(1, Relaxed);
            let mut gang = if index < clusters {
                Gang::new(launch, order(index), &observer)
            } else if let Some(gang) = take_waiting() {
                gang
            } else {
                break;
            };
            match gang.run() {
                Ok(Progress::Done) => {}
                // A cluster says of itself when it is stuck.
                Ok(Progress::Paused | Progress::Blocked) => {
                    waiting
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .push_back(gang);
                }
                Err(found) => {
                    stop.store(true, Relaxed);
                    let mut fault = fault.lock().unwrap_or_else(PoisonError::into_inner);
                    fault.get_or_insert(found);
                }
            }
        }
    };
    let threads = rayon::current_num_threads().min(clusters);
    if threads == 1 {
        worker(0);
    } else {
        (0..threads).into_par_iter().for_each(worker);
    }
    match fault.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(fault) => Err(fault),
        None => Ok(()),
    }
}
