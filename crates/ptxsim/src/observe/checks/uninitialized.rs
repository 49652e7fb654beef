//! Reads of memory that nobody wrote.

use super::super::{MemoryEvent, Site, Verdict, Violation};
use super::{access_of, lanes};
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

/// What one block has written to shared and local memory; for global memory the allocation knows.
pub(in super::super) struct Uninitialized {
    /// Absent in clusters, where other blocks may write here unseen.
    shared: Option<Written>,
    /// Of all threads, one after the other.
    local: Written,
    local_bytes: usize,
}

impl Uninitialized {
    pub fn new(launch: &Launch<'_>) -> Uninitialized {
        let local_bytes = launch.program.local_bytes as usize;
        let threads = launch.threads().next_multiple_of(32) as usize;
        let alone = launch.config.cluster == [1; 3];
        Uninitialized {
            shared: alone.then(|| Written::new(launch.shared_bytes as usize)),
            local: Written::new(threads * local_bytes),
            local_bytes,
        }
    }

    fn local_at(&self, warp: u32, lane: usize, address: u64) -> usize {
        (warp as usize * 32 + lane) * self.local_bytes + address as usize
    }

    pub fn local_written(&mut self, warp: u32, lane: usize, address: u64, bytes: u32) {
        let at = self.local_at(warp, lane, address);
        self.local.mark(at, bytes as usize);
    }

    pub fn shared_written(&mut self, address: u64, bytes: u32) {
        if let Some(shared) = &mut self.shared {
            shared.mark(address as usize, bytes as usize);
        }
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
                    let Some(shared) = &mut self.shared else {
                        continue;
                    };
                    let known = !reads || shared.all(address as usize, bytes);
                    if writes {
                        shared.mark(address as usize, bytes);
                    }
                    (known, None)
                }
                Space::Local => {
                    let at = self.local_at(site.warp, lane, address);
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
