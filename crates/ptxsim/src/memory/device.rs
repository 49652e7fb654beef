//! Device memory: allocations of 32-bit words, shared between the blocks of a grid.
//!
//! Blocks run on several threads, and a CUDA program may race; so the words are relaxed atomics:
//! a racing program gets one of the values written, as on a GPU, and nothing worse.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};

use super::{AllocationInfo, DevicePtr, MemoryError, MemoryInfo};

const TAG: u64 = 1 << 62;
const ID_SHIFT: u32 = 38;
const ID_MASK: u64 = (1 << 24) - 1;
const OFFSET_MASK: u64 = (1 << ID_SHIFT) - 1;
/// Offsets are biased, so that an address before its allocation still carries its id.
const BIAS: u64 = 1 << (ID_SHIFT - 1);
/// What an allocation is rounded up to when the device's memory is counted.
const GRANULE: u64 = 256;

/// One allocation's bytes, and which of them have been written.
pub(crate) struct Allocation {
    id: u32,
    bytes: u64,
    name: Option<String>,
    freed: bool,
    words: Box<[AtomicU32]>,
    /// One bit per byte: set once written.
    written: Box<[AtomicU32]>,
    /// Set when a launch that does not track writes may have written here.
    untracked: AtomicBool,
}

/// Words that start as zero.
fn zeroed(len: u64) -> Box<[AtomicU32]> {
    bytemuck::zeroed_slice_box(len as usize)
}

impl Allocation {
    fn new(id: u32, bytes: u64, name: Option<String>) -> Allocation {
        Allocation {
            id,
            bytes,
            name,
            freed: false,
            words: zeroed(bytes.div_ceil(4)),
            written: zeroed(bytes.div_ceil(32)),
            untracked: AtomicBool::new(false),
        }
    }

    pub fn id(&self) -> u32 {
        self.id
    }

    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    fn address(&self) -> u64 {
        TAG | u64::from(self.id) << ID_SHIFT | BIAS
    }

    pub fn info(&self) -> AllocationInfo {
        AllocationInfo {
            id: self.id,
            address: self.address(),
            bytes: self.bytes,
            name: self.name.clone(),
            freed: self.freed,
        }
    }

    /// The word that holds byte `offset`.
    pub fn word(&self, offset: u64) -> &AtomicU32 {
        &self.words[offset as usize / 4]
    }

    pub fn load32(&self, offset: u64) -> u32 {
        self.word(offset).load(Relaxed)
    }

    pub fn store32(&self, offset: u64, value: u32) {
        self.word(offset).store(value, Relaxed);
    }

    /// Replaces the bits of `mask` in the word that holds byte `offset`.
    pub fn store_bits(&self, offset: u64, value: u32, mask: u32) {
        let word = self.word(offset);
        let mut old = word.load(Relaxed);
        while let Err(now) =
            word.compare_exchange_weak(old, old & !mask | value & mask, Relaxed, Relaxed)
        {
            old = now;
        }
    }

    /// Replaces the `bytes` (at most 4, aligned) at `offset` in one step; returns the old value.
    pub fn update(&self, offset: u64, bytes: u32, apply: impl Fn(u32) -> u32) -> u32 {
        let shift = (offset % 4) as u32 * 8;
        let mask = u32::MAX >> (32 - 8 * bytes);
        let word = self.word(offset);
        let mut old = word.load(Relaxed);
        loop {
            let before = old >> shift & mask;
            let new = old & !(mask << shift) | (apply(before) & mask) << shift;
            match word.compare_exchange_weak(old, new, Relaxed, Relaxed) {
                Ok(_) => return before,
                Err(now) => old = now,
            }
        }
    }

    pub fn read_bytes(&self, offset: u64, out: &mut [u8]) {
        let mut at = offset;
        let mut rest = out;
        while !rest.is_empty() {
            let skip = (at % 4) as usize;
            let word = self.load32(at).to_le_bytes();
            let n = rest.len().min(4 - skip);
            let (now, later) = rest.split_at_mut(n);
            now.copy_from_slice(&word[skip..skip + n]);
            rest = later;
            at += n as u64;
        }
    }

    pub fn write_bytes(&self, offset: u64, bytes: &[u8]) {
        let mut at = offset;
        let mut rest = bytes;
        while !rest.is_empty() {
            let skip = (at % 4) as usize;
            let n = rest.len().min(4 - skip);
            let mut word = [0; 4];
            word[skip..skip + n].copy_from_slice(&rest[..n]);
            if n == 4 {
                self.store32(at, u32::from_le_bytes(word));
            } else {
                let mut mask = [0u8; 4];
                mask[skip..skip + n].fill(0xff);
                self.store_bits(at, u32::from_le_bytes(word), u32::from_le_bytes(mask));
            }
            rest = &rest[n..];
            at += n as u64;
        }
    }

    /// Notes that `bytes` bytes at `offset` have been written.
    pub fn mark_written(&self, offset: u64, bytes: u64) {
        for_each_bits(offset, bytes, |index, mask| {
            let bits = &self.written[index];
            // Most stores hit bytes already marked; a plain load is much cheaper than the update.
            if bits.load(Relaxed) & mask != mask {
                bits.fetch_or(mask, Relaxed);
            }
            true
        });
    }

    /// Whether all of `bytes` bytes at `offset` may have been written.
    pub fn is_written(&self, offset: u64, bytes: u64) -> bool {
        let marked = for_each_bits(offset, bytes, |index, mask| {
            self.written[index].load(Relaxed) & mask == mask
        });
        marked || self.untracked.load(Relaxed)
    }
}

/// Calls `f(index, mask)` for the bitmap words that cover a range of bytes, until it says `false`.
fn for_each_bits(offset: u64, bytes: u64, mut f: impl FnMut(usize, u32) -> bool) -> bool {
    let end = offset + bytes;
    let mut at = offset;
    while at < end {
        let skip = at % 32;
        let n = (32 - skip).min(end - at);
        let mask = (((1u64 << n) - 1) << skip) as u32;
        if !f((at / 32) as usize, mask) {
            return false;
        }
        at += n;
    }
    true
}

/// Why an address cannot be used.
pub(crate) enum AddressError {
    /// No allocation has it.
    NotDevice,
    /// Its allocation was freed.
    Freed(AllocationInfo),
    /// It has left its allocation.
    OutOfBounds(AllocationInfo),
}

/// The allocations, indexed by id. Freed ones stay, without their bytes.
struct Table {
    allocations: Vec<Allocation>,
    used: u64,
}

impl Table {
    /// The allocation of `bytes` bytes at `address`, and the offset in it.
    #[inline]
    fn resolve(&self, address: u64, bytes: u64) -> Result<(&Allocation, u64), AddressError> {
        let id = (address >> ID_SHIFT & ID_MASK) as usize;
        let Some(allocation) = self.allocations.get(id).filter(|_| address >> 62 == 1) else {
            return Err(AddressError::NotDevice);
        };
        let offset = (address & OFFSET_MASK).wrapping_sub(BIAS);
        if offset
            .checked_add(bytes)
            .is_some_and(|end| end <= allocation.bytes)
            && !allocation.freed
        {
            Ok((allocation, offset))
        } else if allocation.freed {
            Err(AddressError::Freed(allocation.info()))
        } else {
            Err(AddressError::OutOfBounds(allocation.info()))
        }
    }

    fn range(&self, ptr: DevicePtr, bytes: u64) -> Result<(&Allocation, u64), MemoryError> {
        let address = ptr.0;
        self.resolve(address, bytes).map_err(|error| match error {
            AddressError::NotDevice => MemoryError::NotDevice(address),
            AddressError::Freed(allocation) => MemoryError::Freed {
                address,
                allocation,
            },
            AddressError::OutOfBounds(allocation) => MemoryError::OutOfBounds {
                address,
                bytes,
                allocation,
            },
        })
    }
}

/// The memory of one device.
pub(crate) struct DeviceMemory {
    table: RwLock<Table>,
    total: u64,
    /// Held by 64-bit atomics: the words are 32 bits wide.
    wide_atomic: Mutex<()>,
}

/// The allocations as they stay for the length of a launch.
pub(crate) struct Snapshot<'a> {
    table: RwLockReadGuard<'a, Table>,
    wide_atomic: &'a Mutex<()>,
}

impl Snapshot<'_> {
    /// The allocation of `bytes` bytes at `address`, and the offset in it.
    #[inline]
    pub fn resolve(&self, address: u64, bytes: u64) -> Result<(&Allocation, u64), AddressError> {
        self.table.resolve(address, bytes)
    }

    pub fn lock_wide(&self) -> MutexGuard<'_, ()> {
        self.wide_atomic
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// How many allocations there have been, freed ones included.
    pub fn len(&self) -> usize {
        self.table.allocations.len()
    }

    /// Gives up on telling which bytes were written: a launch that does not track it begins.
    pub fn assume_written(&self) {
        for allocation in &self.table.allocations {
            allocation.untracked.store(true, Relaxed);
        }
    }
}

impl DeviceMemory {
    pub fn new(total: u64) -> DeviceMemory {
        // Id 0 is never given out: a zero in an id field must not look like an allocation.
        let none = Allocation {
            freed: true,
            ..Allocation::new(0, 0, None)
        };
        let table = RwLock::new(Table {
            allocations: vec![none],
            used: 0,
        });
        DeviceMemory {
            table,
            total,
            wide_atomic: Mutex::new(()),
        }
    }

    pub fn snapshot(&self) -> Snapshot<'_> {
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        Snapshot {
            table,
            wide_atomic: &self.wide_atomic,
        }
    }

    pub fn info(&self) -> MemoryInfo {
        MemoryInfo {
            free: self.total - self.snapshot().table.used,
            total: self.total,
        }
    }

    pub fn alloc(&self, bytes: u64, name: Option<String>) -> Result<DevicePtr, MemoryError> {
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        let (free, total, id) = (self.total - table.used, self.total, table.allocations.len());
        let counted = bytes.saturating_add(GRANULE - 1) / GRANULE * GRANULE;
        if counted > free || id as u64 > ID_MASK || bytes >= BIAS {
            return Err(MemoryError::OutOfMemory {
                requested: bytes,
                free,
                total,
            });
        }
        let allocation = Allocation::new(id as u32, bytes, name);
        let ptr = DevicePtr(allocation.address());
        table.used += counted;
        table.allocations.push(allocation);
        Ok(ptr)
    }

    pub fn free(&self, ptr: DevicePtr) -> Result<(), MemoryError> {
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        let (allocation, offset) = table.range(ptr, 0)?;
        if offset != 0 {
            return Err(MemoryError::NotStart {
                address: ptr.0,
                allocation: allocation.info(),
            });
        }
        let (id, bytes) = (allocation.id as usize, allocation.bytes);
        table.used -= bytes.next_multiple_of(GRANULE);
        let allocation = &mut table.allocations[id];
        allocation.freed = true;
        allocation.words = Box::default();
        allocation.written = Box::default();
        Ok(())
    }

    pub fn write(&self, ptr: DevicePtr, bytes: &[u8]) -> Result<(), MemoryError> {
        let memory = self.snapshot();
        let (allocation, offset) = memory.table.range(ptr, bytes.len() as u64)?;
        allocation.write_bytes(offset, bytes);
        allocation.mark_written(offset, bytes.len() as u64);
        Ok(())
    }

    pub fn read(&self, ptr: DevicePtr, out: &mut [u8]) -> Result<(), MemoryError> {
        let memory = self.snapshot();
        let (allocation, offset) = memory.table.range(ptr, out.len() as u64)?;
        allocation.read_bytes(offset, out);
        Ok(())
    }

    pub fn copy(&self, to: DevicePtr, from: DevicePtr, bytes: u64) -> Result<(), MemoryError> {
        let memory = self.snapshot();
        let (source, source_offset) = memory.table.range(from, bytes)?;
        let (target, target_offset) = memory.table.range(to, bytes)?;
        let mut buffer = vec![0; bytes as usize];
        source.read_bytes(source_offset, &mut buffer);
        target.write_bytes(target_offset, &buffer);
        if source.is_written(source_offset, bytes) {
            target.mark_written(target_offset, bytes);
        } else {
            for byte in (0..bytes).filter(|b| source.is_written(source_offset + b, 1)) {
                target.mark_written(target_offset + byte, 1);
            }
        }
        Ok(())
    }

    /// Fills with copies of `pattern`, whose length is the alignment that `ptr` must have.
    pub fn fill(&self, ptr: DevicePtr, pattern: &[u8], count: u64) -> Result<(), MemoryError> {
        let alignment = pattern.len() as u64;
        let bytes = count.saturating_mul(alignment);
        if !ptr.0.is_multiple_of(alignment) {
            return Err(MemoryError::Misaligned {
                address: ptr.0,
                alignment,
            });
        }
        let memory = self.snapshot();
        let (allocation, offset) = memory.table.range(ptr, bytes)?;
        allocation.write_bytes(offset, &pattern.repeat(count as usize));
        allocation.mark_written(offset, bytes);
        Ok(())
    }
}
