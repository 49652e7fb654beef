//! Bulk and tensor copies: loads that land when their mbarrier is waited for, stores that land when
//! their group is, and neither before.

use std::sync::Arc;

use super::access::locate;
use super::block::Block;
use super::registers::{Registers, lanes};
use crate::matrix::tensor_map::{Piece, TensorMap};
use crate::observe::{MemoryEvent, Observer, Site};
use crate::program::{Address, AddressSpace, BulkCopy, BulkGlobal, BulkKind, Reduction, Reg};
use crate::report::{Access, AccessKind, Fault, FaultKind, Space};

/// A load on its way to a block.
pub(super) struct Load {
    /// The mbarrier in that block.
    pub barrier: u32,
    transfer: Transfer,
    /// Who issued it.
    site: Site,
    lane: usize,
}

/// A store of one lane that has been issued.
struct Store {
    lane: usize,
    /// Number of the lane's bulk group.
    group: u32,
    transfer: Transfer,
    reduction: Option<Reduction>,
}

/// The bulk stores of one warp.
#[derive(Default)]
pub(super) struct Stores {
    pending: Vec<Store>,
    /// Groups that each lane has committed.
    committed: [u32; 32],
}

impl Stores {
    pub fn commit(&mut self, active: u32) {
        for lane in lanes(active) {
            self.committed[lane] += 1;
        }
    }

    pub fn is_empty(&self) -> bool {
        self.pending.is_empty()
    }
}

/// The two sides of a copy.
#[derive(Clone)]
enum Transfer {
    Linear {
        global: u64,
        shared: u32,
        bytes: u32,
    },
    Tensor {
        map: Arc<TensorMap>,
        corner: [i32; 5],
        shared: u32,
    },
}

impl Transfer {
    /// Every byte, in chunks of at most 16.
    fn pieces(&self) -> Vec<Piece> {
        match self {
            Transfer::Linear {
                global,
                shared,
                bytes,
            } => (0..*bytes)
                .step_by(16)
                .map(|at| Piece {
                    shared: shared + at,
                    global: Some(global + u64::from(at)),
                    bytes: 16,
                })
                .collect(),
            Transfer::Tensor {
                map,
                corner,
                shared,
            } => map.pieces(*corner, *shared),
        }
    }

    /// Bytes in shared memory.
    fn bytes(&self) -> u32 {
        match self {
            Transfer::Linear { bytes, .. } => *bytes,
            Transfer::Tensor { map, .. } => map.box_bytes(),
        }
    }

    /// What lies outside of a tensor reads as.
    fn fill(&self) -> [u8; 16] {
        match self {
            Transfer::Linear { .. } => [0; 16],
            Transfer::Tensor { map, .. } => map.fill(),
        }
    }
}

/// One lane's address.
fn address_of(registers: &Registers, address: &Address, lane: usize) -> u64 {
    let base = match address.base {
        Reg::Word(slot, _) => registers.word(slot)[lane].into(),
        Reg::Wide(slot) => registers.wide(slot)[lane],
        Reg::Predicate(_) | Reg::Sink => 0,
    };
    base.wrapping_add_signed(address.offset)
}

impl<O: Observer> Block<'_, O> {
    pub(super) fn issue_bulk(
        &mut self,
        w: usize,
        site: &Site,
        copy: &BulkCopy,
    ) -> Result<(), Fault> {
        for lane in lanes(site.active) {
            let site = Site {
                active: 1 << lane,
                ..*site
            };
            let transfer = self.transfer(w, &site, lane, copy)?;
            self.check_shared_side(&site, lane, &transfer)?;
            match &copy.kind {
                BulkKind::Load { barrier, blocks } => {
                    let registers = &self.warps[w].registers;
                    let barrier = address_of(registers, barrier, lane) as u32;
                    let own = 1u32 << self.rank;
                    let blocks = blocks.map_or(own, |mask| registers.word(mask)[lane] & 0xffff);
                    self.watch_global(&site, lane, &transfer, AccessKind::Read)?;
                    self.issue_load(&site, lane, transfer, barrier, blocks)?;
                }
                BulkKind::Store { reduction } => {
                    let kind = match reduction {
                        Some(_) => AccessKind::Atomic,
                        None => AccessKind::Write,
                    };
                    self.watch_global(&site, lane, &transfer, kind)?;
                    for piece in transfer.pieces() {
                        self.watch_async_read(&site, lane, piece.shared, piece.bytes)?;
                    }
                    let stores = &mut self.warps[w].stores;
                    let group = stores.committed[lane];
                    let reduction = *reduction;
                    stores.pending.push(Store {
                        lane,
                        group,
                        transfer,
                        reduction,
                    });
                }
            }
        }
        Ok(())
    }

    /// The two sides of one lane's copy.
    fn transfer(
        &mut self,
        w: usize,
        site: &Site,
        lane: usize,
        copy: &BulkCopy,
    ) -> Result<Transfer, Fault> {
        let registers = &self.warps[w].registers;
        let shared = address_of(registers, &copy.shared, lane) as u32;
        match &copy.global {
            BulkGlobal::Linear { address, bytes } => {
                let global = address_of(registers, address, lane);
                let bytes = registers.word(*bytes)[lane];
                Ok(Transfer::Linear {
                    global,
                    shared,
                    bytes,
                })
            }
            BulkGlobal::Tensor { map, corner } => {
                let mut coordinates = [0; 5];
                for (coordinate, slot) in coordinates.iter_mut().zip(corner) {
                    *coordinate = registers.word(*slot)[lane] as i32;
                }
                let rank = corner.len();
                let map = self.tensor_map(w, site, lane, map)?;
                if map.rank != rank {
                    let what = format!("a {rank}-d copy with the map of a {}-d tensor", map.rank);
                    return Err(self.fault(site, lane, FaultKind::Undefined(what)));
                }
                Ok(Transfer::Tensor {
                    map: Arc::new(map),
                    corner: coordinates,
                    shared,
                })
            }
        }
    }

    /// Reads and decodes a tensor map from global memory or the kernel's parameters.
    fn tensor_map(
        &mut self,
        w: usize,
        site: &Site,
        lane: usize,
        address: &Address,
    ) -> Result<TensorMap, Fault> {
        let mut bytes = [0; 128];
        let registers = &self.warps[w].registers;
        for located in locate(registers, AddressSpace::Generic, address, site.active) {
            for at in (0..128).step_by(16) {
                let mut located = located.at_offset(at as u64);
                located.mask = site.active;
                self.admit(site, &located, AccessKind::Read, 16, false)?;
                let from = located.addresses[lane];
                self.read(w, lane, located.space, from, &mut bytes[at..at + 16]);
            }
        }
        TensorMap::decode(&bytes)
            .map_err(|error| self.fault(site, lane, FaultKind::Undefined(error.to_string())))
    }

    fn check_shared_side(
        &self,
        site: &Site,
        lane: usize,
        transfer: &Transfer,
    ) -> Result<(), Fault> {
        let (shared, alignment) = match transfer {
            Transfer::Linear {
                shared,
                global,
                bytes,
            } => {
                if !global.is_multiple_of(16) || !bytes.is_multiple_of(16) {
                    let what = "a bulk copy needs addresses and a size that are multiples of 16";
                    return Err(self.fault(site, lane, FaultKind::Undefined(what.into())));
                }
                (*shared, 16)
            }
            Transfer::Tensor { shared, .. } => (*shared, 128),
        };
        let bytes = transfer.bytes();
        let access = Access {
            kind: AccessKind::AsyncWrite,
            space: Space::Shared,
            address: shared.into(),
            bytes,
        };
        if !shared.is_multiple_of(alignment) {
            let kind = FaultKind::Misaligned { access, alignment };
            return Err(self.fault(site, lane, kind));
        }
        let limit = self.shared.len() as u64;
        if u64::from(shared) + u64::from(bytes) > limit {
            let kind = FaultKind::OutOfBounds {
                access,
                nearest: None,
                limit: Some(limit),
            };
            return Err(self.fault(site, lane, kind));
        }
        Ok(())
    }

    /// Checks the global side and shows it to the observer, 32 chunks at a time.
    fn watch_global(
        &mut self,
        site: &Site,
        lane: usize,
        transfer: &Transfer,
        kind: AccessKind,
    ) -> Result<(), Fault> {
        let mut pieces = transfer.pieces();
        pieces.retain(|piece| piece.global.is_some());
        for run in pieces.chunk_by(|a, b| a.bytes == b.bytes) {
            for batch in run.chunks(32) {
                let mut addresses = [0; 32];
                for (address, piece) in addresses.iter_mut().zip(batch) {
                    *address = piece.global.unwrap_or_default();
                    let resolved = self.launch.memory.resolve(*address, piece.bytes.into());
                    if let Err(error) = resolved {
                        return Err(self.address_fault(
                            site,
                            lane,
                            kind,
                            *address,
                            piece.bytes,
                            error,
                        ));
                    }
                }
                let active = u32::MAX >> (32 - batch.len());
                let batch_site = Site { active, ..*site };
                let bytes = batch[0].bytes;
                let (space, strong) = (Space::Global, false);
                let event = MemoryEvent {
                    space,
                    kind,
                    bytes,
                    addresses: &addresses,
                    strong,
                };
                self.observer
                    .access(self.launch, &batch_site, &event)
                    .map_err(|violation| self.fault(site, lane, violation.kind))?;
            }
        }
        Ok(())
    }

    /// The asynchronous proxy is about to read shared memory.
    pub(super) fn watch_async_read(
        &mut self,
        site: &Site,
        lane: usize,
        address: u32,
        bytes: u32,
    ) -> Result<(), Fault> {
        self.observer
            .async_read(self.launch, site, address, bytes)
            .map_err(|violation| self.fault(site, lane, violation.kind))
    }

    fn issue_load(
        &mut self,
        site: &Site,
        lane: usize,
        transfer: Transfer,
        barrier: u32,
        blocks: u32,
    ) -> Result<(), Fault> {
        if blocks >> self.cluster.blocks() != 0 {
            let what = format!(
                "a multicast to blocks {blocks:#b} of {}",
                self.cluster.blocks()
            );
            return Err(self.fault(site, lane, FaultKind::Undefined(what)));
        }
        for rank in lanes(blocks) {
            // Where a tensor ends within 16 bytes, they are filled in pieces.
            for chunk in transfer
                .pieces()
                .chunk_by(|a, b| a.shared / 16 == b.shared / 16)
            {
                let mut to = [0; 32];
                to[lane] = self.remote_address(chunk[0].shared.into(), rank);
                self.observer
                    .copy_issued(self.launch, site, &to, 16)
                    .map_err(|violation| self.violation(site, *violation))?;
            }
            let transfer = transfer.clone();
            self.cluster.loads[rank].push(Load {
                barrier,
                transfer,
                site: *site,
                lane,
            });
        }
        Ok(())
    }

    /// Lands the loads that complete on the mbarrier at `barrier`.
    pub(super) fn land_loads(
        &mut self,
        site: &Site,
        lane: usize,
        barrier: u32,
    ) -> Result<(), Fault> {
        let rank = self.rank as usize;
        if self.cluster.loads[rank]
            .iter()
            .all(|load| load.barrier != barrier)
        {
            return Ok(());
        }
        let loads = std::mem::take(&mut self.cluster.loads[rank]);
        let (landing, waiting) = loads.into_iter().partition(|load| load.barrier == barrier);
        self.cluster.loads[rank] = waiting;
        let landing: Vec<Load> = landing;
        for load in landing {
            let fill = load.transfer.fill();
            for Piece {
                shared,
                global,
                bytes,
            } in load.transfer.pieces()
            {
                let (at, size) = (shared as usize, bytes as usize);
                let target = &mut self.shared[at..at + size];
                match global.map(|from| self.launch.memory.resolve(from, bytes.into())) {
                    Some(Ok((allocation, offset))) => allocation.read_bytes(offset, target),
                    _ => target.copy_from_slice(&fill[..size]),
                }
                self.observer.bulk_landed(self.rank, shared, bytes);
            }
            self.complete_bytes(site, lane, barrier.into(), load.transfer.bytes())?;
        }
        Ok(())
    }

    /// Lands the stores of the active lanes, all but those of the last `pending` groups.
    pub(super) fn wait_for_stores(&mut self, w: usize, active: u32, pending: u32) {
        let stores = std::mem::take(&mut self.warps[w].stores.pending);
        let committed = self.warps[w].stores.committed;
        let (landing, waiting) = stores.into_iter().partition(|store| {
            active >> store.lane & 1 == 1 && store.group + pending < committed[store.lane]
        });
        self.warps[w].stores.pending = waiting;
        let landing: Vec<Store> = landing;
        for store in landing {
            for Piece {
                shared,
                global,
                bytes,
            } in store.transfer.pieces()
            {
                let Some(to) = global else {
                    continue;
                };
                let source = &self.shared[shared as usize..(shared + bytes) as usize];
                match store.reduction {
                    None => {
                        if let Ok((allocation, offset)) =
                            self.launch.memory.resolve(to, bytes.into())
                        {
                            allocation.write_bytes(offset, source);
                        }
                    }
                    Some(Reduction { apply, bytes: size }) => {
                        for (index, element) in source.chunks_exact(size as usize).enumerate() {
                            let value = super::access::extend(element, false);
                            let at = to + index as u64 * u64::from(size);
                            self.update_global(at, size, |old| apply(old, value, 0));
                        }
                    }
                }
            }
        }
    }

    /// What is still on its way when every thread has exited: the hardware may write to, or read
    /// from, shared memory that is no longer the block's.
    pub(super) fn check_copies_landed(&self) -> Result<(), Fault> {
        let unfinished = |site: &Site, lane, what: &str| {
            let what = format!("the block ended before {what}");
            Err(self.fault(site, lane, FaultKind::Undefined(what)))
        };
        if let Some(load) = self.cluster.loads[self.rank as usize].first() {
            return unfinished(&load.site, load.lane, "this bulk copy was waited for");
        }
        let ended = self.program.code.len() as u32 - 1;
        for (w, warp) in self.warps.iter().enumerate() {
            let site = self.site(w, ended, 1);
            if !warp.stores.is_empty() {
                return unfinished(&site, 0, "its bulk stores were waited for");
            }
            if !warp.products.is_empty() {
                return unfinished(&site, 0, "its `wgmma` were waited for");
            }
        }
        Ok(())
    }
}
