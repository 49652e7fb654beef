//! The tiles of `gemm.cuh`: which one a product takes, and how it is launched.

use crate::abi::{
    GEMM_DEPTH, GEMM_LARGE_COLS, GEMM_LARGE_ROWS, GEMM_SMALL_COLS, GEMM_SMALL_ROWS, GEMM_STAGES,
    GEMM_THREADS,
};
use crate::launch::{GRID_X, Kernels, LaunchError, blocks};
use crate::modules::Kernel;
use crate::operand::Element;
use cudarc::driver::{CudaFunction, LaunchConfig};

/// Below this many large tiles a GPU is better filled by small ones: most have about a hundred
/// multiprocessors or more, and a large tile takes a whole one.
const MANY_TILES: u64 = 96;

/// What a block has in shared memory for a tile `[rows, cols]` of 16-bit elements: the ring of slices.
const fn shared_bytes([rows, cols]: [u32; 2]) -> u32 {
    GEMM_STAGES * (rows + cols) * GEMM_DEPTH * 2
}

/// The kernels of one operation on f16 and bf16, by their tile.
pub(crate) struct ByTile {
    pub f16: [&'static Kernel; 3],
    pub bf16: [&'static Kernel; 3],
}

/// The kernels `<operation>_f16_large` and so on.
macro_rules! by_tile {
    ($f16_large:ident, $f16_small:ident, $f16_unaligned:ident,
     $bf16_large:ident, $bf16_small:ident, $bf16_unaligned:ident $(,)?) => {
        $crate::gemm::ByTile {
            f16: [
                &$crate::modules::$f16_large,
                &$crate::modules::$f16_small,
                &$crate::modules::$f16_unaligned,
            ],
            bf16: [
                &$crate::modules::$bf16_large,
                &$crate::modules::$bf16_small,
                &$crate::modules::$bf16_unaligned,
            ],
        }
    };
}
pub(crate) use by_tile;

impl ByTile {
    /// The kernel and its launch for a result of `rows x cols`, neither of them 0. `aligned`: every
    /// row of the factors and of the result is whole chunks of 16 bytes, at multiples of 16. An element that has
    /// no kernel is an error about `tensor`.
    pub fn choose(
        &self,
        kernels: &Kernels,
        tensor: &'static str,
        element: Element,
        rows: u32,
        cols: u32,
        aligned: bool,
    ) -> Result<(CudaFunction, LaunchConfig), LaunchError> {
        let tiles = |[height, width]: [u32; 2]| {
            u64::from(rows.div_ceil(height)) * u64::from(cols.div_ceil(width))
        };
        let (large, small) = (
            [GEMM_LARGE_ROWS, GEMM_LARGE_COLS],
            [GEMM_SMALL_ROWS, GEMM_SMALL_COLS],
        );
        // GPUs with tensor cores but without the large shared memory of a data centre's have no room for large tiles.
        let fits = shared_bytes(large) <= kernels.shared_per_block();
        let (tile, index) = match (aligned, fits && tiles(large) >= MANY_TILES) {
            (true, true) => (large, 0),
            (true, false) => (small, 1),
            (false, _) => (small, 2),
        };
        let kernel = match element {
            Element::F16 => self.f16[index],
            Element::Bf16 => self.bf16[index],
            found => {
                return Err(LaunchError::Element {
                    tensor,
                    expected: Element::Bf16,
                    found,
                });
            }
        };
        let shared = shared_bytes(tile);
        let config = LaunchConfig {
            grid_dim: (blocks("tiles", tiles(tile), 1, GRID_X)?, 1, 1),
            block_dim: (GEMM_THREADS, 1, 1),
            shared_mem_bytes: shared,
        };
        Ok((kernels.function_with_shared(kernel, shared)?, config))
    }
}

/// Whether the rows of matrices of 16-bit elements at these addresses, of these lengths, are whole chunks of 16
/// bytes at multiples of 16.
pub(crate) fn are_aligned(addresses: &[u64], lengths: &[u32]) -> bool {
    addresses.iter().all(|address| address.is_multiple_of(16))
        && lengths.iter().all(|length| length.is_multiple_of(8))
}
