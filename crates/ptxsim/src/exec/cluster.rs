//! A cluster: blocks that run together, reach each other's shared memory and wait for each other.
//!
//! The blocks of a cluster take turns on one thread. What they share moves to the one that runs.
//! Every block is in a cluster; most are alone in it.

use super::block::{Block, Progress};
use super::bulk::Load;
use super::launch::{Launch, mix};
use super::registers::{first_lane, lanes};
use super::step::Flow;
use crate::observe::{Observer, Site};
use crate::program::Reg;
use crate::report::{Access, AccessKind, Fault, FaultKind, Space};

/// Where an address in another block's shared memory keeps the block's rank plus one.
const RANK_SHIFT: u32 = 24;

/// What the blocks of a cluster share.
#[derive(Default)]
pub(super) struct Cluster {
    /// Shared memory by rank; that of the running block is with it.
    memories: Vec<Vec<u8>>,
    /// Bulk loads on their way to each block.
    pub loads: Vec<Vec<Load>>,
    /// Blocks that have ended.
    ended: Vec<bool>,
    /// Threads that have not exited.
    threads: u32,
    /// Arrivals at the current phase of the cluster's barrier.
    arrived: u32,
    /// Completed phases of the barrier.
    phase: u64,
}

impl Cluster {
    fn new(blocks: usize, threads: u32, shared_bytes: u32) -> Cluster {
        Cluster {
            memories: vec![vec![0; shared_bytes as usize]; blocks],
            loads: (0..blocks).map(|_| Vec::new()).collect(),
            ended: vec![false; blocks],
            threads: threads * blocks as u32,
            arrived: 0,
            phase: 0,
        }
    }

    pub fn blocks(&self) -> usize {
        self.memories.len()
    }

    /// Threads that exit are not waited for.
    pub fn leave(&mut self, threads: u32) {
        self.threads -= threads;
        self.advance();
    }

    fn advance(&mut self) {
        if self.arrived > 0 && self.arrived >= self.threads {
            self.arrived = 0;
            self.phase += 1;
        }
    }
}

/// The blocks of one cluster.
pub(super) struct Gang<'l, O> {
    blocks: Vec<Block<'l, O>>,
    done: Vec<bool>,
    cluster: Cluster,
    observer: O,
    /// The block that takes the first turn: the seed's choice.
    first: usize,
}

impl<'l, O: Observer> Gang<'l, O> {
    /// Cluster `number` of the grid.
    pub fn new(launch: &'l Launch<'l>, number: u32, observer: impl Fn(u32) -> O) -> Gang<'l, O> {
        let size = launch.cluster_blocks();
        let block = |rank| Block::new(launch, launch.block_number(number, rank), rank);
        Gang {
            blocks: (0..size as u32).map(block).collect(),
            done: vec![false; size],
            observer: observer(number),
            first: match launch.config.seed {
                0 => 0,
                seed => (mix(seed ^ u64::from(number)) % size as u64) as usize,
            },
            cluster: Cluster::new(size, launch.threads(), launch.shared_bytes),
        }
    }

    /// Runs until every block has ended or one has run for long.
    pub fn run(&mut self) -> Result<Progress, Fault> {
        loop {
            let mut advanced = false;
            for turn in 0..self.blocks.len() {
                let rank = (self.first + turn) % self.blocks.len();
                if self.done[rank] {
                    continue;
                }
                let before = self.blocks[rank].clock;
                let progress = self.turn(rank, |block| block.run())?;
                advanced |= self.blocks[rank].clock != before;
                if let Progress::Done = progress {
                    self.done[rank] = true;
                    self.cluster.ended[rank] = true;
                }
                if let Progress::Paused = progress {
                    return Ok(Progress::Paused);
                }
            }
            if self.done.iter().all(|done| *done) {
                return Ok(Progress::Done);
            }
            if !advanced {
                let stuck = self.done.iter().position(|done| !done).unwrap_or_default();
                return Err(self.turn(stuck, |block| block.deadlock()));
            }
        }
    }

    /// Lends a block what the cluster shares.
    fn turn<T>(&mut self, rank: usize, act: impl FnOnce(&mut Block<'l, O>) -> T) -> T {
        let block = &mut self.blocks[rank];
        block.cluster = std::mem::take(&mut self.cluster);
        block.shared = std::mem::take(&mut block.cluster.memories[rank]);
        block.observer = std::mem::take(&mut self.observer);
        let result = act(block);
        block.cluster.memories[rank] = std::mem::take(&mut block.shared);
        self.cluster = std::mem::take(&mut block.cluster);
        self.observer = std::mem::take(&mut block.observer);
        result
    }
}

/// Rank of the block that an address in shared memory lies in, and the address there; `own` is the
/// rank of the block that uses it.
#[inline]
pub(crate) fn owner(address: u64, own: u32) -> (u32, u64) {
    match address >> RANK_SHIFT {
        0 => (own, address),
        rank => (rank as u32 - 1, address & ((1 << RANK_SHIFT) - 1)),
    }
}

/// Whether a shared address lies in another block of the cluster.
pub(super) fn is_remote(address: u64) -> bool {
    address >> RANK_SHIFT != 0
}

impl<O: Observer> Block<'_, O> {
    /// Bytes of shared memory, of another block where the address says so.
    pub(super) fn shared_bytes(&self, address: u64, bytes: usize) -> &[u8] {
        let at = (address & ((1 << RANK_SHIFT) - 1)) as usize;
        match (address >> RANK_SHIFT) as usize {
            0 => &self.shared[at..at + bytes],
            rank => &self.cluster.memories[rank - 1][at..at + bytes],
        }
    }

    /// As [`shared_bytes`](Block::shared_bytes), to be written.
    pub(super) fn shared_bytes_mut(&mut self, address: u64, bytes: usize) -> &mut [u8] {
        let at = (address & ((1 << RANK_SHIFT) - 1)) as usize;
        match (address >> RANK_SHIFT) as usize {
            0 => &mut self.shared[at..at + bytes],
            rank => &mut self.cluster.memories[rank - 1][at..at + bytes],
        }
    }

    /// Checks an address in another block's shared memory.
    pub(super) fn admit_remote(
        &self,
        site: &Site,
        lane: usize,
        kind: AccessKind,
        address: u64,
        bytes: u32,
    ) -> Result<(), Fault> {
        let rank = (address >> RANK_SHIFT) as usize - 1;
        let at = address & ((1 << RANK_SHIFT) - 1);
        let limit = self
            .cluster
            .memories
            .get(rank)
            .map_or(0, |memory| memory.len() as u64);
        if at + u64::from(bytes) > limit {
            let access = Access {
                kind,
                space: Space::Shared,
                address,
                bytes,
            };
            let kind = FaultKind::OutOfBounds {
                access,
                nearest: None,
                limit: Some(limit),
            };
            return Err(self.fault(site, lane, kind));
        }
        if self.cluster.ended[rank] {
            let what = format!(
                "an access to the shared memory of block {rank} of the cluster, which has ended"
            );
            return Err(self.fault(site, lane, FaultKind::Undefined(what)));
        }
        Ok(())
    }

    /// The same address in the block of this rank.
    pub(super) fn remote_address(&self, address: u64, rank: usize) -> u64 {
        let at = address & ((1 << RANK_SHIFT) - 1);
        if rank == self.rank as usize {
            at
        } else {
            at | (rank as u64 + 1) << RANK_SHIFT
        }
    }

    /// `mapa`
    pub(super) fn map_address(
        &mut self,
        w: usize,
        site: &Site,
        d: Reg,
        a: Reg,
        rank: &[u32; 32],
    ) -> Result<(), Fault> {
        for lane in lanes(site.active) {
            let rank = rank[lane] as usize;
            if rank >= self.cluster.blocks() {
                let what = format!("block {rank} of a cluster of {}", self.cluster.blocks());
                return Err(self.fault(site, lane, FaultKind::Undefined(what)));
            }
            let address = self.warps[w].registers.get(a, lane);
            // A generic address keeps its window.
            let window = address & !0xffff_ffff;
            let mapped = window | self.remote_address(address & 0xffff_ffff, rank);
            self.warps[w].registers.put(d, lane, mapped);
        }
        Ok(())
    }

    /// `getctarank`
    pub(super) fn rank_of_address(&mut self, w: usize, active: u32, d: Reg, a: Reg) {
        for lane in lanes(active) {
            let address = self.warps[w].registers.get(a, lane) & 0xffff_ffff;
            let rank = (address >> RANK_SHIFT)
                .checked_sub(1)
                .unwrap_or(self.rank.into());
            self.warps[w].registers.put(d, lane, rank);
        }
    }

    /// `barrier.cluster.arrive`
    pub(super) fn cluster_arrive(&mut self, w: usize, site: &Site) {
        let active = site.active;
        let phase = self.cluster.phase + 1;
        for lane in lanes(active) {
            self.warps[w].cluster_phase[lane] = phase;
        }
        self.observer.cluster_arrived(site, phase);
        self.cluster.arrived += active.count_ones();
        self.cluster.advance();
    }

    /// `barrier.cluster.wait`
    pub(super) fn cluster_wait(&mut self, w: usize, site: &Site) -> Flow {
        if !self.cluster_done(w, site.active) {
            return Flow::Wait;
        }
        let phase = self.warps[w].cluster_phase[first_lane(site.active)];
        self.observer.cluster_waited(site, phase);
        Flow::Next
    }

    /// Whether the phase that these lanes arrived at has completed.
    pub(super) fn cluster_done(&self, w: usize, active: u32) -> bool {
        lanes(active).all(|lane| self.warps[w].cluster_phase[lane] <= self.cluster.phase)
    }
}
