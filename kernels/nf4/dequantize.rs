//! Launches `dequantize.cu`.

use super::Weight;
use crate::abi::{NF4_DEQUANTIZE_STORES, NF4_DEQUANTIZE_THREADS};
use crate::launch::{GRID_X, blocks, launch};
use crate::{Kernels, LaunchError, OperandMut, modules};

/// `out[i] = weight[first + i]`, in f32 and rounded once to the type of `out [count]`: f32, f16 or bf16.
///
/// `first` is a multiple of 8, and `out` starts at a multiple of 16 bytes.
///
/// # Errors
/// When a length, type or alignment does not fit, or when the driver refuses.
pub fn dequantize(
    kernels: &Kernels,
    weight: &Weight,
    first: u64,
    out: OperandMut,
) -> Result<(), LaunchError> {
    let kernel = modules::NF4_DEQUANTIZE.of("out", out.element())?;
    let checked = weight.check()?;
    if !first.is_multiple_of(8) {
        return Err(LaunchError::Parameter {
            parameter: "first",
            found: first,
            expected: "it must be a multiple of 8",
        });
    }
    let left = weight.elements.saturating_sub(first);
    out.check("out", out.element(), out.len().min(left))?;
    if out.is_empty() {
        return Ok(());
    }
    out.check_aligned("out", 16)?;

    let per_store = 16 / out.element().size_in_bytes();
    let per_block = u64::from(NF4_DEQUANTIZE_THREADS * NF4_DEQUANTIZE_STORES) * per_store;
    let grid = (blocks("out", out.len(), per_block, GRID_X)?, 1, 1);
    let block = (NF4_DEQUANTIZE_THREADS, 1, 1);
    // SAFETY: the kernel's parameters in order, and every length was checked against what the kernel reads
    // and writes.
    unsafe {
        launch!(
            kernels,
            kernel,
            grid,
            block,
            checked,
            first,
            out.len(),
            out.address(),
        );
    }
    Ok(())
}
