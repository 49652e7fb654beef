use crate::{Error, Result};
use bytemuck::{Pod, Zeroable};
use std::{
    collections::BTreeMap,
    mem,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// How many bytes a device's tensors take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MemoryUse {
    /// Bytes of the tensors alive now. Tensors over shared memory (mapped files) do not count.
    pub current: u64,
    /// The highest `current` since the device was made or its peak was reset.
    pub peak: u64,
    /// Bytes of buffers kept for reuse.
    pub cached: u64,
}

/// A cache line: the unit and the alignment of every buffer.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([u8; LINE]);

const LINE: usize = 64;

/// Keeps the memory of dropped buffers, because fresh pages cost more than the arithmetic done on them:
/// the system zeroes each one and faults it in.
#[derive(Default)]
pub(crate) struct Pool {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    memory: MemoryUse,
    /// Free blocks by their number of lines.
    free: BTreeMap<usize, Vec<Vec<Line>>>,
}

impl Pool {
    /// A buffer of `bytes` bytes, their values unspecified.
    pub fn take(self: &Arc<Pool>, bytes: usize) -> Result<Buffer> {
        let wanted = size_class(bytes);
        let mut state = self.lock();
        let reused = state
            .free
            .range_mut(wanted..=wanted.saturating_mul(2))
            .find_map(|(_, blocks)| blocks.pop());
        let lines = match reused {
            Some(lines) => {
                state.memory.cached -= (lines.len() * LINE) as u64;
                lines
            }
            None => {
                bytemuck::allocation::try_zeroed_vec(wanted).map_err(|()| Error::OutOfMemory {
                    bytes,
                    device: "cpu",
                })?
            }
        };
        state.memory.current += bytes as u64;
        state.memory.peak = state.memory.peak.max(state.memory.current);
        Ok(Buffer {
            lines,
            bytes,
            pool: self.clone(),
        })
    }

    pub fn memory(&self) -> MemoryUse {
        self.lock().memory
    }

    pub fn reset_peak(&self) {
        let memory = &mut self.lock().memory;
        memory.peak = memory.current;
    }

    pub fn trim(&self) {
        let mut state = self.lock();
        state.free.clear();
        state.memory.cached = 0;
    }

    fn give_back(&self, lines: Vec<Line>, bytes: usize) {
        let mut state = self.lock();
        state.memory.current -= bytes as u64;
        let size = (lines.len() * LINE) as u64;
        // Batches of ever new sizes must not pile up blocks that nobody asks for again.
        if size > 0 && state.memory.cached + size <= state.memory.peak.max(SMALL_CACHE) {
            state.memory.cached += size;
            state.free.entry(lines.len()).or_default().push(lines);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The pool may always keep this many bytes.
const SMALL_CACHE: u64 = 16 << 20;

/// The number of lines to allocate for `bytes`: one of eight sizes per doubling, at most an eighth too many.
fn size_class(bytes: usize) -> usize {
    let lines = bytes.div_ceil(LINE);
    let step = (lines.max(8).next_power_of_two() / 16).max(1);
    lines.next_multiple_of(step)
}

/// Memory on loan from a [`Pool`], aligned to a cache line.
pub(crate) struct Buffer {
    lines: Vec<Line>,
    bytes: usize,
    pool: Arc<Pool>,
}

impl Buffer {
    pub fn bytes(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.lines)[..self.bytes]
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..self.bytes]
    }

    pub fn f32_mut(&mut self) -> &mut [f32] {
        bytemuck::cast_slice_mut(self.bytes_mut())
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.pool.give_back(mem::take(&mut self.lines), self.bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_buffer_is_reused() {
        let pool = Arc::new(Pool::default());
        let first = pool.take(1000).unwrap();
        let address = first.bytes().as_ptr();
        drop(first);
        assert_eq!(
            pool.memory(),
            MemoryUse {
                current: 0,
                peak: 1000,
                cached: 1024
            }
        );
        let second = pool.take(990).unwrap();
        assert_eq!(second.bytes().as_ptr(), address);
        assert_eq!(
            pool.memory(),
            MemoryUse {
                current: 990,
                peak: 1000,
                cached: 0
            }
        );
    }

    #[test]
    fn a_buffer_far_too_large_is_not_reused() {
        let pool = Arc::new(Pool::default());
        drop(pool.take(1 << 20).unwrap());
        let small = pool.take(64).unwrap();
        assert_eq!(small.lines.len(), 1);
    }

    #[test]
    fn the_cache_stays_below_the_peak() {
        let pool = Arc::new(Pool::default());
        for size in 1..40 {
            drop(pool.take(size << 20).unwrap());
        }
        assert!(
            pool.memory().cached <= pool.memory().peak,
            "{:?}",
            pool.memory()
        );
        pool.trim();
        assert_eq!(pool.memory().cached, 0);
    }

    #[test]
    fn size_classes_waste_little() {
        for bytes in (1..100_000).step_by(7) {
            let lines = size_class(bytes);
            assert!(
                lines * LINE >= bytes && lines <= bytes.div_ceil(LINE) * 9 / 8 + 1,
                "{bytes}"
            );
        }
        assert_eq!(size_class(0), 0);
    }

    #[test]
    fn too_much_memory_is_an_error() {
        let pool = Arc::new(Pool::default());
        assert!(matches!(
            pool.take(usize::MAX / 4),
            Err(Error::OutOfMemory { .. })
        ));
        assert_eq!(pool.memory().current, 0);
    }
}
