//! Launches `gemv_f32.cu` and `gemv_16bit.cu`: the products for a few tokens, which generation consists of.

use crate::abi::{NF4_GEMV_BLOCKS, NF4_GEMV_ROWS, NF4_GEMV_THREADS, NF4_GEMV_TOKENS, Nf4Gemv};
use crate::launch::{GRID_X, blocks, launch};
use crate::{Element, Kernels, LaunchError, modules};

impl Nf4Gemv {
    /// Whether the kernels can take it: few tokens, rows of whole steps of 64 columns, each in one block.
    pub(crate) fn fits(&self) -> bool {
        self.tokens <= NF4_GEMV_TOKENS
            && self.in_features.is_multiple_of(64)
            && self.weight.log2_block_size >= 6
            && self.x.is_multiple_of(16)
    }
}

/// `y = x·Wᵀ + scaling·h·Bᵀ + bias`, for what [`Nf4Gemv::fits`] and the caller has checked.
pub(crate) fn gemv(kernels: &Kernels, element: Element, shape: Nf4Gemv) -> Result<(), LaunchError> {
    let kernel = modules::NF4_GEMV.of("x", element)?;
    let rows = u64::from(shape.out_features);
    let groups = blocks("features", rows, NF4_GEMV_ROWS.into(), GRID_X)?;
    let grid = match element {
        Element::F32 => groups,
        _ => groups.min(NF4_GEMV_BLOCKS * kernels.multiprocessors()),
    };
    let grid = (grid, 1, 1);
    // SAFETY: the argument is the kernel's parameter; the caller checked every length against the shape.
    unsafe { launch!(kernels, kernel, grid, (NF4_GEMV_THREADS, 1, 1), shape) };
    Ok(())
}
