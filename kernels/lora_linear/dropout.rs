//! Launches `dropout.cu`.

use super::Dropout;
use crate::abi::ELEMENTWISE_THREADS;
use crate::launch::{GRID_X, blocks, launch};
use crate::{Element, Kernels, LaunchError, Operand, OperandMut, modules};

/// `y [elements] = drop(x [elements])`, both f32, f16 or bf16.
///
/// # Errors
/// When the lengths differ or a type does not fit, a tensor does not start at a multiple of 16 bytes, or the driver
/// refuses.
pub fn dropout(
    kernels: &Kernels,
    dropout: Dropout,
    x: Operand,
    y: OperandMut,
) -> Result<(), LaunchError> {
    let kernel = modules::LORA_DROPOUT.of("x", x.element())?;
    dropout.step.check("dropout step", Element::U32, 1)?;
    y.check("y", x.element(), x.len())?;
    x.check_aligned("x", 16)?;
    y.check_aligned("y", 16)?;
    let per_block = u64::from(ELEMENTWISE_THREADS) * (16 / x.element().size_in_bytes());
    let grid = (blocks("x", x.len(), per_block, GRID_X)?, 1, 1);
    if x.is_empty() {
        return Ok(());
    }
    // SAFETY: the kernel's parameters in order; both buffers hold as many elements.
    unsafe {
        launch!(
            kernels,
            kernel,
            grid,
            (ELEMENTWISE_THREADS, 1, 1),
            x.address(),
            y.address(),
            dropout.get(),
            x.len(),
        );
    }
    Ok(())
}
