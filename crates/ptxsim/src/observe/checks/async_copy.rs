//! Accesses to shared memory that an asynchronous copy may still be writing.

use super::super::{MemoryEvent, Site, Verdict, Violation};
use super::{SharedMap, access_of, for_each_word, lanes};
use crate::exec::Launch;
use crate::report::{Access, AccessKind, FaultKind, Space};

/// Who issued a copy.
#[derive(Clone, Copy)]
struct Issuer {
    block: u32,
    thread: u32,
    pc: u32,
}

/// Who copies into each word of a cluster's shared memory.
pub(in super::super) struct AsyncCopies {
    map: SharedMap,
    words: Vec<Option<Issuer>>,
    pending: usize,
}

impl AsyncCopies {
    pub fn new(launch: &Launch<'_>) -> AsyncCopies {
        let map = SharedMap::new(launch);
        AsyncCopies {
            map,
            words: vec![None; map.words()],
            pending: 0,
        }
    }

    pub fn access(&self, launch: &Launch<'_>, site: &Site, event: &MemoryEvent<'_>) -> Verdict {
        if event.space != Space::Shared || self.pending == 0 {
            return Ok(());
        }
        for lane in lanes(site.active) {
            let at = self.map.at(site.rank, event.addresses[lane]);
            for_each_word(at, event.bytes, |word, _| {
                self.check(launch, lane, word, || access_of(event, lane))
            })?;
        }
        Ok(())
    }

    fn check(
        &self,
        launch: &Launch<'_>,
        lane: usize,
        word: usize,
        access: impl Fn() -> Access,
    ) -> Verdict {
        match self.words[word] {
            None => Ok(()),
            Some(Issuer { block, thread, pc }) => {
                let copy = launch.party(block, thread, pc);
                let kind = FaultKind::BeforeWait {
                    access: access(),
                    copy,
                };
                Err(Box::new(Violation { lane, kind }))
            }
        }
    }

    pub fn issued(
        &mut self,
        launch: &Launch<'_>,
        site: &Site,
        to: &[u64; 32],
        bytes: u32,
    ) -> Verdict {
        for lane in lanes(site.active) {
            let (address, kind) = (to[lane], AccessKind::AsyncWrite);
            let access = || Access {
                kind,
                space: Space::Shared,
                address,
                bytes,
            };
            for_each_word(self.map.at(site.rank, address), bytes, |word, _| {
                self.check(launch, lane, word, access)?;
                self.words[word] = Some(Issuer {
                    block: site.block,
                    thread: site.warp * 32 + lane as u32,
                    pc: site.pc,
                });
                self.pending += 1;
                Ok(())
            })?;
        }
        Ok(())
    }

    pub fn landed(&mut self, rank: u32, to: u32, bytes: u32) {
        for word in self.map.words_of(rank, to, bytes) {
            if self.words[word].take().is_some() {
                self.pending -= 1;
            }
        }
    }
}
