//! RMSNorm and LayerNorm. Launches `rms_norm.cu` and `layer_norm.cu`.
//!
//! Activations are f32, f16 or bf16, all of a call the same; weights, biases, statistics and their gradients
//! are f32. Everything starts at a multiple of 16 bytes.

pub mod layer_norm;
pub mod rms_norm;

use crate::abi::{NORM_COLUMNS, NORM_MAX_THREADS, NORM_ROW_LANES, NormShape};
use crate::launch::{GRID_X, blocks, check_row};
use crate::{Element, LaunchError, Operand};

type Dim = (u32, u32, u32);

/// Checks `[tokens, width]` activations against the first of them.
fn check_activations(
    shape: NormShape,
    tensors: &[(&'static str, &Operand)],
) -> Result<(), LaunchError> {
    let elements = u64::from(shape.tokens) * u64::from(shape.width);
    check_row("width", shape.width.into())?;
    for &(name, tensor) in tensors {
        tensor.check(name, tensors[0].1.element(), elements)?;
        tensor.check_aligned(name, 16)?;
    }
    Ok(())
}

/// Checks `[width]` parameters.
fn check_parameters(
    shape: NormShape,
    tensors: &[(&'static str, &Operand)],
) -> Result<(), LaunchError> {
    for &(name, tensor) in tensors {
        tensor.check(name, Element::F32, u64::from(shape.width))?;
        tensor.check_aligned(name, 16)?;
    }
    Ok(())
}

/// Checks `[tokens]` statistics.
fn check_statistics(
    shape: NormShape,
    tensors: &[(&'static str, &Operand)],
) -> Result<(), LaunchError> {
    for &(name, tensor) in tensors {
        tensor.check(name, Element::F32, u64::from(shape.tokens))?;
    }
    Ok(())
}

/// A block per token, with as many warps as find four elements per thread; `None` where there is nothing to do.
fn by_token(shape: NormShape) -> Result<Option<(Dim, Dim)>, LaunchError> {
    let grid = blocks("tokens", u64::from(shape.tokens), 1, GRID_X)?;
    let threads = u64::from(shape.width / 4)
        .next_multiple_of(32)
        .clamp(32, u64::from(NORM_MAX_THREADS)) as u32;
    Ok((grid > 0 && shape.width > 0).then_some(((grid, 1, 1), (threads, 1, 1))))
}

/// A block per group of columns, for sums over tokens; `None` where there is nothing to do.
fn by_column(shape: NormShape) -> Result<Option<(Dim, Dim)>, LaunchError> {
    let grid = blocks(
        "width",
        u64::from(shape.width),
        u64::from(NORM_COLUMNS),
        GRID_X,
    )?;
    Ok((grid > 0 && shape.tokens > 0).then_some(((grid, 1, 1), (NORM_COLUMNS, NORM_ROW_LANES, 1))))
}
