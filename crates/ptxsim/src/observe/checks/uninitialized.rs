//! Reads of memory that nobody wrote.

use super::super::{MemoryEvent, Site, Verdict, Violation};
use super::{SharedMap, access_of, lanes};
use crate::exec::Launch;
use crate::report::{AccessKind, FaultKind, Space};

/// One bit per byte: set once written.
struct Written(Vec<u32>);

impl Written {
    fn new(bytes: usize) -> Written {
        Written(vec![0; bytes.div_ceil(32)])
    }

    fn mark(&mut self, at: usize, bytes: usize) {
        for byte in at..at + bytes {
            self.0[byte / 32] |= 1 << (byte % 32);
        }
    }

    fn all(&self, at: usize, bytes: usize) -> bool {
        (at..at + bytes).all(|byte| self.0[byte / 32] >> (byte % 32) & 1 == 1)
    }
}

/// What a cluster has written to shared and local memory; for global memory the allocation knows.
pub(in super::super) struct Uninitialized {
    map: SharedMap,
    shared: Written,
    /// Of all threads, one after the other.
    local: Written,
    local_bytes: usize,
    warps: usize,
}

impl Uninitialized {
    pub fn new(launch: &Launch<'_>) -> Uninitialized {
        let local_bytes = launch.program.local_bytes as usize;
        let threads = 32 * launch.warps() * launch.cluster_blocks();
        let map = SharedMap::new(launch);
        Uninitialized {
            map,
            shared: Written::new(map.total_bytes()),
            local: Written::new(threads * local_bytes),
            local_bytes,
            warps: launch.warps(),
        }
    }

    fn local_at(&self, site: &Site, lane: usize, address: u64) -> usize {
        let warp = site.rank as usize * self.warps + site.warp as usize;
        (warp * 32 + lane) * self.local_bytes + address as usize
    }

    pub fn local_written(&mut self, site: &Site, lane: usize, address: u64, bytes: u32) {
        let at = self.local_at(site, lane, address);
        self.local.mark(at, bytes as usize);
    }

    pub fn shared_written(&mut self, rank: u32, address: u64, bytes: u32) {
        let at = self.map.at(rank, address) as usize;
        self.shared.mark(at, bytes as usize);
    }

    pub fn access(&mut self, launch: &Launch<'_>, site: &Site, event: &MemoryEvent<'_>) -> Verdict {
        let reads = matches!(event.kind, AccessKind::Read | AccessKind::Atomic);
        let writes = matches!(event.kind, AccessKind::Write | AccessKind::Atomic);
        let bytes = event.bytes as usize;
        for lane in lanes(site.active) {
            let address = event.addresses[lane];
            let (known, allocation) = match event.space {
                Space::Param => continue,
                Space::Shared => {
                    let at = self.map.at(site.rank, address) as usize;
                    let known = !reads || self.shared.all(at, bytes);
                    if writes {
                        self.shared.mark(at, bytes);
                    }
                    (known, None)
                }
                Space::Local => {
                    let at = self.local_at(site, lane, address);
                    let known = !reads || self.local.all(at, bytes);
                    if writes {
                        self.local.mark(at, bytes);
                    }
                    (known, None)
                }
                Space::Global | Space::Const => {
                    let Ok((allocation, offset)) = launch.memory.resolve(address, bytes as u64)
                    else {
                        continue;
                    };
                    let known = !reads || allocation.is_written(offset, bytes as u64);
                    if writes {
                        allocation.mark_written(offset, bytes as u64);
                    }
                    (known, (!known).then(|| allocation.info()))
                }
            };
            if !known {
                let access = access_of(event, lane);
                let kind = FaultKind::Uninitialized { access, allocation };
                return Err(Box::new(Violation { lane, kind }));
            }
        }
        Ok(())
    }
}
