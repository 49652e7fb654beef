//! Reads by the asynchronous proxy (bulk stores, `wgmma`) of shared memory that a thread wrote
//! without a `fence.proxy.async` since: the hardware may read what was there before.
//!
//! The fence may be the writer's own, or another thread's that synchronized with the writer before.

use crate::exec::Launch;
use crate::observe::{MemoryEvent, Site, Verdict, Violation};
use crate::report::{Access, AccessKind, FaultKind, Space};

/// Bytes that share an entry: threads that write less mostly write next to each other.
const GRANULE: usize = 4;

/// The last thread that wrote a granule.
#[derive(Clone, Copy)]
struct Writer {
    thread: u32,
    /// Fences that the thread had executed.
    fences: u32,
    /// Synchronizations of the block until then.
    epoch: u32,
    pc: u32,
}

/// Watches the shared memory of one block.
pub(crate) struct ProxyCheck {
    writers: Vec<Option<Writer>>,
    /// Fences that each thread has executed.
    fences: Vec<u32>,
    /// Synchronizations of the block so far.
    epoch: u32,
    /// What was written in an earlier epoch than this one has been fenced by somebody.
    fenced_before: u32,
}

impl ProxyCheck {
    pub fn new(launch: &Launch<'_>) -> ProxyCheck {
        ProxyCheck {
            writers: vec![None; (launch.shared_bytes as usize).div_ceil(GRANULE)],
            fences: vec![0; launch.threads() as usize],
            epoch: 0,
            fenced_before: 0,
        }
    }

    fn granules(from: u64, bytes: u32) -> std::ops::Range<usize> {
        from as usize / GRANULE..(from as usize + bytes as usize).div_ceil(GRANULE)
    }

    /// Threads access memory.
    pub fn access(&mut self, site: &Site, event: &MemoryEvent<'_>) {
        if event.space != Space::Shared || event.kind == AccessKind::Read {
            return;
        }
        for lane in (0..32).filter(|lane| site.active >> lane & 1 == 1) {
            let thread = site.warp * 32 + lane as u32;
            let fences = self.fences[thread as usize];
            let writer = Writer {
                thread,
                fences,
                epoch: self.epoch,
                pc: site.pc,
            };
            let granules = ProxyCheck::granules(event.addresses[lane], event.bytes);
            self.writers[granules].fill(Some(writer));
        }
    }

    /// Threads fence.
    pub fn fence(&mut self, site: &Site) {
        for lane in (0..32).filter(|lane| site.active >> lane & 1 == 1) {
            self.fences[site.warp as usize * 32 + lane] += 1;
        }
        self.fenced_before = self.epoch;
    }

    /// Threads waited for others, at a barrier or an mbarrier.
    pub fn synchronized(&mut self) {
        self.epoch += 1;
    }

    /// The asynchronous proxy wrote.
    pub fn landed(&mut self, to: u32, bytes: u32) {
        self.writers[ProxyCheck::granules(to.into(), bytes)].fill(None);
    }

    /// The asynchronous proxy reads.
    pub fn async_read(&self, launch: &Launch<'_>, site: &Site, from: u32, bytes: u32) -> Verdict {
        let unfenced = |writer: &&Writer| {
            self.fences[writer.thread as usize] == writer.fences
                && writer.epoch >= self.fenced_before
        };
        let writers = &self.writers[ProxyCheck::granules(from.into(), bytes)];
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
                    writer: launch.party(site.block, writer.thread, writer.pc),
                },
            })),
        }
    }
}
