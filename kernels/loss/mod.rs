//! Cross-entropy. Launches `cross_entropy.cu`.

use crate::abi::CROSS_ENTROPY_THREADS;
use crate::launch::{GRID_X, blocks, check_row, launch};
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
    let kernel = modules::CROSS_ENTROPY_FORWARD.of("logits", logits.element())?;
    let Some(grid) = grid(vocab, logits, targets, *losses, *total)? else {
        return Ok(());
    };
    // SAFETY: the kernel's parameters in order; every length was checked, and targets by the kernel.
    unsafe {
        launch!(
            kernels,
            kernel,
            (grid, 1, 1),
            BLOCK,
            logits.address(),
            targets.address(),
            losses.address(),
            vocab,
        );
    }
    sum(kernels, losses, total, grid)
}

/// [`cross_entropy_forward`], and `logits` are overwritten by their gradient
/// `(softmax(logits) - onehot(target))·grad_scale`, with `grad_scale [1]` f32.
///
/// # Errors
/// As [`cross_entropy_forward`].
pub fn cross_entropy_backward(
    kernels: &Kernels,
    vocab: u32,
    logits: OperandMut,
    targets: Operand,
    grad_scale: Operand,
    losses: OperandMut,
    total: OperandMut,
) -> Result<(), LaunchError> {
    let kernel = modules::CROSS_ENTROPY_BACKWARD.of("logits", logits.element())?;
    grad_scale.check("grad_scale", Element::F32, 1)?;
    let Some(grid) = grid(vocab, *logits, targets, *losses, *total)? else {
        return Ok(());
    };
    // SAFETY: as above.
    unsafe {
        launch!(
            kernels,
            kernel,
            (grid, 1, 1),
            BLOCK,
            logits.address(),
            targets.address(),
            losses.address(),
            grad_scale.address(),
            vocab,
        );
    }
    sum(kernels, losses, total, grid)
}

const BLOCK: (u32, u32, u32) = (CROSS_ENTROPY_THREADS, 1, 1);

/// The blocks of a launch for checked operands; nothing where there is no target.
fn grid(
    vocab: u32,
    logits: Operand,
    targets: Operand,
    losses: Operand,
    total: Operand,
) -> Result<Option<u32>, LaunchError> {
    let n = targets.len();
    check_row("vocab", vocab.into())?;
    targets.check("targets", Element::U32, n)?;
    logits.check("logits", logits.element(), n * u64::from(vocab))?;
    losses.check("losses", Element::F32, n)?;
    total.check("total", Element::F32, 1)?;
    logits.check_aligned("logits", 16)?;
    let grid = blocks("targets", n, 1, GRID_X)?;
    Ok((grid > 0).then_some(grid))
}

/// Adds the sum of `n` losses to `total`.
fn sum(
    kernels: &Kernels,
    losses: OperandMut,
    total: OperandMut,
    n: u32,
) -> Result<(), LaunchError> {
    // SAFETY: the kernel's parameters in order; the lengths were checked.
    unsafe {
        launch!(
            kernels,
            &modules::CROSS_ENTROPY_SUM,
            (1, 1, 1),
            BLOCK,
            losses.address(),
            total.address(),
            n,
        );
    }
    Ok(())
}
