//! What went wrong, told so that a tired person can find the line.

use std::fmt;
use std::sync::Arc;

use crate::memory::AllocationInfo;

/// A state space of PTX.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Space {
    /// Device memory.
    Global,
    /// A block's shared memory.
    Shared,
    /// A thread's own memory.
    Local,
    /// Kernel parameters.
    Param,
    /// Constant memory.
    Const,
}

impl fmt::Display for Space {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Space::Global => "global",
            Space::Shared => "shared",
            Space::Local => "local",
            Space::Param => "param",
            Space::Const => "const",
        })
    }
}

/// What an instruction does to memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum AccessKind {
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Reads and writes in one step (`atom`, `red`).
    Atomic,
    /// Writes by an asynchronous copy.
    AsyncWrite,
}

impl fmt::Display for AccessKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            AccessKind::Read => "read",
            AccessKind::Write => "write",
            AccessKind::Atomic => "atomic",
            AccessKind::AsyncWrite => "asynchronous copy",
        })
    }
}

/// One access to memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Access {
    /// Read, write, atomic or asynchronous copy.
    pub kind: AccessKind,
    /// The state space.
    pub space: Space,
    /// Where: a device address, or an offset in shared, local or param space.
    pub address: u64,
    /// How many bytes.
    pub bytes: u32,
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Access {
            kind,
            space,
            address,
            bytes,
        } = self;
        write!(f, "{space} {kind} of {bytes} bytes at {address:#x}")
    }
}

/// A line of CUDA source, from `-lineinfo`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceLine {
    /// The file as the compiler saw it.
    pub file: Arc<str>,
    /// The line, from 1.
    pub line: u32,
}

/// An instruction in the PTX text, and where it came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Location {
    /// The line of PTX, from 1.
    pub ptx_line: u32,
    /// The instruction as written.
    pub instruction: Arc<str>,
    /// The CUDA source line, where the PTX was compiled with `-lineinfo`.
    pub source: Option<SourceLine>,
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(source) = &self.source {
            write!(f, "{}:{}, ", source.file, source.line)?;
        }
        write!(f, "PTX line {}: {}", self.ptx_line, self.instruction)
    }
}

/// A thread at an instruction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Party {
    /// Block index in the grid.
    pub block: [u32; 3],
    /// Thread index in the block.
    pub thread: [u32; 3],
    /// The instruction.
    pub location: Location,
}

impl fmt::Display for Party {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ([bx, by, bz], [tx, ty, tz]) = (self.block, self.thread);
        write!(
            f,
            "block ({bx},{by},{bz}) thread ({tx},{ty},{tz}) at {}",
            self.location
        )
    }
}

/// A kernel that did something that it must not, or a launch that could not be made.
#[derive(Debug, Clone, PartialEq)]
pub struct Fault {
    /// The kernel's name.
    pub kernel: Arc<str>,
    /// What happened.
    pub kind: Box<FaultKind>,
    /// Who did it; `None` for a launch that never began.
    pub party: Option<Box<Party>>,
    /// What the kernel printed before.
    pub printed: String,
}

/// The ways in which a launch fails.
#[derive(Debug, Clone, PartialEq)]
pub enum FaultKind {
    /// The launch asks for what the device or the kernel does not allow.
    InvalidLaunch(String),
    /// An access outside its allocation, or outside shared, local or param memory.
    OutOfBounds {
        /// The access.
        access: Access,
        /// The allocation that the address belongs to or lies beside, for global memory.
        nearest: Option<AllocationInfo>,
        /// The size of the window, for shared, local and param memory.
        limit: Option<u64>,
    },
    /// An address that is not a multiple of the access's size.
    Misaligned {
        /// The access.
        access: Access,
        /// The alignment that it needs, bytes.
        alignment: u32,
    },
    /// An access to memory that was freed.
    UseAfterFree {
        /// The access.
        access: Access,
        /// The allocation as it was.
        allocation: AllocationInfo,
    },
    /// An address that no device memory has: a host pointer, null, or a number.
    HostPointer {
        /// The access.
        access: Access,
    },
    /// A read of memory that nobody wrote.
    Uninitialized {
        /// The access.
        access: Access,
        /// The allocation, for global memory.
        allocation: Option<AllocationInfo>,
    },
    /// Two accesses to the same memory, at least one a write, with nothing that orders them.
    Race {
        /// The access that was made second.
        access: Access,
        /// What the other did.
        other_kind: AccessKind,
        /// Who made the other.
        other: Party,
        /// The allocation, for global memory.
        allocation: Option<AllocationInfo>,
    },
    /// An access to memory that an asynchronous copy may still be writing.
    BeforeWait {
        /// The access.
        access: Access,
        /// Who issued the copy.
        copy: Party,
    },
    /// A read by the asynchronous proxy (a bulk store, `wgmma`) of shared memory that was written
    /// without a `fence.proxy.async` since.
    MissingProxyFence {
        /// The read.
        access: Access,
        /// Who wrote.
        writer: Party,
    },
    /// A barrier or warp-synchronous instruction that some lanes of the warp never reach.
    MissingLanes {
        /// The lanes that arrived, one bit each.
        arrived: u32,
        /// The lanes that had to.
        expected: u32,
        /// Where a missing lane is instead; `None` when it has exited.
        elsewhere: Option<Party>,
    },
    /// A barrier that threads of the block left the kernel without reaching.
    ShortBarrier {
        /// The barrier's number.
        barrier: u32,
        /// Threads that arrived.
        arrived: u32,
        /// Threads that it waits for.
        expected: u32,
        /// Where another thread waits or spins; `None` when all others have exited.
        elsewhere: Option<Party>,
    },
    /// All threads wait and nothing can wake them.
    Deadlock {
        /// What the thread waits for.
        waiting_for: String,
    },
    /// The launch ran more instructions than it may.
    Endless {
        /// The warp instructions that it may run.
        limit: u64,
    },
    /// The kernel executed `trap`.
    Trap,
    /// A device `assert` failed.
    Assert {
        /// The condition's text.
        message: String,
        /// Source file.
        file: String,
        /// Source line.
        line: u32,
        /// Function name.
        function: String,
    },
    /// An instruction was given operands that PTX leaves undefined.
    Undefined(String),
}

impl FaultKind {
    /// A sticky error class in the driver's words: `true` when the fault is an illegal address.
    pub fn is_illegal_address(&self) -> bool {
        use FaultKind::{HostPointer, OutOfBounds, UseAfterFree};
        matches!(
            self,
            OutOfBounds { .. } | UseAfterFree { .. } | HostPointer { .. }
        )
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "kernel `{}`: {}", self.kernel, self.kind)?;
        match &self.party {
            Some(party) => write!(f, "\n  by {party}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Fault {}

impl fmt::Display for FaultKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            FaultKind::InvalidLaunch(why) => write!(f, "cannot launch: {why}"),
            FaultKind::OutOfBounds {
                access,
                nearest,
                limit,
            } => {
                write!(f, "out of bounds: {access}")?;
                if let Some(allocation) = nearest {
                    write!(f, ", {}", allocation.describe(access.address))?;
                }
                match limit {
                    Some(limit) => write!(f, ", past the {limit} bytes that there are"),
                    None => Ok(()),
                }
            }
            FaultKind::Misaligned { access, alignment } => {
                write!(f, "misaligned: {access} must be a multiple of {alignment}")
            }
            FaultKind::UseAfterFree { access, allocation } => {
                write!(
                    f,
                    "use after free: {access}, {}",
                    allocation.describe(access.address)
                )
            }
            FaultKind::HostPointer { access } if access.address == 0 => {
                write!(f, "null pointer: {access}")
            }
            FaultKind::HostPointer { access } => {
                write!(f, "not a device address (a host pointer?): {access}")
            }
            FaultKind::Uninitialized { access, allocation } => {
                write!(f, "read of memory that nobody wrote: {access}")?;
                match allocation {
                    Some(allocation) => write!(f, ", {}", allocation.describe(access.address)),
                    None => Ok(()),
                }
            }
            FaultKind::Race {
                access,
                other_kind,
                other,
                allocation,
            } => {
                write!(f, "race: {access}")?;
                if let Some(allocation) = allocation {
                    write!(f, ", {}", allocation.describe(access.address))?;
                }
                write!(f, "\n  against the {other_kind} by {other}")
            }
            FaultKind::BeforeWait { access, copy } => {
                write!(
                    f,
                    "{access} before the asynchronous copy into it was waited for"
                )?;
                write!(f, "\n  copy issued by {copy}")
            }
            FaultKind::MissingProxyFence { access, writer } => {
                write!(
                    f,
                    "asynchronous {access} without a `fence.proxy.async` after the write"
                )?;
                write!(f, "\n  written by {writer}")
            }
            FaultKind::MissingLanes {
                arrived,
                expected,
                elsewhere,
            } => {
                let missing = expected & !arrived;
                write!(
                    f,
                    "lanes missing: the instruction needs lanes {expected:#010x}, "
                )?;
                write!(f, "lanes {missing:#010x} never arrive")?;
                match elsewhere {
                    Some(party) => write!(f, "\n  one of them waits: {party}"),
                    None => write!(f, " (they have exited)"),
                }
            }
            FaultKind::ShortBarrier {
                barrier,
                arrived,
                expected,
                elsewhere,
            } => {
                write!(
                    f,
                    "barrier {barrier} waits for {expected} threads, {arrived} arrived "
                )?;
                match elsewhere {
                    Some(party) => write!(f, "\n  another thread waits: {party}"),
                    None => write!(f, "and the others have exited"),
                }
            }
            FaultKind::Deadlock { waiting_for } => {
                write!(
                    f,
                    "deadlock: every thread waits, this one for {waiting_for}"
                )
            }
            FaultKind::Endless { limit } => {
                write!(f, "still running after {limit} warp instructions")
            }
            FaultKind::Trap => write!(f, "trap"),
            FaultKind::Assert {
                message,
                file,
                line,
                function,
            } => {
                write!(
                    f,
                    "assertion `{message}` failed at {file}:{line} in {function}"
                )
            }
            FaultKind::Undefined(what) => write!(f, "undefined behaviour: {what}"),
        }
    }
}
