//! Launches `rms_norm.cu`.

use super::{by_column, by_token, check_activations, check_parameters, check_statistics};
use crate::abi::NormShape;
use crate::launch::launch;
use crate::modules;
use crate::{Kernels, LaunchError, Operand, OperandMut};

/// `y = x · rstd · weight` with `rstd [tokens] = 1/√(mean(x²) + eps)`; `x, y [tokens, width]`.
///
/// # Errors
/// When a length or type does not fit `shape`, a tensor is misaligned, or the driver refuses.
pub fn forward(
    kernels: &Kernels,
    shape: NormShape,
    x: Operand,
    weight: Operand,
    y: OperandMut,
    rstd: OperandMut,
) -> Result<(), LaunchError> {
    let kernel = modules::RMS_NORM_FORWARD.of("x", x.element())?;
    check_activations(shape, &[("x", &x), ("y", &y)])?;
    check_parameters(shape, &[("weight", &weight)])?;
    check_statistics(shape, &[("rstd", &rstd)])?;
    let Some((grid, block)) = by_token(shape)? else {
        return Ok(());
    };
    // SAFETY: the kernel's parameters in order; every length was checked against the shape.
    unsafe {
        launch!(
            kernels,
            kernel,
            grid,
            block,
            x.address(),
            weight.address(),
            y.address(),
            rstd.address(),
            shape,
        );
    }
    Ok(())
}

/// [`forward`] of `sum = residual + delta`, which is written too.
///
/// # Errors
/// As [`forward`].
#[expect(
    clippy::too_many_arguments,
    reason = "two inputs, three outputs, one parameter"
)]
pub fn forward_add(
    kernels: &Kernels,
    shape: NormShape,
    residual: Operand,
    delta: Operand,
    sum: OperandMut,
    weight: Operand,
    y: OperandMut,
    rstd: OperandMut,
) -> Result<(), LaunchError> {
    let kernel = modules::RMS_NORM_FORWARD_ADD.of("residual", residual.element())?;
    check_activations(
        shape,
        &[
            ("residual", &residual),
            ("delta", &delta),
            ("sum", &sum),
            ("y", &y),
        ],
    )?;
    check_parameters(shape, &[("weight", &weight)])?;
    check_statistics(shape, &[("rstd", &rstd)])?;
    let Some((grid, block)) = by_token(shape)? else {
        return Ok(());
    };
    // SAFETY: as above.
    unsafe {
        launch!(
            kernels,
            kernel,
            grid,
            block,
            residual.address(),
            delta.address(),
            sum.address(),
            weight.address(),
            y.address(),
            rstd.address(),
            shape,
        );
    }
    Ok(())
}

/// `y` again from `x` and the `rstd` of [`forward`].
///
/// # Errors
/// As [`forward`].
pub fn recompute(
    kernels: &Kernels,
    shape: NormShape,
    x: Operand,
    rstd: Operand,
    weight: Operand,
    y: OperandMut,
) -> Result<(), LaunchError> {
    let kernel = modules::RMS_NORM_RECOMPUTE.of("x", x.element())?;
    check_activations(shape, &[("x", &x), ("y", &y)])?;
    check_parameters(shape, &[("weight", &weight)])?;
    check_statistics(shape, &[("rstd", &rstd)])?;
    let Some((grid, block)) = by_token(shape)? else {
        return Ok(());
    };
    // SAFETY: as above.
    unsafe {
        launch!(
            kernels,
            kernel,
            grid,
            block,
            x.address(),
            rstd.address(),
            weight.address(),
            y.address(),
            shape,
        );
    }
    Ok(())
}

/// `dx += rstd · (g - x · rstd² · mean(g·x))` with `g = dy·weight`; `dy, x, dx [tokens, width]`.
///
/// # Errors
/// As [`forward`].
pub fn backward(
    kernels: &Kernels,
    shape: NormShape,
    dy: Operand,
    x: Operand,
    rstd: Operand,
    weight: Operand,
    dx: OperandMut,
) -> Result<(), LaunchError> {
    let kernel = modules::RMS_NORM_BACKWARD.of("x", x.element())?;
    check_activations(shape, &[("x", &x), ("dy", &dy), ("dx", &dx)])?;
    check_parameters(shape, &[("weight", &weight)])?;
    check_statistics(shape, &[("rstd", &rstd)])?;
    let Some((grid, block)) = by_token(shape)? else {
        return Ok(());
    };
    // SAFETY: as above.
    unsafe {
        launch!(
            kernels,
            kernel,
            grid,
            block,
            dy.address(),
            x.address(),
            rstd.address(),
            weight.address(),
            dx.address(),
            shape,
        );
    }
    Ok(())
}

/// `dweight [width] += Σ dy · x · rstd` over the tokens.
///
/// # Errors
/// As [`forward`].
pub fn dweight(
    kernels: &Kernels,
    shape: NormShape,
    dy: Operand,
    x: Operand,
    rstd: Operand,
    dweight: OperandMut,
) -> Result<(), LaunchError> {
    let kernel = modules::RMS_NORM_DWEIGHT.of("x", x.element())?;
    check_activations(shape, &[("x", &x), ("dy", &dy)])?;
    check_parameters(shape, &[("dweight", &dweight)])?;
    check_statistics(shape, &[("rstd", &rstd)])?;
    let Some((grid, block)) = by_column(shape)? else {
        return Ok(());
    };
    // SAFETY: as above.
    unsafe {
        launch!(
            kernels,
            kernel,
            grid,
            block,
            dy.address(),
            x.address(),
            rstd.address(),
            dweight.address(),
            shape,
        );
    }
    Ok(())
}
