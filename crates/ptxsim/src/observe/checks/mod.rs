//! The checks, one file each. Barriers and missing lanes are found where warps are scheduled, in
//! `exec`: a check there decides whether the engine reports or carries on as a GPU would.

mod async_copy;
mod global_race;
mod proxy;
mod shared_race;
mod uninitialized;

pub(super) use async_copy::AsyncCopies;
pub(super) use global_race::{BlockRaces, GlobalRaces};
pub(super) use proxy::ProxyCheck;
pub(super) use shared_race::SharedRaces;
pub(super) use uninitialized::Uninitialized;

use super::{MemoryEvent, Violation};
use crate::exec::lanes;
use crate::report::Access;

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
