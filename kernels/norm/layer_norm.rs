//! Launches `layer_norm.cu`.

use super::{by_column, by_token, check_activations, check_parameters, check_statistics};
use crate::abi::NormShape;
use crate::launch::launch;
use crate::modules;
use crate::{Kernels, LaunchError, Operand, OperandMut};

/// The statistics of each token, `[tokens]` f32.
#[derive(Debug, Clone, Copy)]
pub struct Statistics<'a> {
    /// The mean.
    pub mean: Operand<'a>,
    /// The inverse standard deviation.
    pub rstd: Operand<'a>,
}

/// `y = (x - mean) · rstd · weight + bias`, with `mean` and `rstd [tokens]` written too; `x, y [tokens, width]`.
///
/// # Errors
/// When a length or type does not fit `shape`, a tensor is misaligned, or the driver refuses.
#[expect(
    clippy::too_many_arguments,
    reason = "one input, three outputs, two parameters"
)]
pub fn forward(
    kernels: &Kernels,
    shape: NormShape,
    x: Operand,
    weight: Operand,
    bias: Operand,
    y: OperandMut,
    mean: OperandMut,
    rstd: OperandMut,
) -> Result<(), LaunchError> {
    let kernel = modules::LAYER_NORM_FORWARD.of("x", x.element())?;
    check_activations(shape, &[("x", &x), ("y", &y)])?;
    check_parameters(shape, &[("weight", &weight), ("bias", &bias)])?;
    check_statistics(shape, &[("mean", &mean), ("rstd", &rstd)])?;
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
            bias.address(),
            y.address(),
            mean.address(),
            rstd.address(),
            shape,
        );
    }
    Ok(())
}

/// `y` again from `x` and the statistics of [`forward`].
///
/// # Errors
/// As [`forward`].
pub fn recompute(
    kernels: &Kernels,
    shape: NormShape,
    x: Operand,
    statistics: Statistics,
    weight: Operand,
    bias: Operand,
    y: OperandMut,
) -> Result<(), LaunchError> {
    let kernel = modules::LAYER_NORM_RECOMPUTE.of("x", x.element())?;
    check_activations(shape, &[("x", &x), ("y", &y)])?;
    check_parameters(shape, &[("weight", &weight), ("bias", &bias)])?;
    statistics.check(shape)?;
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
            statistics.mean.address(),
            statistics.rstd.address(),
            weight.address(),
            bias.address(),
            y.address(),
            shape,
        );
    }
    Ok(())
}

/// `dx += rstd · (g - mean(g) - n · mean(g·n))` with `g = dy·weight` and `n = (x - mean)·rstd`;
/// `dy, x, dx [tokens, width]`.
///
/// # Errors
/// As [`forward`].
pub fn backward(
    kernels: &Kernels,
    shape: NormShape,
    dy: Operand,
    x: Operand,
    statistics: Statistics,
    weight: Operand,
    dx: OperandMut,
) -> Result<(), LaunchError> {
    let kernel = modules::LAYER_NORM_BACKWARD.of("x", x.element())?;
    check_activations(shape, &[("x", &x), ("dy", &dy), ("dx", &dx)])?;
    check_parameters(shape, &[("weight", &weight)])?;
    statistics.check(shape)?;
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
            statistics.mean.address(),
            statistics.rstd.address(),
            weight.address(),
            dx.address(),
            shape,
        );
    }
    Ok(())
}

/// `dweight [width] += Σ dy·n` and `dbias [width] += Σ dy` over the tokens.
///
/// # Errors
/// As [`forward`].
pub fn gradients(
    kernels: &Kernels,
    shape: NormShape,
    dy: Operand,
    x: Operand,
    statistics: Statistics,
    dweight: OperandMut,
    dbias: OperandMut,
) -> Result<(), LaunchError> {
    let kernel = modules::LAYER_NORM_GRADIENTS.of("x", x.element())?;
    check_activations(shape, &[("x", &x), ("dy", &dy)])?;
    check_parameters(shape, &[("dweight", &dweight), ("dbias", &dbias)])?;
    statistics.check(shape)?;
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
            statistics.mean.address(),
            statistics.rstd.address(),
            dweight.address(),
            dbias.address(),
            shape,
        );
    }
    Ok(())
}

impl Statistics<'_> {
    fn check(&self, shape: NormShape) -> Result<(), LaunchError> {
        check_statistics(shape, &[("mean", &self.mean), ("rstd", &self.rstd)])
    }
}
