//! The instructions of compute capability 9.0 as the engine sees them: barriers in shared memory,
//! bulk and tensor copies, warpgroup products, clusters.

use super::{Address, AddressSpace, AtomicFn, Reg};
use crate::exec::registers::Slot;
use crate::matrix::wgmma::Wgmma;

/// `mbarrier`
#[derive(Debug)]
pub(crate) struct MbarrierOp {
    pub space: AddressSpace,
    pub address: Address,
    pub operation: MbarrierOperation,
}

#[derive(Debug)]
pub(crate) enum MbarrierOperation {
    Init {
        count: Slot,
    },
    Invalidate,
    ExpectBytes(Slot),
    CompleteBytes(Slot),
    Arrive {
        /// Receives the state before the arrival.
        state: Reg,
        /// Arrivals, one when absent.
        count: Option<Slot>,
        /// `.expect_tx`, done before the arrival.
        bytes: Option<Slot>,
        drop: bool,
    },
    /// `cp.async.mbarrier.arrive`: an arrival once the thread's copies have landed.
    ArriveAfterCopies {
        /// `.noinc`: the arrival is one that the phase waits for already.
        counted: bool,
    },
    Wait {
        done: Slot,
        phase: MbarrierPhase,
        /// `try_wait`: suspends the thread.
        blocking: bool,
    },
}

/// The phase that a thread waits for.
#[derive(Debug, Clone, Copy)]
pub(crate) enum MbarrierPhase {
    /// The one that this state is of.
    State(Slot),
    /// The latest of this parity.
    Parity(Slot),
}

/// `cp.async.bulk`, `cp.async.bulk.tensor` and their reductions.
#[derive(Debug)]
pub(crate) struct BulkCopy {
    /// The address in shared memory.
    pub shared: Address,
    pub global: BulkGlobal,
    pub kind: BulkKind,
}

/// What a bulk copy addresses in global memory.
#[derive(Debug)]
pub(crate) enum BulkGlobal {
    Linear {
        address: Address,
        bytes: Slot,
    },
    /// A box of a tensor: the generic address of its map, the corner.
    Tensor {
        map: Address,
        corner: Vec<Slot>,
    },
}

#[derive(Debug)]
pub(crate) enum BulkKind {
    /// Global to shared: completes bytes on an mbarrier, in all blocks of the mask.
    Load {
        barrier: Address,
        blocks: Option<Slot>,
    },
    /// Shared to global, waited for in groups.
    Store { reduction: Option<Reduction> },
}

/// How `cp.reduce` combines an element with the one in memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Reduction {
    pub apply: AtomicFn,
    /// Of an element.
    pub bytes: u32,
}

/// `wgmma.mma_async`
#[derive(Debug)]
pub(crate) struct WarpgroupMultiply {
    pub shape: Wgmma,
    pub a: WarpgroupA,
    /// Descriptor of B.
    pub b: Slot,
    pub d: Vec<Slot>,
    /// Whether D is added.
    pub scale_d: Slot,
    pub a_transposed: bool,
    pub b_transposed: bool,
}

#[derive(Debug)]
pub(crate) enum WarpgroupA {
    Registers(Vec<Slot>),
    Descriptor(Slot),
}
