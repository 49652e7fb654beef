//! Launches `quantize.cu`.
//!
//! Double quantization of `absmax` is left to the host: it is a mean and one byte for every block, a hundredth
//! of the weight's bytes, and it happens once, when a weight is loaded.

use super::check_block_size;
use crate::abi::{NF4_QUANTIZE_ELEMENTS, NF4_QUANTIZE_THREADS};
use crate::launch::{GRID_X, blocks, launch};
use crate::{Element, Kernels, LaunchError, Operand, OperandMut, modules};

/// The nearest NF4 codes of `x [elements]`, f32, f16 or bf16, in blocks of `block_size`, a power of two from 32
/// to 4096: `packed [(elements + 1) / 2]` u8 and `absmax [elements / block_size, rounded up]` f32, to the bit
/// as bitsandbytes' `quantize_4bit` computes them.
///
/// `x` starts at a multiple of 16 bytes, `packed` at one of 4.
///
/// # Errors
/// When a length, type or alignment does not fit, or when the driver refuses.
pub fn quantize(
    kernels: &Kernels,
    x: Operand,
    block_size: u32,
    packed: OperandMut,
    absmax: OperandMut,
) -> Result<(), LaunchError> {
    let kernel = modules::NF4_QUANTIZE.of("x", x.element())?;
    check_block_size(block_size)?;
    let weight_blocks = x.len().div_ceil(u64::from(block_size));
    packed.check("packed", Element::U8, x.len().div_ceil(2))?;
    absmax.check("absmax", Element::F32, weight_blocks)?;
    if x.is_empty() {
        return Ok(());
    }
    x.check_aligned("x", 16)?;
    packed.check_aligned("packed", 4)?;
    let per_block = u64::from(NF4_QUANTIZE_ELEMENTS);
    let grid = (blocks("x", x.len(), per_block, GRID_X)?, 1, 1);
    // SAFETY: the kernel's parameters in order, and every length was checked against what the kernel reads
    // and writes.
    unsafe {
        launch!(
            kernels,
            kernel,
            grid,
            (NF4_QUANTIZE_THREADS, 1, 1),
            x.address(),
            packed.address(),
            absmax.address(),
            x.len(),
            block_size.ilog2(),
        );
    }
    Ok(())
}
