//! How a warp's addresses fall on sectors and banks, and which sectors a launch touches.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use super::{MemoryEvent, Site};
use crate::exec::{Launch, lanes};
use crate::report::AccessKind;

/// Bytes of a sector: the unit in which memory moves.
const SECTOR: u64 = 32;

/// The sectors that `bytes` bytes at `address` touch.
fn sectors_of(address: u64, bytes: u32) -> std::ops::RangeInclusive<u64> {
    address / SECTOR..=(address + u64::from(bytes) - 1) / SECTOR
}

/// 32-byte sectors that one warp access touches.
pub(super) fn sectors(site: &Site, event: &MemoryEvent<'_>) -> u64 {
    let mut touched: Vec<u64> = lanes(site.active)
        .flat_map(|lane| sectors_of(event.addresses[lane], event.bytes))
        .collect();
    touched.sort_unstable();
    touched.dedup();
    touched.len() as u64
}

/// Passes that bank conflicts add to one shared access: 32 banks of 4 bytes, lanes served 128
/// bytes at a time, the same word read by several lanes counted once.
pub(super) fn bank_conflicts(site: &Site, event: &MemoryEvent<'_>) -> u64 {
    let together = (128 / event.bytes.clamp(4, 16)) as usize;
    let words = event.bytes.div_ceil(4) as usize;
    let mut added = 0;
    for first in (0..32).step_by(together) {
        let mut touched = [0u64; 128];
        let mut count = 0;
        for lane in (first..first + together).filter(|lane| site.active >> lane & 1 == 1) {
            for word in 0..words.min(4) {
                touched[count] = event.addresses[lane] / 4 + word as u64;
                count += 1;
            }
        }
        let touched = &mut touched[..count];
        touched.sort_unstable();
        let mut banks = [0u64; 32];
        for (index, word) in touched.iter().enumerate() {
            if index == 0 || touched[index - 1] != *word {
                banks[(word % 32) as usize] += 1;
            }
        }
        added += banks.into_iter().max().unwrap_or(0).saturating_sub(1);
    }
    added
}

/// One bit per sector of an allocation.
type Bitmap = OnceLock<Box<[AtomicU32]>>;

/// The sectors that a launch reads and writes.
pub(super) struct Unique {
    /// For each allocation: read, written.
    sectors: Vec<[Bitmap; 2]>,
}

impl Unique {
    pub fn new(launch: &Launch<'_>) -> Unique {
        let bitmaps = |_| [OnceLock::new(), OnceLock::new()];
        Unique {
            sectors: (0..launch.memory.len()).map(bitmaps).collect(),
        }
    }

    pub fn touch(&self, launch: &Launch<'_>, site: &Site, event: &MemoryEvent<'_>) {
        let reads = matches!(event.kind, AccessKind::Read | AccessKind::Atomic);
        let writes = matches!(event.kind, AccessKind::Write | AccessKind::Atomic);
        for lane in lanes(site.active) {
            let resolved = launch
                .memory
                .resolve(event.addresses[lane], event.bytes.into());
            let Ok((allocation, offset)) = resolved else {
                continue;
            };
            let bitmaps = &self.sectors[allocation.id() as usize];
            for (bitmap, used) in bitmaps.iter().zip([reads, writes]) {
                if !used {
                    continue;
                }
                let words = allocation.bytes().div_ceil(SECTOR * 32) as usize;
                let bitmap = bitmap.get_or_init(|| bytemuck::zeroed_slice_box(words));
                for sector in sectors_of(offset, event.bytes) {
                    let (word, bit) = (&bitmap[sector as usize / 32], 1 << (sector % 32));
                    if word.load(Relaxed) & bit == 0 {
                        word.fetch_or(bit, Relaxed);
                    }
                }
            }
        }
    }

    /// Bytes read and bytes written.
    pub fn bytes(&self) -> [u64; 2] {
        [0, 1].map(|which| {
            let bitmaps = self.sectors.iter().filter_map(|maps| maps[which].get());
            let bits = bitmaps
                .flat_map(|map| map.iter())
                .map(|word| word.load(Relaxed).count_ones());
            bits.map(u64::from).sum::<u64>() * SECTOR
        })
    }
}
