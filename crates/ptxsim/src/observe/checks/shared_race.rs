//! Accesses to the shared memory of a cluster that nothing orders.

use std::collections::HashMap;

use super::super::order::{Clocks, Moment};
use super::super::{MemoryEvent, Site, Verdict, Violation};
use super::{SharedMap, access_of, for_each_word, lanes};
use crate::exec::Launch;
use crate::report::{Access, AccessKind, FaultKind, Space};

/// The last write of a word.
#[derive(Clone, Copy, Default)]
struct Write {
    /// The writer's own clock; 0 before any write.
    time: u32,
    pc: u32,
    warp: u16,
    lane: u8,
    /// Bytes of the word.
    bytes: u8,
    /// Atomic or volatile.
    strong: bool,
    kind: Option<AccessKind>,
}

/// The last read of a word by one warp.
#[derive(Clone, Copy, Default)]
struct Read {
    time: u32,
    pc: u32,
    lane: u8,
    bytes: u8,
}

pub(in super::super) struct SharedRaces {
    map: SharedMap,
    /// Block numbers by rank.
    blocks: Vec<u32>,
    writes: Vec<Write>,
    /// Warps of a word's own block that have read it since its last write.
    readers: Vec<u32>,
    /// Their reads: `reads[warp * words + word]`
    reads: Vec<Read>,
    /// Reads by warps of other blocks since a word's last write.
    remote_reads: HashMap<usize, Vec<(usize, Read)>>,
}

/// One lane's access to one word.
struct Touch<'a> {
    launch: &'a Launch<'a>,
    clocks: &'a Clocks,
    site: &'a Site,
    lane: usize,
    access: Access,
    strong: bool,
}

impl SharedRaces {
    pub fn new(launch: &Launch<'_>, cluster: u32) -> SharedRaces {
        let map = SharedMap::new(launch);
        let (words, blocks) = (map.words(), launch.cluster_blocks() as u32);
        SharedRaces {
            map,
            blocks: (0..blocks)
                .map(|rank| launch.block_number(cluster, rank))
                .collect(),
            writes: vec![Write::default(); words],
            readers: vec![0; words],
            reads: vec![Read::default(); words * launch.warps()],
            remote_reads: HashMap::new(),
        }
    }

    /// A bulk copy lands for all who wait at its mbarrier, and lands when they have.
    pub fn bulk_landed(&mut self, rank: u32, to: u32, bytes: u32) {
        for word in self.map.words_of(rank, to, bytes) {
            self.writes[word] = Write::default();
            self.forget_reads(word);
        }
    }

    fn forget_reads(&mut self, word: usize) {
        self.readers[word] = 0;
        if !self.remote_reads.is_empty() {
            self.remote_reads.remove(&word);
        }
    }

    pub fn access(
        &mut self,
        launch: &Launch<'_>,
        clocks: &Clocks,
        site: &Site,
        event: &MemoryEvent<'_>,
    ) -> Verdict {
        if event.space != Space::Shared || event.kind == AccessKind::AsyncWrite {
            return Ok(());
        }
        for lane in lanes(site.active) {
            let access = access_of(event, lane);
            let touch = Touch {
                launch,
                clocks,
                site,
                lane,
                access,
                strong: event.strong,
            };
            let at = self.map.at(site.rank, event.addresses[lane]);
            for_each_word(at, event.bytes, |word, bytes| {
                self.check_write(&touch, word, bytes)?;
                if event.kind == AccessKind::Read {
                    self.record_read(&touch, word, bytes);
                    return Ok(());
                }
                self.check_reads(&touch, word, bytes)?;
                let now = clocks.now(site, lane);
                self.record_write(now, site.pc, word, bytes, event.strong, event.kind);
                Ok(())
            })?;
        }
        Ok(())
    }

    /// An asynchronous copy may write from its issue on.
    pub fn copy_issued(
        &mut self,
        launch: &Launch<'_>,
        clocks: &Clocks,
        site: &Site,
        to: &[u64; 32],
        bytes: u32,
    ) -> Verdict {
        for lane in lanes(site.active) {
            let (kind, space) = (AccessKind::AsyncWrite, Space::Shared);
            let access = Access {
                kind,
                space,
                address: to[lane],
                bytes,
            };
            let touch = Touch {
                launch,
                clocks,
                site,
                lane,
                access,
                strong: false,
            };
            for_each_word(self.map.at(site.rank, to[lane]), bytes, |word, bytes| {
                self.check_write(&touch, word, bytes)?;
                self.check_reads(&touch, word, bytes)
            })?;
        }
        Ok(())
    }

    /// From its landing on, the copied data is the waiting lane's own write.
    pub fn copy_landed(&mut self, now: Moment, site: &Site, to: u32, bytes: u32) {
        for word in self.map.words_of(site.rank, to, bytes) {
            self.record_write(now, site.pc, word, 0xf, false, AccessKind::AsyncWrite);
        }
    }

    #[inline]
    fn check_write(&self, touch: &Touch<'_>, word: usize, bytes: u32) -> Verdict {
        let write = self.writes[word];
        let moment = Moment {
            warp: write.warp.into(),
            lane: write.lane,
            time: write.time,
        };
        if write.time == 0
            || u32::from(write.bytes) & bytes == 0
            || write.strong && touch.strong
            || touch.clocks.is_ordered(moment, touch.site, touch.lane)
        {
            return Ok(());
        }
        let kind = write.kind.unwrap_or(AccessKind::Write);
        Err(self.race(touch, kind, moment, write.pc))
    }

    #[inline]
    fn check_reads(&self, touch: &Touch<'_>, word: usize, bytes: u32) -> Verdict {
        let first = self.map.rank_of(word) * touch.launch.warps();
        for warp in lanes(self.readers[word]) {
            let read = self.reads[warp * self.writes.len() + word];
            self.check_read(touch, first + warp, read, bytes)?;
        }
        if !self.remote_reads.is_empty() {
            for &(warp, read) in self.remote_reads.get(&word).into_iter().flatten() {
                self.check_read(touch, warp, read, bytes)?;
            }
        }
        Ok(())
    }

    #[inline]
    fn check_read(&self, touch: &Touch<'_>, warp: usize, read: Read, bytes: u32) -> Verdict {
        let moment = Moment {
            warp,
            lane: read.lane,
            time: read.time,
        };
        if u32::from(read.bytes) & bytes == 0
            || touch.clocks.is_ordered(moment, touch.site, touch.lane)
        {
            return Ok(());
        }
        Err(self.race(touch, AccessKind::Read, moment, read.pc))
    }

    #[inline]
    fn record_read(&mut self, touch: &Touch<'_>, word: usize, bytes: u32) {
        // A strong read does not race with the strong writes that it polls for.
        if touch.strong {
            return;
        }
        let Moment { warp, lane, time } = touch.clocks.now(touch.site, touch.lane);
        let read = if self.map.rank_of(word) == touch.site.rank as usize {
            let own = touch.site.warp as usize;
            self.readers[word] |= 1 << own;
            &mut self.reads[own * self.writes.len() + word]
        } else {
            let reads = self.remote_reads.entry(word).or_default();
            let known = reads.iter().position(|(reader, _)| *reader == warp);
            let index = known.unwrap_or_else(|| {
                reads.push((warp, Read::default()));
                reads.len() - 1
            });
            &mut reads[index].1
        };
        let before = if read.time == time { read.bytes } else { 0 };
        *read = Read {
            time,
            pc: touch.site.pc,
            lane,
            bytes: bytes as u8 | before,
        };
    }

    #[inline]
    fn record_write(
        &mut self,
        now: Moment,
        pc: u32,
        word: usize,
        bytes: u32,
        strong: bool,
        kind: AccessKind,
    ) {
        let write = &mut self.writes[word];
        let same = write.time == now.time && usize::from(write.warp) == now.warp;
        let before = if same { write.bytes } else { 0 };
        let bytes = bytes as u8 | before;
        *write = Write {
            time: now.time,
            pc,
            warp: now.warp as u16,
            lane: now.lane,
            bytes,
            strong,
            kind: Some(kind),
        };
        if bytes == 0xf {
            self.forget_reads(word);
        }
    }

    #[cold]
    fn race(&self, touch: &Touch<'_>, kind: AccessKind, by: Moment, pc: u32) -> Box<Violation> {
        let (rank, warp) = touch.clocks.place(by.warp);
        let thread = warp as u32 * 32 + u32::from(by.lane);
        let kind = FaultKind::Race {
            access: touch.access,
            other_kind: kind,
            other: touch.launch.party(self.blocks[rank], thread, pc),
            allocation: None,
        };
        Box::new(Violation {
            lane: touch.lane,
            kind,
        })
    }
}
