//! Activations of the feed-forward block. Launches `activation.cu`.

use crate::abi::ACTIVATION_THREADS;
use crate::launch::{ByStorage, GRID_X, blocks, launch};
use crate::modules;
use crate::{Kernels, LaunchError, Operand, OperandMut};

/// Which of the two GELUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gelu {
    /// GPT-2's approximation by tanh.
    Tanh,
    /// The exact one, by the error function.
    Erf,
}

/// `act = silu(gate)·up`, all `[elements]` of one type: f32, f16 or bf16.
///
/// # Errors
/// When a length or type differs, a tensor does not start at a multiple of 16 bytes, or the driver refuses.
pub fn swiglu_forward(
    kernels: &Kernels,
    gate: Operand,
    up: Operand,
    act: OperandMut,
) -> Result<(), LaunchError> {
    let kernel = modules::SWIGLU_FORWARD.of("act", act.element())?;
    let Some(grid) = grid(&act, &[("gate", &gate), ("up", &up), ("act", &act)])? else {
        return Ok(());
    };
    // SAFETY: the kernel's parameters in order; all buffers hold as many elements.
    unsafe {
        launch!(
            kernels,
            kernel,
            grid,
            BLOCK,
            gate.address(),
            up.address(),
            act.address(),
            act.len()
        );
    }
    Ok(())
}

/// The gradients of [`swiglu_forward`] for `dact`, written over `gate` and `up`.
///
/// # Errors
/// As [`swiglu_forward`].
pub fn swiglu_backward(
    kernels: &Kernels,
    dact: Operand,
    gate: OperandMut,
    up: OperandMut,
) -> Result<(), LaunchError> {
    let kernel = modules::SWIGLU_BACKWARD.of("dact", dact.element())?;
    let Some(grid) = grid(&dact, &[("dact", &dact), ("gate", &gate), ("up", &up)])? else {
        return Ok(());
    };
    // SAFETY: as above.
    unsafe {
        launch!(
            kernels,
            kernel,
            grid,
            BLOCK,
            dact.address(),
            gate.address(),
            up.address(),
            dact.len()
        );
    }
    Ok(())
}

/// `y = gelu(x)`, both `[elements]` of one type: f32, f16 or bf16.
///
/// # Errors
/// As [`swiglu_forward`].
pub fn gelu_forward(
    kernels: &Kernels,
    gelu: Gelu,
    x: Operand,
    y: OperandMut,
) -> Result<(), LaunchError> {
    let kernel = gelu
        .of(modules::GELU_TANH_FORWARD, modules::GELU_ERF_FORWARD)
        .of("y", y.element())?;
    let Some(grid) = grid(&y, &[("x", &x), ("y", &y)])? else {
        return Ok(());
    };
    // SAFETY: as above.
    unsafe {
        launch!(
            kernels,
            kernel,
            grid,
            BLOCK,
            x.address(),
            y.address(),
            y.len()
        );
    }
    Ok(())
}

/// `dx = dy·gelu'(x)`, written over `dy`.
///
/// # Errors
/// As [`swiglu_forward`].
pub fn gelu_backward(
    kernels: &Kernels,
    gelu: Gelu,
    dy: OperandMut,
    x: Operand,
) -> Result<(), LaunchError> {
    let kernel = gelu
        .of(modules::GELU_TANH_BACKWARD, modules::GELU_ERF_BACKWARD)
        .of("dy", dy.element())?;
    let Some(grid) = grid(&dy, &[("dy", &dy), ("x", &x)])? else {
        return Ok(());
    };
    // SAFETY: as above.
    unsafe {
        launch!(
            kernels,
            kernel,
            grid,
            BLOCK,
            dy.address(),
            x.address(),
            dy.len()
        );
    }
    Ok(())
}

impl Gelu {
    fn of(self, tanh: ByStorage, erf: ByStorage) -> ByStorage {
        match self {
            Gelu::Tanh => tanh,
            Gelu::Erf => erf,
        }
    }
}

const BLOCK: (u32, u32, u32) = (ACTIVATION_THREADS, 1, 1);

/// Checks that all tensors are like `model`, and gives the grid; `None` where they are empty.
fn grid(
    model: &Operand,
    tensors: &[(&'static str, &Operand)],
) -> Result<Option<(u32, u32, u32)>, LaunchError> {
    for &(name, tensor) in tensors {
        tensor.check(name, model.element(), model.len())?;
        tensor.check_aligned(name, 16)?;
    }
    let per_block = u64::from(ACTIVATION_THREADS) * (16 / model.element().size_in_bytes());
    let blocks = blocks(tensors[0].0, model.len(), per_block, GRID_X)?;
    Ok((blocks > 0).then_some((blocks, 1, 1)))
}
