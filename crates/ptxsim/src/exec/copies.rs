//! `cp.async`: copies that land when they are waited for, and not before.

use super::access::locate;
use super::block::Block;
use super::registers::lanes;
use crate::observe::{Observer, Site};
use crate::program::{AddressSpace, AsyncCopy};
use crate::report::{AccessKind, Fault};

/// One lane's copy that has been issued.
#[derive(Debug, Clone, Copy)]
struct Pending {
    lane: usize,
    /// Number of the lane's commit group.
    group: u32,
    from: u64,
    to: u32,
    /// Bytes to read, and bytes to write; zeros fill the difference.
    read: u32,
    bytes: u32,
}

/// The copies of one warp.
#[derive(Debug, Default)]
pub(super) struct Copies {
    pending: Vec<Pending>,
    /// Groups that each lane has committed.
    committed: [u32; 32],
}

impl Copies {
    pub fn commit(&mut self, active: u32) {
        for lane in lanes(active) {
            self.committed[lane] += 1;
        }
    }
}

impl<O: Observer> Block<'_, O> {
    pub(super) fn issue_copy(
        &mut self,
        w: usize,
        site: &Site,
        copy: &AsyncCopy,
    ) -> Result<(), Fault> {
        let registers = &self.warps[w].registers;
        let mut targets = locate(registers, AddressSpace::Shared, &copy.to, site.active);
        let mut sources = locate(registers, AddressSpace::Global, &copy.from, site.active);
        let (Some(target), Some(mut source)) = (targets.next(), sources.next()) else {
            return Ok(());
        };
        let ignored = copy.ignore_source.map_or(0, |p| registers.predicate(p));
        let lengths = copy.source_bytes.map(|slot| *registers.word(slot));
        let length = |lane: usize| match lengths {
            _ if ignored >> lane & 1 == 1 => 0,
            Some(lengths) => lengths[lane].min(copy.bytes),
            None => copy.bytes,
        };
        // What reads less than a whole element is checked for what it reads.
        let whole = lanes(site.active).filter(|&lane| length(lane) == copy.bytes);
        source.mask = whole.fold(0, |mask, lane| mask | 1 << lane);
        self.admit(site, &target, AccessKind::AsyncWrite, copy.bytes, false)?;
        self.admit(site, &source, AccessKind::Read, copy.bytes, false)?;
        for lane in lanes(site.active) {
            let (read, address) = (length(lane), source.addresses[lane]);
            if read > 0
                && read < copy.bytes
                && let Err(error) = self.launch.memory.resolve(address, read.into())
            {
                return Err(self.address_fault(site, lane, AccessKind::Read, address, read, error));
            }
        }
        self.observer
            .copy_issued(self.launch, site, &target.addresses, copy.bytes)
            .map_err(|violation| self.violation(site, *violation))?;
        let copies = &mut self.warps[w].copies;
        for lane in lanes(site.active) {
            copies.pending.push(Pending {
                lane,
                group: copies.committed[lane],
                from: source.addresses[lane],
                to: target.addresses[lane] as u32,
                read: length(lane),
                bytes: copy.bytes,
            });
        }
        Ok(())
    }

    /// Lands the copies of the active lanes, all but those of the last `pending` groups.
    pub(super) fn wait_for_copies(&mut self, w: usize, site: &Site, pending: Option<u32>) {
        let copies = &mut self.warps[w].copies;
        let mut waiting = std::mem::take(&mut copies.pending);
        let committed = copies.committed;
        waiting.retain(|copy| {
            let done = match pending {
                None => true,
                Some(pending) => copy.group + pending < committed[copy.lane],
            };
            let lands = site.active >> copy.lane & 1 == 1 && done;
            if lands {
                self.land(site, copy);
            }
            !lands
        });
        self.warps[w].copies.pending = waiting;
    }

    fn land(&mut self, site: &Site, copy: &Pending) {
        let mut bytes = [0; 16];
        let read = &mut bytes[..copy.read as usize];
        if let Ok((allocation, offset)) = self.launch.memory.resolve(copy.from, copy.read.into()) {
            allocation.read_bytes(offset, read);
        }
        let (at, size) = (copy.to as usize, copy.bytes as usize);
        self.shared[at..at + size].copy_from_slice(&bytes[..size]);
        self.observer
            .copy_landed(site, copy.lane, copy.to, copy.bytes);
    }
}
