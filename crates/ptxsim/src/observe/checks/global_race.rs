//! Accesses of different threads to the same global memory that nothing orders.
//!
//! Threads of one block are ordered as for shared memory, by the clocks of their warps. Beyond that,
//! order comes from what is published: a release (a strong write behind a fence, or one with
//! `.release`) that somebody acquires (a strong read before a fence, or one with `.acquire`). All
//! blocks share one clock that ticks at every release. What was done at time `t` is known to a block
//! whose last acquire came at `a` if the doer's block released at some `r`, `t < r <= a`; a fence of
//! block scope counts within the block alone. This takes any release and acquire in that order for a
//! pair, so a race may be missed where a program synchronizes through another variable or by other
//! threads, but no program that synchronizes is blamed.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, OnceLock, PoisonError};

use super::super::order::{Clocks, Moment};
use super::super::{MemoryEvent, Site, Verdict, Violation};
use super::{access_of, for_each_word, lanes};
use crate::exec::Launch;
use crate::report::{AccessKind, FaultKind, Space};

/// The last write of a word, its first reader since then, and the last other one.
#[derive(bytemuck::Zeroable)]
struct Word {
    write: Cell,
    first_read: Cell,
    last_read: Cell,
}

/// Both halves of an [`Entry`].
#[derive(bytemuck::Zeroable)]
struct Cell {
    what: AtomicU64,
    by: AtomicU64,
}

/// The shadow memory of a launch, shared by its blocks.
pub(in super::super) struct GlobalRaces {
    allocations: Vec<OnceLock<Box<[Word]>>>,
    time: AtomicU64,
    /// When each block released, upwards.
    releases: Mutex<HashMap<u32, Vec<u64>>>,
}

/// One block's part in ordering.
#[derive(Default)]
pub(in super::super) struct BlockRaces {
    /// Against other blocks.
    device: Acquired,
    /// Among its own threads.
    own: Acquired,
    /// When it released for its own threads, upwards.
    releases: Vec<u64>,
}

#[derive(Default)]
struct Acquired {
    fenced: bool,
    /// The last strong read that no fence has followed.
    seen: u64,
    acquired: u64,
}

impl Acquired {
    fn fence(&mut self) {
        self.fenced = true;
        self.acquired = self.acquired.max(self.seen);
    }

    fn read(&mut self, time: u64, acquire: bool) {
        self.seen = time;
        if acquire {
            self.acquired = time;
        }
    }

    /// Whether one of the `releases` came after `time` and was acquired.
    fn knows(&self, time: u64, releases: &[u64]) -> bool {
        let later = releases.partition_point(|&release| release <= time);
        releases
            .get(later)
            .is_some_and(|&release| release <= self.acquired)
    }
}

// What was done: block number + 1 (24 bits), time (35), strong (1), bytes of the word (4).
const BLOCK_SHIFT: u32 = 40;
const TIME_SHIFT: u32 = 5;
const TIME_MASK: u64 = (1 << 35) - 1;
const STRONG: u64 = 1 << 4;
const MAX_BLOCKS: u32 = (1 << 24) - 2;
// By whom: low bits of the block number (8), thread (10), the warp's clock (22), instruction (24).
// The halves of a cell are written apart; where those bits disagree, two blocks wrote at once.
const TAG_SHIFT: u32 = 56;
const THREAD_SHIFT: u32 = 46;
const CLOCK_SHIFT: u32 = 24;
const CLOCK_MASK: u64 = (1 << 22) - 1;
const PC_MASK: u64 = (1 << 24) - 1;

#[derive(Clone, Copy)]
struct Entry {
    what: u64,
    by: u64,
}

impl Entry {
    /// `None` where nothing was recorded.
    fn block(self) -> Option<u32> {
        ((self.what >> BLOCK_SHIFT) as u32).checked_sub(1)
    }
    fn time(self) -> u64 {
        self.what >> TIME_SHIFT & TIME_MASK
    }
    fn bytes(self) -> u32 {
        self.what as u32 & 0xf
    }
    fn is_strong(self) -> bool {
        self.what & STRONG != 0
    }
    fn thread(self) -> u32 {
        (self.by >> THREAD_SHIFT) as u32 & 0x3ff
    }
    fn clock(self) -> u32 {
        (self.by >> CLOCK_SHIFT & CLOCK_MASK) as u32
    }
    fn pc(self) -> u32 {
        (self.by & PC_MASK) as u32
    }
    fn is_whole(self) -> bool {
        let block = self.block().unwrap_or(0);
        self.by >> TAG_SHIFT == u64::from(block & 0xff)
    }
    /// Whether both are of the same warp.
    fn same_warp(self, other: Entry) -> bool {
        let warp = |entry: Entry| (entry.block(), entry.thread() / 32);
        warp(self) == warp(other)
    }
    /// Whether both are of the same warp, and nothing that orders came between them.
    fn same_moment(self, other: Entry) -> bool {
        self.same_warp(other) && self.clock() == other.clock() && self.time() == other.time()
    }
}

impl Cell {
    fn load(&self) -> Entry {
        let (what, by) = (self.what.load(Relaxed), self.by.load(Relaxed));
        Entry { what, by }
    }

    fn store(&self, entry: Entry) {
        self.what.store(entry.what, Relaxed);
        self.by.store(entry.by, Relaxed);
    }

    /// In place of what the same warp did before, or, where nothing ordered comes between, in addition to its
    /// bytes: what was ordered must not be taken for what is done now.
    fn store_after(&self, entry: Entry, before: Entry) {
        let bytes = if before.same_moment(entry) {
            before.bytes()
        } else {
            0
        };
        self.store(Entry {
            what: entry.what | u64::from(bytes),
            ..entry
        });
    }

    fn clear(&self) {
        if self.what.load(Relaxed) != 0 {
            self.what.store(0, Relaxed);
        }
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

    /// Whether what `block` did at `time` is known to a block that has acquired so much.
    fn is_published(&self, block: u32, time: u64, acquired: &Acquired) -> bool {
        if acquired.acquired <= time {
            return false;
        }
        let releases = self.releases.lock().unwrap_or_else(PoisonError::into_inner);
        releases
            .get(&block)
            .is_some_and(|times| acquired.knows(time, times))
    }
}

/// One lane's access.
struct Touch<'a> {
    races: &'a GlobalRaces,
    clocks: &'a Clocks,
    site: &'a Site,
    lane: usize,
    strong: bool,
}

impl BlockRaces {
    pub fn fence(&mut self, device: bool) {
        self.own.fence();
        if device {
            self.device.fence();
        }
    }

    /// Before a strong write.
    pub fn releasing(&mut self, races: &GlobalRaces, block: u32, release: bool) {
        if !release && !self.own.fenced {
            return;
        }
        let time = races.time.fetch_add(1, Relaxed) + 1;
        self.releases.push(time);
        if release || self.device.fenced {
            let mut releases = races
                .releases
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            releases.entry(block).or_default().push(time);
        }
    }

    /// After a strong read.
    pub fn acquiring(&mut self, races: &GlobalRaces, acquire: bool) {
        let time = races.time.load(Relaxed);
        self.own.read(time, acquire);
        self.device.read(time, acquire);
    }

    pub fn access(
        &self,
        races: &GlobalRaces,
        clocks: &Clocks,
        launch: &Launch<'_>,
        site: &Site,
        event: &MemoryEvent<'_>,
    ) -> Verdict {
        let time = races.time.load(Relaxed);
        if event.space != Space::Global || launch.blocks() > MAX_BLOCKS || time >= TIME_MASK {
            return Ok(());
        }
        let strong = if event.strong { STRONG } else { 0 };
        let what = u64::from(site.block + 1) << BLOCK_SHIFT | time << TIME_SHIFT | strong;
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
            let touch = Touch {
                races,
                clocks,
                site,
                lane,
                strong: event.strong,
            };
            let by = u64::from(site.block & 0xff) << TAG_SHIFT
                | u64::from(site.warp * 32 + lane as u32) << THREAD_SHIFT
                | u64::from(clocks.now(site, lane).time).min(CLOCK_MASK) << CLOCK_SHIFT
                | u64::from(site.pc) & PC_MASK;
            let fault = |entry: Entry, other_kind: AccessKind| {
                let block = entry.block().unwrap_or(0);
                let kind = FaultKind::Race {
                    access: access_of(event, lane),
                    other_kind,
                    other: launch.party(block, entry.thread(), entry.pc()),
                    allocation: Some(allocation.info()),
                };
                Box::new(Violation { lane, kind })
            };
            for_each_word(offset, event.bytes, |index, bytes| {
                let word = &shadow[index];
                let write = word.write.load();
                if self.conflicts(&touch, write, bytes) {
                    return Err(fault(write, AccessKind::Write));
                }
                let what = what | u64::from(bytes);
                let entry = Entry { what, by };
                if event.kind == AccessKind::Read {
                    record_read(word, entry);
                    return Ok(());
                }
                for read in [&word.first_read, &word.last_read] {
                    let read = read.load();
                    if self.conflicts(&touch, read, bytes) {
                        return Err(fault(read, AccessKind::Read));
                    }
                }
                word.write.store_after(entry, write);
                if bytes == 0xf {
                    word.first_read.clear();
                    word.last_read.clear();
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Whether an access races with what is recorded.
    #[inline]
    fn conflicts(&self, touch: &Touch<'_>, entry: Entry, bytes: u32) -> bool {
        let Some(block) = entry.block() else {
            return false;
        };
        if entry.bytes() & bytes == 0 || entry.is_strong() && touch.strong {
            return false;
        }
        if block != touch.site.block {
            return !touch.races.is_published(block, entry.time(), &self.device);
        }
        let (thread, time) = (entry.thread(), entry.clock());
        let first = touch.clocks.warp(touch.site) - touch.site.warp as usize;
        let moment = Moment {
            warp: first + thread as usize / 32,
            lane: (thread % 32) as u8,
            time,
        };
        // A clock that is out of range tells nothing.
        u64::from(time) < CLOCK_MASK
            && entry.is_whole()
            && !touch.clocks.is_ordered(moment, touch.site, touch.lane)
            && !self.own.knows(entry.time(), &self.releases)
    }
}

/// Keeps the first reader, and the last of the others: rather one of another block.
fn record_read(word: &Word, entry: Entry) {
    let first = word.first_read.load();
    if first.block().is_none() {
        word.first_read.store(entry);
        return;
    }
    if first.same_warp(entry) {
        word.first_read.store_after(entry, first);
        return;
    }
    let last = word.last_read.load();
    if last.block().is_none() || last.block() == first.block() || entry.block() != first.block() {
        word.last_read.store_after(entry, last);
    }
}
