//! Accesses to shared memory that nothing orders.
//!
//! Every warp has a vector clock: what it knows of the progress of the others. A barrier joins the
//! clocks of those that meet. An access is ordered behind an earlier one if the warp's clock has
//! reached the other's time. Lanes of one warp are ordered by running together; only what lanes do
//! while they are apart can race, and `bar.warp.sync` orders that.

use std::collections::HashMap;

use super::super::{MemoryEvent, Site, Verdict, Violation};
use super::{access_of, for_each_word, lanes};
use crate::exec::Launch;
use crate::report::{Access, AccessKind, FaultKind, Space};

/// The last write of a word.
#[derive(Clone, Copy, Default)]
struct Write {
    /// The writer's own clock; 0 before any write.
    time: u32,
    pc: u32,
    warp: u8,
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
    /// `clocks[warp][other]`
    clocks: Vec<Vec<u32>>,
    /// What those who arrived at an mbarrier knew, by its address.
    mbarriers: HashMap<u64, Vec<u32>>,
    writes: Vec<Write>,
    /// Warps that have read a word since its last write.
    readers: Vec<u32>,
    /// `reads[warp * words + word]`
    reads: Vec<Read>,
}

/// One lane's access to one word.
struct Touch<'a> {
    launch: &'a Launch<'a>,
    site: &'a Site,
    lane: usize,
    access: Access,
    strong: bool,
}

impl SharedRaces {
    pub fn new(launch: &Launch<'_>) -> SharedRaces {
        let warps = launch.threads().div_ceil(32) as usize;
        let words = launch.shared_bytes.div_ceil(4) as usize;
        let clock = |warp| (0..warps).map(|other| u32::from(other == warp)).collect();
        SharedRaces {
            clocks: (0..warps).map(clock).collect(),
            mbarriers: HashMap::new(),
            writes: vec![Write::default(); words],
            readers: vec![0; words],
            reads: vec![Read::default(); words * warps],
        }
    }

    pub fn synchronized(&mut self, waited: &[u32], arrived: &[u32]) {
        let warps = self.clocks.len();
        let takes_part = |warp: usize| waited[warp] | arrived[warp] != 0;
        let mut joined = vec![0; warps];
        for warp in (0..warps).filter(|&warp| takes_part(warp)) {
            join(&mut joined, &self.clocks[warp]);
        }
        for warp in (0..warps).filter(|&warp| takes_part(warp)) {
            if waited[warp] != 0 {
                self.clocks[warp].copy_from_slice(&joined);
            }
            self.clocks[warp][warp] += 1;
        }
    }

    pub fn mbarrier_arrived(&mut self, warp: u32, address: u64) {
        let clock = &mut self.clocks[warp as usize];
        let known = self
            .mbarriers
            .entry(address)
            .or_insert_with(|| vec![0; clock.len()]);
        join(known, clock);
        clock[warp as usize] += 1;
    }

    pub fn mbarrier_waited(&mut self, warp: u32, address: u64) {
        if let Some(known) = self.mbarriers.get(&address) {
            join(&mut self.clocks[warp as usize], known);
        }
    }

    /// A bulk copy lands for all who wait at its mbarrier, and lands when they have.
    pub fn bulk_landed(&mut self, to: u32, bytes: u32) {
        let words = to as usize / 4..(to + bytes) as usize / 4;
        self.writes[words.clone()].fill(Write::default());
        self.readers[words].fill(0);
    }

    pub fn warp_synchronized(&mut self, warp: u32) {
        self.clocks[warp as usize][warp as usize] += 1;
    }

    pub fn access(&mut self, launch: &Launch<'_>, site: &Site, event: &MemoryEvent<'_>) -> Verdict {
        if event.space != Space::Shared || event.kind == AccessKind::AsyncWrite {
            return Ok(());
        }
        for lane in lanes(site.active) {
            let access = access_of(event, lane);
            let touch = Touch {
                launch,
                site,
                lane,
                access,
                strong: event.strong,
            };
            for_each_word(event.addresses[lane], event.bytes, |word, bytes| {
                self.check_write(&touch, word, bytes)?;
                if event.kind == AccessKind::Read {
                    self.record_read(&touch, word, bytes);
                    return Ok(());
                }
                self.check_reads(&touch, word, bytes)?;
                self.record_write(site, lane, word, bytes, event.strong, event.kind);
                Ok(())
            })?;
        }
        Ok(())
    }

    /// An asynchronous copy may write from its issue on.
    pub fn copy_issued(
        &mut self,
        launch: &Launch<'_>,
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
                site,
                lane,
                access,
                strong: false,
            };
            for_each_word(to[lane], bytes, |word, bytes| {
                self.check_write(&touch, word, bytes)?;
                self.check_reads(&touch, word, bytes)
            })?;
        }
        Ok(())
    }

    /// From its landing on, the copied data is the waiting lane's own write.
    pub fn copy_landed(&mut self, site: &Site, lane: usize, to: u32, bytes: u32) {
        for word in to as usize / 4..(to + bytes) as usize / 4 {
            self.record_write(site, lane, word, 0xf, false, AccessKind::AsyncWrite);
        }
    }

    /// Whether something that `lane` of `warp` did at `time` is ordered before `site`.
    fn is_ordered(&self, site: &Site, own: usize, warp: usize, lane: u8, time: u32) -> bool {
        let here = site.warp as usize;
        if warp != here {
            return self.clocks[here][warp] >= time;
        }
        let together = site.active >> lane & 1 == 1;
        usize::from(lane) == own || together || self.clocks[here][here] > time
    }

    #[inline]
    fn check_write(&self, touch: &Touch<'_>, word: usize, bytes: u32) -> Verdict {
        let write = self.writes[word];
        let Touch { site, lane, .. } = *touch;
        if write.time == 0
            || u32::from(write.bytes) & bytes == 0
            || write.strong && touch.strong
            || self.is_ordered(site, lane, write.warp.into(), write.lane, write.time)
        {
            return Ok(());
        }
        let kind = write.kind.unwrap_or(AccessKind::Write);
        Err(race(touch, kind, write.warp.into(), write.lane, write.pc))
    }

    #[inline]
    fn check_reads(&self, touch: &Touch<'_>, word: usize, bytes: u32) -> Verdict {
        for warp in lanes(self.readers[word]) {
            let read = self.reads[warp * self.writes.len() + word];
            if u32::from(read.bytes) & bytes != 0
                && !self.is_ordered(touch.site, touch.lane, warp, read.lane, read.time)
            {
                return Err(race(
                    touch,
                    AccessKind::Read,
                    warp as u32,
                    read.lane,
                    read.pc,
                ));
            }
        }
        Ok(())
    }

    #[inline]
    fn record_read(&mut self, touch: &Touch<'_>, word: usize, bytes: u32) {
        // A strong read does not race with the strong writes that it polls for.
        if touch.strong {
            return;
        }
        let warp = touch.site.warp as usize;
        let time = self.clocks[warp][warp];
        let read = &mut self.reads[warp * self.writes.len() + word];
        let bytes = if read.time == time {
            bytes as u8 | read.bytes
        } else {
            bytes as u8
        };
        *read = Read {
            time,
            pc: touch.site.pc,
            lane: touch.lane as u8,
            bytes,
        };
        self.readers[word] |= 1 << warp;
    }

    #[inline]
    fn record_write(
        &mut self,
        site: &Site,
        lane: usize,
        word: usize,
        bytes: u32,
        strong: bool,
        kind: AccessKind,
    ) {
        let warp = site.warp as usize;
        let time = self.clocks[warp][warp];
        let write = &mut self.writes[word];
        let same = write.time == time && usize::from(write.warp) == warp;
        let bytes = if same {
            bytes as u8 | write.bytes
        } else {
            bytes as u8
        };
        *write = Write {
            time,
            pc: site.pc,
            warp: warp as u8,
            lane: lane as u8,
            bytes,
            strong,
            kind: Some(kind),
        };
        if bytes == 0xf {
            self.readers[word] = 0;
        }
    }
}

/// Brings `clock` up to what `known` knows.
fn join(clock: &mut [u32], known: &[u32]) {
    for (own, time) in clock.iter_mut().zip(known) {
        *own = (*own).max(*time);
    }
}

#[cold]
fn race(touch: &Touch<'_>, kind: AccessKind, warp: u32, lane: u8, pc: u32) -> Box<Violation> {
    let other = touch
        .launch
        .party(touch.site.block, warp * 32 + u32::from(lane), pc);
    let kind = FaultKind::Race {
        access: touch.access,
        other_kind: kind,
        other,
        allocation: None,
    };
    Box::new(Violation {
        lane: touch.lane,
        kind,
    })
}
