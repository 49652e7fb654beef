//! Reads by the asynchronous proxy (bulk stores, `wgmma`) of shared memory that a thread wrote
//! without a `fence.proxy.async` since: the hardware may read what was there before.
//!
//! The fence may be the writer's own, or another thread's that synchronized with the writer before.

use super::SharedMap;
use crate::exec::{Launch, owner};
use crate::observe::{MemoryEvent, Site, Verdict, Violation};
use crate::report::{Access, AccessKind, FaultKind, Space};

/// Bytes that share an entry: threads that write less mostly write next to each other.
const GRANULE: usize = 4;

/// The last thread that wrote a granule.
#[derive(Clone, Copy)]
struct Writer {
    block: u32,
    /// Number of the thread in the cluster's warps.
    thread: u32,
    /// Fences that the thread had executed.
    fences: u32,
    /// Synchronizations until then of the block that was written to.
    epoch: u32,
    pc: u32,
}

/// How far one block of the cluster is.
#[derive(Clone, Copy, Default)]
struct Epochs {
    /// Synchronizations so far.
    now: u32,
    /// What was written in an earlier epoch than this one has been fenced by somebody.
    fenced_before: u32,
}

/// Watches the shared memory of a cluster.
pub(crate) struct ProxyCheck {
    map: SharedMap,
    /// Lanes of the warps of one block.
    lanes: u32,
    writers: Vec<Option<Writer>>,
    /// Fences that each thread has executed.
    fences: Vec<u32>,
    epochs: Vec<Epochs>,
}

impl ProxyCheck {
    pub fn new(launch: &Launch<'_>) -> ProxyCheck {
        let map = SharedMap::new(launch);
        let (lanes, blocks) = (32 * launch.warps(), launch.cluster_blocks());
        ProxyCheck {
            map,
            lanes: lanes as u32,
            writers: vec![None; map.total_bytes().div_ceil(GRANULE)],
            fences: vec![0; lanes * blocks],
            epochs: vec![Epochs::default(); blocks],
        }
    }

    fn granules(&self, rank: u32, from: u64, bytes: u32) -> std::ops::Range<usize> {
        let from = self.map.at(rank, from) as usize;
        from / GRANULE..(from + bytes as usize).div_ceil(GRANULE)
    }

    /// Threads access memory.
    pub fn access(&mut self, site: &Site, event: &MemoryEvent<'_>) {
        if event.space != Space::Shared || event.kind == AccessKind::Read {
            return;
        }
        for lane in (0..32).filter(|lane| site.active >> lane & 1 == 1) {
            let thread = site.rank * self.lanes + site.warp * 32 + lane as u32;
            let (owner, _) = owner(event.addresses[lane], site.rank);
            let writer = Writer {
                block: site.block,
                thread,
                fences: self.fences[thread as usize],
                epoch: self.epochs[owner as usize].now,
                pc: site.pc,
            };
            let granules = self.granules(site.rank, event.addresses[lane], event.bytes);
            self.writers[granules].fill(Some(writer));
        }
    }

    /// Threads fence.
    pub fn fence(&mut self, site: &Site) {
        for lane in (0..32).filter(|lane| site.active >> lane & 1 == 1) {
            let thread = site.rank * self.lanes + site.warp * 32 + lane as u32;
            self.fences[thread as usize] += 1;
        }
        let epochs = &mut self.epochs[site.rank as usize];
        epochs.fenced_before = epochs.now;
    }

    /// Threads of a block waited for others, at a barrier or an mbarrier.
    pub fn synchronized(&mut self, rank: u32) {
        self.epochs[rank as usize].now += 1;
    }

    /// The asynchronous proxy wrote.
    pub fn landed(&mut self, rank: u32, to: u32, bytes: u32) {
        let granules = self.granules(rank, to.into(), bytes);
        self.writers[granules].fill(None);
    }

    /// The asynchronous proxy reads.
    pub fn async_read(&self, launch: &Launch<'_>, site: &Site, from: u32, bytes: u32) -> Verdict {
        let fenced_before = self.epochs[site.rank as usize].fenced_before;
        let unfenced = |writer: &&Writer| {
            self.fences[writer.thread as usize] == writer.fences && writer.epoch >= fenced_before
        };
        let writers = &self.writers[self.granules(site.rank, from.into(), bytes)];
        match writers.iter().flatten().find(unfenced) {
            None => Ok(()),
            Some(writer) => Err(Box::new(Violation {
                lane: site.active.trailing_zeros() as usize,
                kind: FaultKind::MissingProxyFence {
                    access: Access {
                        kind: AccessKind::Read,
                        space: Space::Shared,
                        address: from.into(),
                        bytes,
                    },
                    writer: launch.party(writer.block, writer.thread % self.lanes, writer.pc),
                },
            })),
        }
    }
}
