//! Loads, stores, atomics and matrix rows: addresses to bytes.

use super::block::Block;
use super::cluster::is_remote;
use super::registers::{Registers, Row, lanes};
use crate::matrix::rows;
use crate::memory::{AddressError, Window};
use crate::observe::{MemoryEvent, Observer, Site};
use crate::program::*;
use crate::report::{Access, AccessKind, Fault, FaultKind, Space};

/// The bytes that one lane moves: at most 32.
type Buffer = [u8; 32];

/// A warp's addresses in one state space, and the lanes that they belong to.
pub(super) struct Located {
    pub space: Space,
    pub addresses: Row<u64>,
    pub mask: u32,
}

impl Located {
    /// The same lanes, `bytes` further on.
    pub fn at_offset(&self, bytes: u64) -> Located {
        let addresses = self.addresses.map(|address| address.wrapping_add(bytes));
        Located {
            space: self.space,
            addresses,
            mask: self.mask,
        }
    }
}

fn bits_of(space: AddressSpace, address: u64) -> (Space, u64) {
    match space {
        AddressSpace::Global => (Space::Global, address),
        AddressSpace::Shared => (Space::Shared, address),
        AddressSpace::Local => (Space::Local, address),
        AddressSpace::Param => (Space::Param, address),
        AddressSpace::Generic => match Window::of(address) {
            Window::Shared => (Space::Shared, address & !Window::SHARED),
            Window::Local => (Space::Local, address & !Window::LOCAL),
            Window::Param => (Space::Param, address & !Window::PARAM),
            Window::Global | Window::Host => (Space::Global, address),
        },
    }
}

/// The addresses of an instruction, one set per state space that they turn out to lie in.
#[inline]
pub(super) fn locate(
    registers: &Registers,
    space: AddressSpace,
    address: &Address,
    active: u32,
) -> impl Iterator<Item = Located> + use<> {
    let mut raw: Row<u64> = match address.base {
        Reg::Word(slot, _) => registers.word(slot).map(u64::from),
        Reg::Wide(slot) => *registers.wide(slot),
        Reg::Predicate(_) | Reg::Sink => [0; 32],
    };
    for address_of in &mut raw {
        *address_of = address_of.wrapping_add_signed(address.offset);
    }
    if matches!(address.base, Reg::Word(..)) {
        raw = raw.map(|address| address & 0xffff_ffff);
    }
    let mut rest = active;
    std::iter::from_fn(move || {
        let first = lanes(rest).next()?;
        let found = bits_of(space, raw[first]).0;
        let mut located = Located {
            space: found,
            addresses: raw,
            mask: rest,
        };
        if space == AddressSpace::Generic {
            located.mask = 0;
            for lane in lanes(rest) {
                let (other, address) = bits_of(space, raw[lane]);
                if other == found {
                    located.mask |= 1 << lane;
                    located.addresses[lane] = address;
                }
            }
        }
        rest &= !located.mask;
        Some(located)
    })
}

impl<O: Observer> Block<'_, O> {
    /// Checks alignment and bounds of every lane, and tells the observer.
    #[inline]
    pub(super) fn admit(
        &mut self,
        site: &Site,
        located: &Located,
        kind: AccessKind,
        bytes: u32,
        strong: bool,
    ) -> Result<(), Fault> {
        let Located {
            space,
            addresses,
            mask,
        } = located;
        for lane in lanes(*mask) {
            let address = addresses[lane];
            if address & u64::from(bytes - 1) != 0 {
                let access = Access {
                    kind,
                    space: *space,
                    address,
                    bytes,
                };
                let kind = FaultKind::Misaligned {
                    access,
                    alignment: bytes,
                };
                return Err(self.fault(site, lane, kind));
            }
            let limit = match space {
                Space::Global | Space::Const => {
                    match self.launch.memory.resolve(address, bytes.into()) {
                        Ok(_) => continue,
                        Err(error) => {
                            return Err(self.address_fault(site, lane, kind, address, bytes, error));
                        }
                    }
                }
                Space::Shared if is_remote(address) => {
                    self.admit_remote(site, lane, kind, address, bytes)?;
                    continue;
                }
                Space::Shared => self.shared.len(),
                Space::Local => self.program.local_bytes as usize,
                Space::Param => self.program.params_bytes as usize,
            };
            if address
                .checked_add(bytes.into())
                .is_none_or(|end| end > limit as u64)
            {
                let access = Access {
                    kind,
                    space: *space,
                    address,
                    bytes,
                };
                let kind = FaultKind::OutOfBounds {
                    access,
                    nearest: None,
                    limit: Some(limit as u64),
                };
                return Err(self.fault(site, lane, kind));
            }
        }
        let site = Site {
            active: *mask,
            ..*site
        };
        let event = MemoryEvent {
            space: *space,
            kind,
            bytes,
            addresses,
            strong,
        };
        self.observer
            .access(self.launch, &site, &event)
            .map_err(|violation| self.violation(&site, *violation))
    }

    pub(super) fn address_fault(
        &self,
        site: &Site,
        lane: usize,
        kind: AccessKind,
        address: u64,
        bytes: u32,
        error: AddressError,
    ) -> Fault {
        let access = Access {
            kind,
            space: Space::Global,
            address,
            bytes,
        };
        let kind = match error {
            AddressError::NotDevice => FaultKind::HostPointer { access },
            AddressError::Freed(allocation) => FaultKind::UseAfterFree { access, allocation },
            AddressError::OutOfBounds(allocation) => FaultKind::OutOfBounds {
                access,
                nearest: Some(allocation),
                limit: None,
            },
        };
        self.fault(site, lane, kind)
    }

    /// Reads admitted bytes.
    #[inline]
    pub(super) fn read(&self, w: usize, lane: usize, space: Space, address: u64, out: &mut [u8]) {
        let at = address as usize;
        let bytes = out.len();
        match space {
            Space::Global | Space::Const => {
                if let Ok((allocation, offset)) = self.launch.memory.resolve(address, bytes as u64)
                {
                    allocation.read_bytes(offset, out);
                }
            }
            Space::Shared => out.copy_from_slice(self.shared_bytes(address, bytes)),
            Space::Local => {
                let at = lane * self.program.local_bytes as usize + at;
                out.copy_from_slice(&self.warps[w].local[at..at + bytes]);
            }
            Space::Param => out.copy_from_slice(&self.launch.arguments[at..at + bytes]),
        }
    }

    /// Writes admitted bytes.
    #[inline]
    fn write(&mut self, w: usize, lane: usize, space: Space, address: u64, bytes: &[u8]) {
        let at = address as usize;
        match space {
            Space::Global | Space::Const => {
                if let Ok((allocation, offset)) =
                    self.launch.memory.resolve(address, bytes.len() as u64)
                {
                    allocation.write_bytes(offset, bytes);
                }
            }
            Space::Shared => {
                self.shared_bytes_mut(address, bytes.len())
                    .copy_from_slice(bytes);
            }
            Space::Local => {
                let at = lane * self.program.local_bytes as usize + at;
                self.warps[w].local[at..at + bytes.len()].copy_from_slice(bytes);
            }
            // Parameters are constant: `store` refuses them.
            Space::Param => {}
        }
    }

    pub(super) fn load(&mut self, w: usize, site: &Site, load: &Load) -> Result<(), Fault> {
        let size = load.element_bytes as usize;
        let total = size * load.to.len();
        let Ordering {
            strong, acquire, ..
        } = load.ordering;
        for located in locate(
            &self.warps[w].registers,
            load.space,
            &load.address,
            site.active,
        ) {
            self.admit(site, &located, AccessKind::Read, total as u32, strong)?;
            for lane in lanes(located.mask) {
                let mut buffer: Buffer = [0; 32];
                let bytes = &mut buffer[..total];
                self.read(w, lane, located.space, located.addresses[lane], bytes);
                let registers = &mut self.warps[w].registers;
                for (reg, element) in load.to.iter().zip(bytes.chunks_exact(size)) {
                    registers.put(*reg, lane, extend(element, load.signed));
                }
            }
        }
        if strong {
            self.observer.acquiring(site, acquire);
        }
        Ok(())
    }

    pub(super) fn store(&mut self, w: usize, site: &Site, store: &Store) -> Result<(), Fault> {
        let size = store.element_bytes as usize;
        let total = size * store.from.len();
        let Ordering {
            strong, release, ..
        } = store.ordering;
        if strong {
            self.observer.releasing(site, release);
        }
        for located in locate(
            &self.warps[w].registers,
            store.space,
            &store.address,
            site.active,
        ) {
            if located.space == Space::Param {
                let lane = lanes(located.mask).next().unwrap_or(0);
                let what = "a store to the kernel's parameters".into();
                return Err(self.fault(site, lane, FaultKind::Undefined(what)));
            }
            self.admit(site, &located, AccessKind::Write, total as u32, strong)?;
            for lane in lanes(located.mask) {
                let mut buffer: Buffer = [0; 32];
                let registers = &self.warps[w].registers;
                for (reg, element) in store.from.iter().zip(buffer.chunks_exact_mut(size)) {
                    let bits = registers.get(*reg, lane).to_le_bytes();
                    element.copy_from_slice(&bits[..size]);
                }
                let address = located.addresses[lane];
                self.write(w, lane, located.space, address, &buffer[..total]);
            }
        }
        Ok(())
    }

    pub(super) fn atomic(&mut self, w: usize, site: &Site, atomic: &Atomic) -> Result<(), Fault> {
        let size = atomic.bytes;
        let total = size * atomic.b.len() as u32;
        let Ordering {
            acquire, release, ..
        } = atomic.ordering;
        self.observer.releasing(site, release);
        for located in locate(
            &self.warps[w].registers,
            atomic.space,
            &atomic.address,
            site.active,
        ) {
            if !matches!(located.space, Space::Global | Space::Shared) {
                let lane = lanes(located.mask).next().unwrap_or(0);
                let what = format!("an atomic on {} memory", located.space);
                return Err(self.fault(site, lane, FaultKind::Undefined(what)));
            }
            self.admit(site, &located, AccessKind::Atomic, total, true)?;
            for lane in lanes(located.mask) {
                for (index, (b, d)) in atomic.b.iter().zip(&atomic.d).enumerate() {
                    let registers = &self.warps[w].registers;
                    let b = registers.get(*b, lane);
                    let c = registers.get(atomic.c, lane);
                    let address = located.addresses[lane] + index as u64 * u64::from(size);
                    let apply = |old| (atomic.apply)(old, b, c);
                    let old = match located.space {
                        Space::Shared => self.update_shared(address, size as usize, apply),
                        _ => self.update_global(address, size, apply),
                    };
                    self.warps[w].registers.put(*d, lane, old);
                }
            }
        }
        self.observer.acquiring(site, acquire);
        Ok(())
    }

    fn update_shared(&mut self, at: u64, size: usize, apply: impl Fn(u64) -> u64) -> u64 {
        let bytes = self.shared_bytes_mut(at, size);
        let old = extend(bytes, false);
        bytes.copy_from_slice(&apply(old).to_le_bytes()[..size]);
        old
    }

    pub(super) fn update_global(&self, address: u64, size: u32, apply: impl Fn(u64) -> u64) -> u64 {
        match self.launch.memory.resolve(address, size.into()) {
            Ok((allocation, offset)) if size == 8 => {
                let _lock = self.launch.memory.lock_wide();
                let [low, high] = [offset, offset + 4].map(|at| allocation.load32(at));
                let old = u64::from(low) | u64::from(high) << 32;
                let new = apply(old);
                allocation.store32(offset, new as u32);
                allocation.store32(offset + 4, (new >> 32) as u32);
                old
            }
            Ok((allocation, offset)) => allocation
                .update(offset, size, |old| apply(old.into()) as u32)
                .into(),
            Err(_) => 0,
        }
    }

    /// `ldmatrix` and `stmatrix`: lanes 8i to 8i+7 give the row addresses of matrix i.
    pub(super) fn move_matrix(
        &mut self,
        w: usize,
        site: &Site,
        movement: &MatrixMove,
    ) -> Result<(), Fault> {
        let count = movement.registers.len();
        let givers = u32::MAX >> (32 - 8 * count);
        let registers = &self.warps[w].registers;
        let mut addresses = [0u64; 32];
        for located in locate(registers, movement.space, &movement.address, givers) {
            if located.space != Space::Shared {
                let lane = lanes(located.mask).next().unwrap_or(0);
                let what = "matrix rows that are not in shared memory".into();
                return Err(self.fault(site, lane, FaultKind::Undefined(what)));
            }
            self.admit(site, &located, movement.kind, 16, false)?;
            for lane in lanes(located.mask) {
                addresses[lane] = located.addresses[lane];
            }
        }
        for (index, slot) in movement.registers.iter().enumerate() {
            let rows_at = &addresses[8 * index..8 * index + 8];
            if movement.kind == AccessKind::Read {
                let mut matrix: rows::Rows = [[0; 16]; 8];
                for (row, &at) in matrix.iter_mut().zip(rows_at) {
                    row.copy_from_slice(&self.shared[at as usize..at as usize + 16]);
                }
                let fragment = rows::load(&matrix, movement.transposed);
                self.warps[w]
                    .registers
                    .set_word(*slot, site.active, &fragment);
            } else {
                let fragment = self.warps[w].registers.word(*slot);
                let matrix = rows::store(fragment, movement.transposed);
                for (row, &at) in matrix.iter().zip(rows_at) {
                    self.shared[at as usize..at as usize + 16].copy_from_slice(row);
                }
            }
        }
        Ok(())
    }
}

/// The number that little-endian bytes hold, extended to 64 bits.
#[inline]
pub(super) fn extend(bytes: &[u8], signed: bool) -> u64 {
    let mut out = [0; 8];
    out[..bytes.len()].copy_from_slice(bytes);
    let unused = 64 - 8 * bytes.len() as u32;
    let value = u64::from_le_bytes(out);
    if signed {
        ((value << unused) as i64 >> unused) as u64
    } else {
        value
    }
}
