//! The checks, one file each. Barriers and missing lanes are found where warps are scheduled, in
//! `exec`: a check there decides whether the engine reports or carries on as a GPU would.

mod async_copy;
mod global_race;
mod proxy;
mod shared_race;
mod uninitialized;
mod warpgroup;

pub(super) use async_copy::AsyncCopies;
pub(super) use global_race::{BlockRaces, GlobalRaces};
pub(super) use proxy::ProxyCheck;
pub(super) use shared_race::SharedRaces;
pub(super) use uninitialized::Uninitialized;
pub(super) use warpgroup::Warpgroups;

use super::{MemoryEvent, Violation};
use crate::exec::{Launch, lanes, owner};
use crate::report::Access;

/// The shared memories of a cluster, one behind the other.
#[derive(Clone, Copy)]
struct SharedMap {
    /// Of one block, a multiple of 4.
    bytes: u64,
    blocks: usize,
}

impl SharedMap {
    fn new(launch: &Launch<'_>) -> SharedMap {
        SharedMap {
            bytes: u64::from(launch.shared_bytes).next_multiple_of(16),
            blocks: launch.cluster_blocks(),
        }
    }

    /// The place of an address that a thread of block `rank` uses.
    #[inline]
    fn at(&self, rank: u32, address: u64) -> u64 {
        let (rank, offset) = owner(address, rank);
        u64::from(rank) * self.bytes + offset
    }

    fn total_bytes(&self) -> usize {
        self.bytes as usize * self.blocks
    }

    fn words(&self) -> usize {
        self.total_bytes() / 4
    }

    /// The words that a range touches.
    fn words_of(&self, rank: u32, address: u32, bytes: u32) -> std::ops::Range<usize> {
        let at = self.at(rank, address.into()) as usize;
        at / 4..(at + bytes as usize).div_ceil(4)
    }

    /// Rank of the block that has a word.
    #[inline]
    fn rank_of(&self, word: usize) -> usize {
        match self.blocks {
            1 => 0,
            _ => 4 * word / self.bytes as usize,
        }
    }
}

/// The access of one lane.
fn access_of(event: &MemoryEvent<'_>, lane: usize) -> Access {
    Access {
        kind: event.kind,
        space: event.space,
        address: event.addresses[lane],
        bytes: event.bytes,
    }
}

/// Calls `f(word, bytes)` for each 4-byte word that `bytes` bytes at `address` touch, with one bit
/// for each byte of the word.
#[inline(always)]
fn for_each_word(
    address: u64,
    bytes: u32,
    mut f: impl FnMut(usize, u32) -> Result<(), Box<Violation>>,
) -> Result<(), Box<Violation>> {
    let word = (address / 4) as usize;
    if bytes < 4 {
        return f(word, ((1 << bytes) - 1) << (address % 4));
    }
    for index in 0..bytes as usize / 4 {
        f(word + index, 0xf)?;
    }
    Ok(())
}
