//! Cross-entropy. Launches `cross_entropy.cu`.

use crate::abi::{CROSS_ENTROPY_THREADS, LossShape};
use crate::launch::{ByStorage, GRID_X, blocks, launch};
use crate::modules;
use crate::{Element, Kernels, LaunchError, Operand, OperandMut};

/// `losses [n] = -log softmax(logits)[target]` for `logits [n, vocab]`, f32, f16 or bf16, and `targets [n]` u32;
/// their sum is added to `total [1]`. Losses and total are f32. A target beyond the vocabulary ends the launch
/// with a device fault.
///
/// # Errors
/// When a length or type does not fit, `logits` does not start at a multiple of 16 bytes, or the driver refuses.
pub fn cross_entropy_forward(
    kernels: &Kernels,
    vocab: u32,
    logits: Operand,
    targets: Operand,
    losses: OperandMut,
    total: OperandMut,
) -> Result<(), LaunchError> {
    let shape = LossShape {
        vocab,
        grad_scale: 0.0,
    };
    run(
        kernels,
        modules::CROSS_ENTROPY_FORWARD,
        shape,
        logits,
        targets,
        losses,
        total,
    )
}

/// [`cross_entropy_forward`], and `logits` are overwritten by their gradient
/// `(softmax(logits) - onehot(target))·grad_scale`.
///
/// # Errors
/// As [`cross_entropy_forward`].
pub fn cross_entropy_backward(
    kernels: &Kernels,
    shape: LossShape,
    logits: OperandMut,
    targets: Operand,
    losses: OperandMut,
    total: OperandMut,
) -> Result<(), LaunchError> {
    run(
        kernels,
        modules::CROSS_ENTROPY_BACKWARD,
        shape,
        *logits,
        targets,
        losses,
        total,
    )
}

fn run(
    kernels: &Kernels,
    by_storage: ByStorage,
    shape: LossShape,
    logits: Operand,
    targets: Operand,
    losses: OperandMut,
    total: OperandMut,
) -> Result<(), LaunchError> {
    let kernel = by_storage.of("logits", logits.element())?;
    let n = targets.len();
    targets.check("targets", Element::U32, n)?;
    logits.check("logits", logits.element(), n * u64::from(shape.vocab))?;
    losses.check("losses", Element::F32, n)?;
    total.check("total", Element::F32, 1)?;
    logits.check_aligned("logits", 16)?;
    let grid = blocks("targets", n, 1, GRID_X)?;
    if grid == 0 {
        return Ok(());
    }
    let block = (CROSS_ENTROPY_THREADS, 1, 1);
    // SAFETY: the kernels' parameters in order; every length was checked, and targets by the kernel.
    unsafe {
        launch!(
            kernels,
            kernel,
            (grid, 1, 1),
            block,
            logits.address(),
            targets.address(),
            losses.address(),
            shape,
        );
        launch!(
            kernels,
            &modules::CROSS_ENTROPY_SUM,
            (1, 1, 1),
            block,
            losses.address(),
            total.address(),
            grid,
        );
    }
    Ok(())
}
