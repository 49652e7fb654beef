use crate::{Error, Result};
use bytemuck::{Pod, Zeroable};
use std::{
    collections::BTreeMap,
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

#[cfg_attr(
    not(feature = "cuda"),
    expect(dead_code, reason = "only CUDA devices record")
)]
mod recording;

#[cfg(feature = "cuda")]
pub(crate) use recording::Recorded;
use recording::Recording;

/// What memory is held for. A device hands memory out for one purpose at a time, see [`crate::Device::hold`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Frozen weights.
    Weights,
    /// An adapter's parameters and their gradients.
    Adapter,
    /// The optimizer's state.
    Optimizer,
    /// What captured [`Graph`](crate::Graph)s read anew each time.
    Graphs,
    /// Everything that a pass makes, unless something else is said.
    Activations,
    /// What an operation needs only while it runs.
    Workspace,
}

impl Purpose {
    /// Every purpose, in the order of [`Held`].
    pub const ALL: [Purpose; 6] = [
        Purpose::Weights,
        Purpose::Adapter,
        Purpose::Optimizer,
        Purpose::Graphs,
        Purpose::Activations,
        Purpose::Workspace,
    ];

    /// Whether what is held for it is given back before the pass that made it ends.
    fn is_passing(self) -> bool {
        matches!(self, Purpose::Activations | Purpose::Workspace)
    }
}

impl fmt::Display for Purpose {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Purpose::Weights => "weights",
            Purpose::Adapter => "adapter",
            Purpose::Optimizer => "optimizer",
            Purpose::Graphs => "graphs",
            Purpose::Activations => "activations",
            Purpose::Workspace => "workspace",
        })
    }
}

/// Bytes by purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Held([u64; Purpose::ALL.len()]);

impl Held {
    /// Bytes held for one purpose.
    pub fn of(&self, purpose: Purpose) -> u64 {
        self.0[purpose as usize]
    }

    fn add(&mut self, purpose: Purpose, bytes: usize) {
        self.0[purpose as usize] += bytes as u64;
    }

    fn subtract(&mut self, purpose: Purpose, bytes: usize) {
        self.0[purpose as usize] -= bytes as u64;
    }

    fn total(&self) -> u64 {
        self.0.iter().sum()
    }
}

/// `weights 513 MiB, activations 12 MiB`, without what holds nothing.
impl fmt::Display for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        for purpose in Purpose::ALL {
            if self.of(purpose) > 0 {
                write!(f, "{separator}{purpose} {}", size(self.of(purpose)))?;
                separator = ", ";
            }
        }
        Ok(())
    }
}

/// Bytes in a unit that suits them.
pub(crate) fn size(bytes: u64) -> String {
    match bytes {
        0..0x400 => format!("{bytes} bytes"),
        0x400..0x10_0000 => format!("{} KiB", bytes >> 10),
        _ => format!("{} MiB", bytes >> 20),
    }
}

/// How many bytes a device's tensors take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MemoryUse {
    /// Bytes of the tensors alive now. Tensors over shared memory (mapped files) do not count.
    pub current: u64,
    /// The highest `current` since the device was made or its peak was reset.
    pub peak: u64,
    /// Bytes of buffers kept for reuse.
    pub cached: u64,
    /// What `current` is held for.
    pub held: Held,
    /// What `peak` was held for.
    pub held_at_peak: Held,
}

/// A cache line: the unit and the alignment of every buffer.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
pub(crate) struct Line([u8; LINE]);

pub(crate) const LINE: usize = 64;

/// Where a pool's blocks come from.
pub(crate) trait Source {
    /// Memory of its own, given back when dropped.
    type Block;

    /// A block of `lines` cache lines, their values unspecified; nothing where there is no room.
    fn allocate(&self, lines: usize) -> Result<Option<Self::Block>>;

    /// The error of a source that has no room for `bytes`.
    fn exhausted(&self, bytes: usize, memory: &MemoryUse) -> Error;
}

/// The memory of the CPU.
#[derive(Default)]
pub(crate) struct Heap;

impl Source for Heap {
    type Block = Vec<Line>;

    fn allocate(&self, lines: usize) -> Result<Option<Vec<Line>>> {
        Ok(bytemuck::allocation::try_zeroed_vec(lines).ok())
    }

    fn exhausted(&self, bytes: usize, memory: &MemoryUse) -> Error {
        Error::OutOfMemory {
            bytes,
            device: "the cpu".into(),
            held: memory.held,
        }
    }
}

/// Keeps the memory of dropped buffers. On the CPU fresh pages cost more than the arithmetic done on them, because
/// the system zeroes each one and faults it in; on a GPU an allocation waits for all work before it.
///
/// What a pass gives back is lent to passes only, never for a lasting purpose. So the memory that a captured pass used
/// may be lent in the meantime, and is all here when the pass is repeated: a graph holds no memory of its own.
pub(crate) struct Pool<S: Source> {
    source: S,
    state: Mutex<State<S::Block>>,
    /// Whether `state.recording` is there: read for every operand of every kernel.
    is_recording: AtomicBool,
}

struct State<Block> {
    memory: MemoryUse,
    purpose: Purpose,
    /// What was given back by lasting purposes, and by passes.
    free: [Free<Block>; 2],
    recording: Option<Recording>,
    /// Recordings so far.
    recordings: u64,
}

/// Free blocks by their number of lines.
type Free<Block> = BTreeMap<usize, Vec<Piece<Block>>>;

/// A block, and what tells others of it.
struct Piece<Block> {
    block: Block,
    /// Goes with the block; true while it is lent.
    lent: Arc<AtomicBool>,
}

impl<S: Source> Pool<S> {
    pub fn new(source: S) -> Arc<Pool<S>> {
        let state = Mutex::new(State {
            memory: MemoryUse::default(),
            purpose: Purpose::Activations,
            free: [Free::new(), Free::new()],
            recording: None,
            recordings: 0,
        });
        Arc::new(Pool {
            source,
            state,
            is_recording: AtomicBool::new(false),
        })
    }

    /// A buffer of `bytes` bytes, their values unspecified, for `purpose` or what memory is now handed out for.
    pub fn take(self: &Arc<Pool<S>>, bytes: usize, purpose: Option<Purpose>) -> Result<Buffer<S>> {
        let wanted = size_class(bytes);
        let mut state = self.lock();
        let purpose = purpose.unwrap_or(state.purpose);
        let reused = state.free[usize::from(purpose.is_passing())]
            .range_mut(wanted..=wanted.saturating_mul(2))
            .find_map(|(&lines, pieces)| Some((lines, pieces.pop()?)));
        let (lines, piece) = match reused {
            Some((lines, piece)) => {
                state.memory.cached -= (lines * LINE) as u64;
                (lines, Some(piece))
            }
            None if wanted == 0 => (0, None),
            None => (wanted, Some(self.allocate(&mut state, wanted, bytes)?)),
        };
        if let Some(piece) = &piece {
            piece.lent.store(true, Relaxed);
        }
        let memory = &mut state.memory;
        memory.current += bytes as u64;
        memory.held.add(purpose, bytes);
        memory.note_peak(memory.held);
        let recording = state.recording.as_mut();
        let recorded_in = recording.map(|recording| {
            recording.lend(piece.as_ref().map(|piece| &piece.lent), purpose, bytes)
        });
        Ok(Buffer {
            piece,
            lines,
            bytes,
            purpose,
            loan: Arc::new(Loan { recorded_in }),
            pool: self.clone(),
        })
    }

    /// A fresh block, for which kept ones make room if need be.
    fn allocate(
        &self,
        state: &mut State<S::Block>,
        lines: usize,
        bytes: usize,
    ) -> Result<Piece<S::Block>> {
        // While work is captured, the driver would make an allocation a part of it.
        if state.recording.is_some() {
            return Err(self.source.exhausted(bytes, &state.memory));
        }
        let block = match self.source.allocate(lines)? {
            Some(block) => block,
            None => {
                state.trim();
                self.source
                    .allocate(lines)?
                    .ok_or_else(|| self.source.exhausted(bytes, &state.memory))?
            }
        };
        Ok(Piece {
            block,
            lent: Arc::default(),
        })
    }

    pub fn memory(&self) -> MemoryUse {
        self.lock().memory
    }

    pub fn reset_peak(&self) {
        let memory = &mut self.lock().memory;
        (memory.peak, memory.held_at_peak) = (memory.current, memory.held);
    }

    pub fn trim(&self) {
        self.lock().trim();
    }

    /// What memory is handed out for from now on; returns what it was until now.
    pub fn hold(&self, purpose: Purpose) -> Purpose {
        std::mem::replace(&mut self.lock().purpose, purpose)
    }

    fn give_back(&self, buffer: &mut Buffer<S>) {
        let mut state = self.lock();
        state.memory.current -= buffer.bytes as u64;
        state.memory.held.subtract(buffer.purpose, buffer.bytes);
        let recorded = match (&mut state.recording, buffer.loan.recorded_in) {
            (Some(recording), Some(number)) => {
                recording.give_back(number, buffer.purpose, buffer.bytes);
                true
            }
            (recording, _) => recording.is_some(),
        };
        let Some(piece) = buffer.piece.take() else {
            return;
        };
        piece.lent.store(false, Relaxed);
        let size = (buffer.lines * LINE) as u64;
        // Batches of ever new sizes must not pile up blocks that nobody asks for again. But while work is captured,
        // the driver would make freeing a part of it.
        if recorded || state.memory.cached + size <= state.memory.peak.max(SMALL_CACHE) {
            state.memory.cached += size;
            let free = &mut state.free[usize::from(buffer.purpose.is_passing())];
            free.entry(buffer.lines).or_default().push(piece);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State<S::Block>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<Block> State<Block> {
    fn trim(&mut self) {
        if self.recording.is_none() {
            self.free = [Free::new(), Free::new()];
            self.memory.cached = 0;
        }
    }
}

impl MemoryUse {
    /// Lets the peak be at least what `held` sums to.
    fn note_peak(&mut self, held: Held) {
        if held.total() > self.peak {
            (self.peak, self.held_at_peak) = (held.total(), held);
        }
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

/// Goes with a buffer.
struct Loan {
    /// The recording in which it was taken.
    recorded_in: Option<u64>,
}

/// Memory on loan from a [`Pool`], aligned to a cache line at least.
pub(crate) struct Buffer<S: Source> {
    /// Nothing where there are no bytes.
    piece: Option<Piece<S::Block>>,
    lines: usize,
    bytes: usize,
    purpose: Purpose,
    loan: Arc<Loan>,
    pool: Arc<Pool<S>>,
}

impl<S: Source> Buffer<S> {
    pub fn len(&self) -> usize {
        self.bytes
    }

    pub fn block(&self) -> Option<&S::Block> {
        self.piece.as_ref().map(|piece| &piece.block)
    }

    pub fn block_mut(&mut self) -> Option<&mut S::Block> {
        self.piece.as_mut().map(|piece| &mut piece.block)
    }
}

impl Buffer<Heap> {
    pub fn bytes(&self) -> &[u8] {
        let lines = self.block().map(Vec::as_slice).unwrap_or_default();
        &bytemuck::cast_slice(lines)[..self.bytes]
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        let bytes = self.bytes;
        let lines = self.block_mut().map(Vec::as_mut_slice).unwrap_or_default();
        &mut bytemuck::cast_slice_mut(lines)[..bytes]
    }

    pub fn f32_mut(&mut self) -> &mut [f32] {
        bytemuck::cast_slice_mut(self.bytes_mut())
    }
}

impl<S: Source> Drop for Buffer<S> {
    fn drop(&mut self) {
        self.pool.clone().give_back(self);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool() -> Arc<Pool<Heap>> {
        Pool::new(Heap)
    }

    #[test]
    fn a_dropped_buffer_is_reused() {
        let pool = pool();
        let use_now = || {
            let memory = pool.memory();
            (memory.current, memory.peak, memory.cached)
        };
        let first = pool.take(1000, None).unwrap();
        let address = first.bytes().as_ptr();
        drop(first);
        assert_eq!(use_now(), (0, 1000, 1024));
        let second = pool.take(990, None).unwrap();
        assert_eq!(second.bytes().as_ptr(), address);
        assert_eq!(use_now(), (990, 1000, 0));
    }

    #[test]
    fn memory_is_counted_by_purpose() {
        let pool = pool();
        assert_eq!(pool.hold(Purpose::Weights), Purpose::Activations);
        let weights = pool.take(3000, None).unwrap();
        pool.hold(Purpose::Activations);
        let activations = pool.take(200, None).unwrap();
        let workspace = pool.take(50, Some(Purpose::Workspace)).unwrap();
        drop((activations, workspace));
        let memory = pool.memory();
        assert_eq!(memory.held.to_string(), "weights 2 KiB");
        assert_eq!(
            memory.held_at_peak.to_string(),
            "weights 2 KiB, activations 200 bytes, workspace 50 bytes"
        );
        drop(weights);
        assert_eq!(pool.memory().held, Held::default());
    }

    #[test]
    fn what_passes_give_back_is_lent_to_passes_alone() {
        let pool = pool();
        drop(pool.take(1000, Some(Purpose::Workspace)).unwrap());
        let weights = pool.take(1000, Some(Purpose::Weights)).unwrap();
        assert_eq!(pool.memory().cached, 1024);
        let activations = pool.take(1000, None).unwrap();
        assert_eq!(pool.memory().cached, 0);
        drop((weights, activations));
        let _optimizer = pool.take(1000, Some(Purpose::Optimizer)).unwrap();
        assert_eq!(pool.memory().cached, 1024);
    }

    #[test]
    fn a_buffer_far_too_large_is_not_reused() {
        let pool = pool();
        drop(pool.take(1 << 20, None).unwrap());
        let small = pool.take(64, None).unwrap();
        assert_eq!(small.lines, 1);
    }

    #[test]
    fn the_cache_stays_below_the_peak() {
        let pool = pool();
        for size in 1..40 {
            drop(pool.take(size << 20, None).unwrap());
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
        let pool = pool();
        assert!(matches!(
            pool.take(usize::MAX / 4, None),
            Err(Error::OutOfMemory { .. })
        ));
        assert_eq!(pool.memory().current, 0);
    }
}
