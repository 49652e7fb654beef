//! What the engine tells an observer.

use crate::exec::Launch;
use crate::program::Instr;
use crate::report::{AccessKind, FaultKind, Space};

/// Where a warp is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Site {
    /// Number of the block in the grid.
    pub block: u32,
    /// Number of the block in its cluster.
    pub rank: u32,
    /// Number of the warp in the block.
    pub warp: u32,
    pub pc: u32,
    pub active: u32,
}

/// What a warp instruction does to memory.
pub(crate) struct MemoryEvent<'a> {
    pub space: Space,
    pub kind: AccessKind,
    /// Of each lane.
    pub bytes: u32,
    /// In their space; only those of active lanes count.
    pub addresses: &'a [u64; 32],
    /// Does not race with other strong accesses.
    pub strong: bool,
}

/// A fault, and the lane that made it.
pub(crate) struct Violation {
    pub lane: usize,
    pub kind: FaultKind,
}

pub(crate) type Verdict = Result<(), Box<Violation>>;

/// Watches one cluster. It is lent to the block that has its turn; the others hold a default one,
/// which watches nothing. Every method is empty by default, and compiles to nothing.
pub(crate) trait Observer: Default {
    /// An instruction is about to run.
    fn issue(&mut self, _launch: &Launch<'_>, _site: &Site, _instr: &Instr) -> Verdict {
        Ok(())
    }

    /// A branch was taken by some lanes of a group and not by others.
    fn diverged(&mut self) {}

    /// Memory is about to be accessed; the addresses are valid.
    fn access(&mut self, _launch: &Launch<'_>, _site: &Site, _event: &MemoryEvent<'_>) -> Verdict {
        Ok(())
    }

    /// An asynchronous copy of `bytes` bytes to shared memory was issued by each active lane.
    fn copy_issued(
        &mut self,
        _launch: &Launch<'_>,
        _site: &Site,
        _to: &[u64; 32],
        _bytes: u32,
    ) -> Verdict {
        Ok(())
    }

    /// A copy of `lane` landed: its data is now the lane's own write.
    fn copy_landed(&mut self, _site: &Site, _lane: usize, _to: u32, _bytes: u32) {}

    /// The active lanes arrived at the mbarrier at `address`: what they did is done before the phase
    /// completes.
    fn mbarrier_arrived(&mut self, _site: &Site, _address: u64) {}

    /// The active lanes have waited for a phase of the mbarrier at `address`.
    fn mbarrier_waited(&mut self, _site: &Site, _address: u64) {}

    /// Bytes that a bulk copy brought to the block of that rank are there for every thread that
    /// waits at its mbarrier.
    fn bulk_landed(&mut self, _rank: u32, _to: u32, _bytes: u32) {}

    /// The asynchronous proxy is about to read shared memory.
    fn async_read(
        &mut self,
        _launch: &Launch<'_>,
        _site: &Site,
        _from: u32,
        _bytes: u32,
    ) -> Verdict {
        Ok(())
    }

    /// The active lanes made their writes visible to the asynchronous proxy.
    fn proxy_fence(&mut self, _site: &Site) {}

    /// Threads of a block waited for each other. One mask of lanes per warp: those that have waited,
    /// and those that only announced themselves.
    fn synchronized(&mut self, _rank: u32, _waited: &[u32], _arrived: &[u32]) {}

    /// The lanes of one warp waited for each other.
    fn warp_synchronized(&mut self, _rank: u32, _warp: u32) {}

    /// The active lanes arrived at a phase of the cluster's barrier.
    fn cluster_arrived(&mut self, _site: &Site, _phase: u64) {}

    /// The active lanes have waited for a phase of the cluster's barrier.
    fn cluster_waited(&mut self, _site: &Site, _phase: u64) {}

    /// The engine itself wrote to a lane's local memory: arguments and results of calls.
    fn local_written(&mut self, _site: &Site, _lane: usize, _address: u64, _bytes: u32) {}

    /// A fence, of device scope or of the block's or cluster's.
    fn fence(&mut self, _site: &Site, _device: bool) {}

    /// A strong write follows; `release` where it has that order itself.
    fn releasing(&mut self, _site: &Site, _release: bool) {}

    /// A strong read has been made; `acquire` where it has that order itself.
    fn acquiring(&mut self, _site: &Site, _acquire: bool) {}
}

/// Watches nothing.
impl Observer for () {}
