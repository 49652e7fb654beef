//! Accesses to shared memory that an asynchronous copy may still be writing.

use super::super::{MemoryEvent, Site, Verdict, Violation};
use super::{access_of, for_each_word, lanes};
use crate::exec::Launch;
use crate::report::{Access, AccessKind, FaultKind, Space};

/// Who copies into each word of a block's shared memory: thread and instruction.
pub(in super::super) struct AsyncCopies {
    words: Vec<Option<(u32, u32)>>,
    pending: usize,
}

impl AsyncCopies {
    pub fn new(launch: &Launch<'_>) -> AsyncCopies {
        AsyncCopies {
            words: vec![None; launch.shared_bytes.div_ceil(4) as usize],
            pending: 0,
        }
    }

    pub fn access(&self, launch: &Launch<'_>, site: &Site, event: &MemoryEvent<'_>) -> Verdict {
        if event.space != Space::Shared || self.pending == 0 {
            return Ok(());
        }
        for lane in lanes(site.active) {
            for_each_word(event.addresses[lane], event.bytes, |word, _| {
                self.check(launch, site, lane, word, || access_of(event, lane))
            })?;
        }
        Ok(())
    }

    fn check(
        &self,
        launch: &Launch<'_>,
        site: &Site,
        lane: usize,
        word: usize,
        access: impl Fn() -> Access,
    ) -> Verdict {
        match self.words[word] {
            None => Ok(()),
            Some((thread, pc)) => {
                let copy = launch.party(site.block, thread, pc);
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
            for_each_word(address, bytes, |word, _| {
                self.check(launch, site, lane, word, access)?;
                self.words[word] = Some((site.warp * 32 + lane as u32, site.pc));
                self.pending += 1;
                Ok(())
            })?;
        }
        Ok(())
    }

    pub fn landed(&mut self, to: u32, bytes: u32) {
        for word in &mut self.words[to as usize / 4..(to + bytes) as usize / 4] {
            if word.take().is_some() {
                self.pending -= 1;
            }
        }
    }
}
