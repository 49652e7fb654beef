//! The instruction set as the engine sees it.

use super::{BulkCopy, MbarrierOp, RowFn, Slot, WarpgroupMultiply};
use crate::arith::compare::Comparison;
use crate::arith::float::Mode;
use crate::matrix::mma::Mma;
use crate::report::AccessKind;

/// A register of any width.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reg {
    /// At most 32 bits; how many is part of it.
    Word(Slot, u8),
    Wide(Slot),
    Predicate(Slot),
    /// `_`: the value is dropped.
    Sink,
}

/// The operands of arithmetic. What an instruction lacks is left at its default.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Operands {
    pub d: Slot,
    /// The predicate beside the destination: `p|q`, or the carry.
    pub q: Slot,
    pub a: Slot,
    pub b: Slot,
    pub c: Slot,
    pub e: Slot,
    /// A table or flags that belong to the opcode.
    pub immediate: u32,
    pub comparison: Comparison,
    pub mode: Mode,
}

impl Default for Operands {
    fn default() -> Operands {
        Operands {
            d: Slot(0),
            q: Slot(0),
            a: Slot(0),
            b: Slot(0),
            c: Slot(0),
            e: Slot(0),
            immediate: 0,
            comparison: Comparison::Eq,
            mode: Mode::RN,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SpecialRegister {
    Tid(usize),
    Ntid(usize),
    Ctaid(usize),
    Nctaid(usize),
    LaneId,
    WarpId,
    Nwarpid,
    SmId,
    Nsmid,
    GridId,
    LaneMaskEq,
    LaneMaskLe,
    LaneMaskLt,
    LaneMaskGe,
    LaneMaskGt,
    /// Counts warp instructions: time passes, but not at a clock's pace.
    Clock,
    DynamicSharedSize,
    TotalSharedSize,
    ClusterId(usize),
    Nclusterid(usize),
    ClusterCtaid(usize),
    ClusterNctaid(usize),
    ClusterCtaRank,
    ClusterNctaRank,
    IsExplicitCluster,
}

/// Which memory an instruction addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AddressSpace {
    Generic,
    Global,
    Shared,
    Local,
    /// The kernel's parameters.
    Param,
}

/// A register (or constant) plus an offset.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Address {
    pub base: Reg,
    pub offset: i64,
}

/// How an access is ordered against those of other threads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Ordering {
    /// `.volatile`, `.relaxed` and stronger: does not race with other strong accesses.
    pub strong: bool,
    pub acquire: bool,
    pub release: bool,
}

#[derive(Debug)]
pub(crate) struct Load {
    pub space: AddressSpace,
    pub address: Address,
    pub element_bytes: u32,
    pub signed: bool,
    pub to: Vec<Reg>,
    pub ordering: Ordering,
}

#[derive(Debug)]
pub(crate) struct Store {
    pub space: AddressSpace,
    pub address: Address,
    pub element_bytes: u32,
    pub from: Vec<Reg>,
    pub ordering: Ordering,
}

/// New value from the old one and the operands.
pub(crate) type AtomicFn = fn(old: u64, b: u64, c: u64) -> u64;

pub(crate) struct Atomic {
    pub space: AddressSpace,
    pub address: Address,
    /// Of one element.
    pub bytes: u32,
    pub apply: AtomicFn,
    /// The old values; `Sink` for `red`.
    pub d: Vec<Reg>,
    pub b: Vec<Reg>,
    pub c: Reg,
    pub ordering: Ordering,
}

/// A function as a caller must know it.
#[derive(Debug, Clone, Default)]
pub(crate) struct CallTarget {
    pub pc: u32,
    /// Local offset and size of each parameter.
    pub params: Vec<(u32, u32)>,
    /// Local offset and size of each result.
    pub returns: Vec<(u32, u32)>,
}

#[derive(Debug)]
pub(crate) struct Call {
    pub target: Callee,
    /// Local offset and size of each argument.
    pub arguments: Vec<(u32, u32)>,
    /// Local offset and size of each variable that receives a result.
    pub results: Vec<(u32, u32)>,
}

#[derive(Debug)]
pub(crate) enum Callee {
    /// By module-wide number, made a target once all functions are placed.
    Function(usize),
    /// A function's address in a register.
    Pointer(Slot),
    /// `vprintf(format, arguments)`.
    Print,
    /// `__assertfail(message, file, line, function, char_size)`.
    AssertFail,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BarrierKind {
    Sync,
    Arrive,
    Popc,
    And,
    Or,
}

#[derive(Debug)]
pub(crate) struct Barrier {
    pub kind: BarrierKind,
    pub id: Slot,
    /// Number of threads; all of the block when absent.
    pub threads: Option<Slot>,
    /// All lanes of a warp must execute it together.
    pub aligned: bool,
    /// Result and predicate of `barrier.red`.
    pub d: Reg,
    pub p: Slot,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ShuffleMode {
    Up,
    Down,
    Butterfly,
    Index,
}

#[derive(Debug)]
pub(crate) struct Shuffle {
    pub mode: ShuffleMode,
    pub d: Reg,
    /// Set where the source lane is in range.
    pub p: Reg,
    pub a: Slot,
    pub b: Slot,
    pub c: Slot,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum VoteMode {
    All,
    Any,
    Uniform,
    Ballot,
}

#[derive(Debug)]
pub(crate) enum WarpOp {
    Vote {
        mode: VoteMode,
        d: Reg,
        p: Slot,
    },
    Match {
        d: Slot,
        all: Option<Reg>,
        every: bool,
        a: Reg,
    },
    Redux {
        d: Slot,
        a: Slot,
        apply: fn(u32, u32) -> u32,
    },
    Shuffle(Shuffle),
    Elect {
        d: Reg,
        p: Slot,
    },
    /// `bar.warp.sync`
    Sync,
}

#[derive(Debug)]
pub(crate) struct MatrixMove {
    pub address: Address,
    pub space: AddressSpace,
    pub transposed: bool,
    pub registers: Vec<Slot>,
    pub kind: AccessKind,
}

#[derive(Debug)]
pub(crate) struct MatrixMultiply {
    pub shape: Mma,
    pub a: Vec<Slot>,
    pub b: Vec<Slot>,
    pub c: Vec<Slot>,
    pub d: Vec<Slot>,
}

#[derive(Debug)]
pub(crate) struct AsyncCopy {
    pub to: Address,
    pub from: Address,
    pub bytes: u32,
    /// How many bytes to read; the rest is zero.
    pub source_bytes: Option<Slot>,
    /// Where set, nothing is read and zeros are written.
    pub ignore_source: Option<Slot>,
}

/// The parts of a register, the lowest first.
#[derive(Debug)]
pub(crate) struct Parts {
    pub whole: Slot,
    pub whole_bits: u32,
    pub parts: Vec<Reg>,
}

pub(crate) enum Op {
    /// Arithmetic within lanes.
    Alu(RowFn, Operands),
    Special {
        d: Reg,
        register: SpecialRegister,
    },
    /// `mov.b32 d, {a, b}`
    Pack(Box<Parts>),
    /// `mov.b32 {a, b}, d`
    Unpack(Box<Parts>),
    Load(Box<Load>),
    Store(Box<Store>),
    Atomic(Box<Atomic>),
    /// `membar`, `fence` of at least device scope where `device`.
    Fence {
        device: bool,
    },
    Branch {
        target: u32,
    },
    BranchIndexed {
        index: Slot,
        targets: Box<[u32]>,
    },
    Call(Box<Call>),
    Return,
    Exit,
    Trap,
    Barrier(Box<Barrier>),
    /// Needs the lanes of `mask`.
    Warp {
        mask: Slot,
        op: Box<WarpOp>,
    },
    ActiveMask {
        d: Slot,
    },
    LoadMatrix(Box<MatrixMove>),
    StoreMatrix(Box<MatrixMove>),
    TransposeMatrix {
        d: Slot,
        a: Slot,
    },
    MatrixMultiply(Box<MatrixMultiply>),
    AsyncCopy(Box<AsyncCopy>),
    AsyncCommit,
    /// Waits until at most so many groups are pending; `None` for `wait_all`.
    AsyncWait {
        pending: Option<u32>,
    },
    Mbarrier(Box<MbarrierOp>),
    /// `fence.proxy.async`
    ProxyFence,
    BulkCopy(Box<BulkCopy>),
    BulkCommit,
    /// Waits until at most so many groups are pending.
    BulkWait {
        pending: u32,
    },
    WarpgroupMultiply(Box<WarpgroupMultiply>),
    WarpgroupFence,
    WarpgroupCommit,
    WarpgroupWait {
        pending: u32,
    },
    ClusterArrive {
        aligned: bool,
    },
    ClusterWait {
        aligned: bool,
    },
    /// `mapa`: the address in another block of the cluster.
    MapAddress {
        d: Reg,
        a: Reg,
        rank: Slot,
    },
    /// `getctarank`
    RankOfAddress {
        d: Reg,
        a: Reg,
    },
    /// Hints that change no result: `prefetch`, `nanosleep`, `pragma`.
    Nothing,
}
