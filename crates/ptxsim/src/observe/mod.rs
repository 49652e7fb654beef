//! Watching a launch: the checks and the counters.
//!
//! The engine is generic over an `Observer` and calls it at each event. With the observer `()`
//! every call compiles to nothing, so a check that is off costs nothing.

mod checks;
mod counters;
mod observer;
mod order;
mod traffic;
mod watcher;

pub use counters::Counters;
pub(crate) use observer::{MemoryEvent, Observer, Site, Verdict, Violation};
pub(crate) use watcher::{Watch, Watcher};

/// Which checks a launch runs.
///
/// Out of bounds, misaligned, use after free and host pointers need no switch: every access has
/// to find its allocation anyway.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Checks {
    /// Reads of global, shared or local memory that nobody wrote.
    pub uninitialized: bool,
    /// Shared-memory accesses that nothing orders.
    pub shared_races: bool,
    /// Global-memory accesses of different threads that nothing orders.
    pub global_races: bool,
    /// Barriers that not all lanes of a warp, or not all threads of a block, reach.
    pub barriers: bool,
    /// Warp-synchronous instructions with lanes missing.
    pub missing_lanes: bool,
    /// Accesses to memory that an asynchronous copy may still be writing.
    pub async_copies: bool,
}

impl Checks {
    /// Every check.
    pub const fn all() -> Checks {
        Checks {
            uninitialized: true,
            shared_races: true,
            global_races: true,
            barriers: true,
            missing_lanes: true,
            async_copies: true,
        }
    }

    /// No check: the fastest run.
    pub const fn none() -> Checks {
        Checks {
            uninitialized: false,
            shared_races: false,
            global_races: false,
            barriers: false,
            missing_lanes: false,
            async_copies: false,
        }
    }
}

impl Default for Checks {
    fn default() -> Checks {
        Checks::all()
    }
}
