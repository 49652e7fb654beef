//! Accesses of different blocks to the same global memory that nothing orders.
//!
//! Blocks are ordered only by what they publish: a release (a strong write behind a fence, or one
//! with `.release`) that another block acquires (a strong read before a fence, or one with
//! `.acquire`). All blocks share one clock that ticks at every release. A write at time `t` is
//! known to a block whose last acquire came at `a` if the writer released at some `r`, `t < r <= a`.
//! This takes any release and acquire in that order for a pair, so a race may be missed where a
//! program synchronizes through another variable, but no program that synchronizes is blamed.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, OnceLock, PoisonError};

use super::super::{MemoryEvent, Site, Verdict, Violation};
use super::{access_of, for_each_word, lanes};
use crate::exec::Launch;
use crate::report::{AccessKind, FaultKind, Space};

/// The last write of a word, its first read since then by one block, and the last read.
#[derive(bytemuck::Zeroable)]
struct Word {
    write: AtomicU64,
    /// Thread and instruction of the write.
    writer: AtomicU64,
    first_read: AtomicU64,
    last_read: AtomicU64,
}

/// The shadow memory of a launch, shared by its blocks.
pub(in super::super) struct GlobalRaces {
    allocations: Vec<OnceLock<Box<[Word]>>>,
    time: AtomicU64,
    /// When each block released.
    releases: Mutex<HashMap<u32, Vec<u64>>>,
}

/// One block's part in ordering.
#[derive(Default)]
pub(in super::super) struct BlockRaces {
    fenced: bool,
    /// The last strong read that no fence has followed.
    seen: u64,
    acquired: u64,
}

// An entry: block number + 1 (24 bits), time (22), strong (1), bytes of the word (4), and for
// reads the instruction (13, the low bits).
const BLOCK_SHIFT: u32 = 40;
const TIME_SHIFT: u32 = 18;
const TIME_MASK: u64 = (1 << 22) - 1;
const STRONG: u64 = 1 << 17;
const BYTES_SHIFT: u32 = 13;
const PC_MASK: u64 = (1 << 13) - 1;
const MAX_BLOCKS: u32 = (1 << 24) - 2;

#[derive(Clone, Copy)]
struct Entry(u64);

impl Entry {
    /// `None` where nothing was recorded.
    fn block(self) -> Option<u32> {
        ((self.0 >> BLOCK_SHIFT) as u32).checked_sub(1)
    }
    fn time(self) -> u64 {
        self.0 >> TIME_SHIFT & TIME_MASK
    }
    fn bytes(self) -> u32 {
        (self.0 >> BYTES_SHIFT) as u32 & 0xf
    }
    fn is_strong(self) -> bool {
        self.0 & STRONG != 0
    }
}

impl GlobalRaces {
    pub fn new(launch: &Launch<'_>) -> GlobalRaces {
        GlobalRaces {
            allocations: (0..launch.memory.len()).map(|_| OnceLock::new()).collect(),
            time: AtomicU64::new(1),
            releases: Mutex::default(),
        }
    }

    /// Whether what `block` did at `time` is known to a block that last acquired at `acquired`.
    fn is_published(&self, block: u32, time: u64, acquired: u64) -> bool {
        if acquired <= time {
            return false;
        }
        let releases = self.releases.lock().unwrap_or_else(PoisonError::into_inner);
        releases
            .get(&block)
            .is_some_and(|times| times.iter().any(|&r| time < r && r <= acquired))
    }
}

impl BlockRaces {
    pub fn fence(&mut self) {
        self.fenced = true;
        self.acquired = self.acquired.max(self.seen);
    }

    /// Before a strong write.
    pub fn releasing(&mut self, races: &GlobalRaces, block: u32, release: bool) {
        if release || self.fenced {
            let time = races.time.fetch_add(1, Relaxed) + 1;
            let mut releases = races
                .releases
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            releases.entry(block).or_default().push(time);
        }
    }

    /// After a strong read.
    pub fn acquiring(&mut self, races: &GlobalRaces, acquire: bool) {
        self.seen = races.time.load(Relaxed);
        if acquire {
            self.acquired = self.seen;
        }
    }

    pub fn access(
        &mut self,
        races: &GlobalRaces,
        launch: &Launch<'_>,
        site: &Site,
        event: &MemoryEvent<'_>,
    ) -> Verdict {
        let time = races.time.load(Relaxed);
        if event.space != Space::Global || launch.blocks() > MAX_BLOCKS || time >= TIME_MASK {
            return Ok(());
        }
        let base = u64::from(site.block + 1) << BLOCK_SHIFT | time << TIME_SHIFT;
        let base = base | if event.strong { STRONG } else { 0 };
        for lane in lanes(site.active) {
            let resolved = launch
                .memory
                .resolve(event.addresses[lane], event.bytes.into());
            let Ok((allocation, offset)) = resolved else {
                continue;
            };
            let shadow = races.allocations[allocation.id() as usize].get_or_init(|| {
                bytemuck::zeroed_slice_box(allocation.bytes().div_ceil(4) as usize)
            });
            let conflicts = |entry: Entry, bytes: u32| {
                entry.block().is_some_and(|block| {
                    block != site.block
                        && entry.bytes() & bytes != 0
                        && !(entry.is_strong() && event.strong)
                        && !races.is_published(block, entry.time(), self.acquired)
                })
            };
            let fault = |entry: Entry, other_kind: AccessKind, thread: u32, pc: u32| {
                let kind = FaultKind::Race {
                    access: access_of(event, lane),
                    other_kind,
                    other: launch.party(entry.block().unwrap_or(0), thread, pc),
                    allocation: Some(allocation.info()),
                };
                Box::new(Violation { lane, kind })
            };
            for_each_word(offset, event.bytes, |index, bytes| {
                let word = &shadow[index];
                let write = Entry(word.write.load(Relaxed));
                if conflicts(write, bytes) {
                    let writer = word.writer.load(Relaxed);
                    let (thread, pc) = ((writer >> 32) as u32, writer as u32);
                    return Err(fault(write, AccessKind::Write, thread, pc));
                }
                let entry = base | u64::from(bytes) << BYTES_SHIFT;
                if event.kind == AccessKind::Read {
                    record_read(word, entry | u64::from(site.pc) & PC_MASK);
                    return Ok(());
                }
                for read in [&word.first_read, &word.last_read] {
                    let read = Entry(read.load(Relaxed));
                    if conflicts(read, bytes) {
                        let pc = reader_pc(launch, read);
                        return Err(fault(read, AccessKind::Read, 0, pc));
                    }
                }
                let same = write.block() == Some(site.block) && write.time() == time;
                let before = if same { write.bytes() } else { 0 };
                word.write
                    .store(entry | u64::from(before) << BYTES_SHIFT, Relaxed);
                let thread = u64::from(site.warp * 32 + lane as u32);
                word.writer
                    .store(thread << 32 | u64::from(site.pc), Relaxed);
                Ok(())
            })?;
        }
        Ok(())
    }
}

/// Keeps the first reader and the last one of another block.
fn record_read(word: &Word, entry: u64) {
    let first = word.first_read.load(Relaxed);
    let is_new = |old: u64| old >> BLOCK_SHIFT != entry >> BLOCK_SHIFT;
    if first == 0 {
        word.first_read.store(entry, Relaxed);
    } else if is_new(first) {
        word.last_read.store(entry, Relaxed);
    } else {
        word.first_read
            .store(entry | first & 0xf << BYTES_SHIFT, Relaxed);
    }
}

/// The instruction of a read: its low bits are kept, the first load that has them is meant.
fn reader_pc(launch: &Launch<'_>, read: Entry) -> u32 {
    let low = read.0 & PC_MASK;
    (0..launch.program.code.len() as u32)
        .filter(|pc| u64::from(*pc) & PC_MASK == low)
        .find(|pc| launch.program.code[*pc as usize].class == crate::program::Class::Memory)
        .unwrap_or(low as u32)
}
