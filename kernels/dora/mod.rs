//! Weight-decomposed low-rank adaptation. Launches `weight_norm.cu` and `magnitude.cu`.

use crate::abi::{ColumnSumShape, DORA_ROWS, DORA_THREADS, DoraWeight};
use crate::launch::{GRID_X, blocks, check_row, launch};
use crate::modules;
use crate::{Element, Kernels, LaunchError, Operand, OperandMut, column_sum};

/// The row norms of `W + scaling·B·A` into `norm [out_features]` f32, of the rows that `shape` chooses:
/// `weight [rows, in_features]` f32, f16 or bf16 holds these alone, `lora_a [rank, in_features]` and
/// `lora_b [out_features, rank]` are f32 and whole.
///
/// # Errors
/// When a length or type does not fit `shape`, a tensor does not start at a multiple of 16 bytes, or the driver
/// refuses.
pub fn weight_norm(
    kernels: &Kernels,
    shape: DoraWeight,
    weight: Operand,
    lora_a: Operand,
    lora_b: Operand,
    norm: OperandMut,
) -> Result<(), LaunchError> {
    let kernel = modules::DORA_WEIGHT_NORM.of("weight", weight.element())?;
    let [rows, in_features, rank] = [shape.rows, shape.in_features, shape.rank].map(u64::from);
    check_row("in_features", in_features)?;
    weight.check("weight", weight.element(), rows * in_features)?;
    lora_a.check("lora_a", Element::F32, rank * in_features)?;
    lora_b.check("lora_b", Element::F32, norm.len() * rank)?;
    norm.check("norm", Element::F32, norm.len())?;
    if u64::from(shape.first_row) + rows > norm.len() {
        return Err(LaunchError::Parameter {
            parameter: "first_row",
            found: shape.first_row.into(),
            expected: "the rows must end with the norms",
        });
    }
    weight.check_aligned("weight", 16)?;
    lora_a.check_aligned("lora_a", 16)?;
    let grid = (blocks("rows", rows, DORA_ROWS.into(), GRID_X)?, 1, 1);
    if rows == 0 {
        return Ok(());
    }
    // SAFETY: the kernel's parameters in order; every length was checked against the shape.
    unsafe {
        launch!(
            kernels,
            kernel,
            grid,
            BLOCK,
            weight.address(),
            lora_a.address(),
            lora_b.address(),
            norm.address(),
            shape,
        );
    }
    Ok(())
}

/// `gain = magnitude / norm`, all `[features]` f32.
///
/// # Errors
/// As [`weight_norm`].
pub fn gain(
    kernels: &Kernels,
    magnitude: Operand,
    norm: Operand,
    gain: OperandMut,
) -> Result<(), LaunchError> {
    let features = gain.len();
    check_row("features", features)?;
    for (name, vector) in [("magnitude", &magnitude), ("norm", &norm), ("gain", &gain)] {
        vector.check(name, Element::F32, features)?;
    }
    let grid = (
        blocks("features", features, DORA_THREADS.into(), GRID_X)?,
        1,
        1,
    );
    if features == 0 {
        return Ok(());
    }
    // SAFETY: as above.
    unsafe {
        launch!(
            kernels,
            &modules::DORA_GAIN,
            grid,
            BLOCK,
            magnitude.address(),
            norm.address(),
            gain.address(),
            features as u32,
        );
    }
    Ok(())
}

/// `weight[o][i] *= gain[o]`, with `weight [out_features, in_features]` and `gain [out_features]`, f32.
///
/// # Errors
/// As [`weight_norm`].
pub fn scale_rows(
    kernels: &Kernels,
    in_features: u32,
    weight: OperandMut,
    gain: Operand,
) -> Result<(), LaunchError> {
    check_row("in_features", in_features.into())?;
    gain.check("gain", Element::F32, gain.len())?;
    weight.check("weight", Element::F32, gain.len() * u64::from(in_features))?;
    weight.check_aligned("weight", 16)?;
    let grid = (blocks("out_features", gain.len(), 1, GRID_X)?, 1, 1);
    if weight.is_empty() {
        return Ok(());
    }
    // SAFETY: as above.
    unsafe {
        launch!(
            kernels,
            &modules::DORA_SCALE_ROWS,
            grid,
            BLOCK,
            weight.address(),
            gain.address(),
            in_features,
        );
    }
    Ok(())
}

/// `y = gain ∘ z + bias`; `z, y [tokens, features]` f32, f16 or bf16, `gain` and `bias [features]` f32.
///
/// # Errors
/// As [`weight_norm`].
pub fn forward(
    kernels: &Kernels,
    shape: ColumnSumShape,
    z: Operand,
    gain: Operand,
    bias: Option<Operand>,
    y: OperandMut,
) -> Result<(), LaunchError> {
    let kernel = modules::DORA_FORWARD.of("z", z.element())?;
    check_row("features", shape.features.into())?;
    check_activations(shape, &[("z", &z), ("y", &y)])?;
    check_vector(shape, "gain", &gain)?;
    if let Some(bias) = &bias {
        check_vector(shape, "bias", bias)?;
    }
    let grid = (blocks("tokens", shape.tokens.into(), 1, GRID_X)?, 1, 1);
    if y.is_empty() {
        return Ok(());
    }
    // SAFETY: as above.
    unsafe {
        launch!(
            kernels,
            kernel,
            grid,
            BLOCK,
            z.address(),
            gain.address(),
            bias.map_or(0, |bias| bias.address()),
            y.address(),
            shape.features,
        );
    }
    Ok(())
}

/// `dz = gain ∘ dy` and `dmagnitude += Σ dy·z / norm`, for [`forward`]'s `z` and `gain`.
///
/// # Errors
/// As [`weight_norm`].
#[expect(clippy::too_many_arguments, reason = "four inputs and two outputs")]
pub fn backward(
    kernels: &Kernels,
    shape: ColumnSumShape,
    dy: Operand,
    z: Operand,
    gain: Operand,
    norm: Operand,
    dz: OperandMut,
    dmagnitude: OperandMut,
) -> Result<(), LaunchError> {
    let kernel = modules::DORA_BACKWARD.of("dy", dy.element())?;
    check_activations(shape, &[("dy", &dy), ("z", &z), ("dz", &dz)])?;
    check_vector(shape, "gain", &gain)?;
    check_vector(shape, "norm", &norm)?;
    check_vector(shape, "dmagnitude", &dmagnitude)?;
    if dz.is_empty() {
        return Ok(());
    }
    let [grid, block] = column_sum::grid(shape)?;
    // SAFETY: as above.
    unsafe {
        launch!(
            kernels,
            kernel,
            grid,
            block,
            dy.address(),
            z.address(),
            gain.address(),
            norm.address(),
            dz.address(),
            dmagnitude.address(),
            shape,
        );
    }
    Ok(())
}

const BLOCK: (u32, u32, u32) = (DORA_THREADS, 1, 1);

/// Checks tensors `[tokens, features]`, all stored as the first.
fn check_activations(
    shape: ColumnSumShape,
    tensors: &[(&'static str, &Operand)],
) -> Result<(), LaunchError> {
    let elements = u64::from(shape.tokens) * u64::from(shape.features);
    let element = tensors[0].1.element();
    for (name, tensor) in tensors {
        tensor.check(name, element, elements)?;
        tensor.check_aligned(name, 16)?;
    }
    Ok(())
}

/// Checks a vector `[features]` f32.
fn check_vector(
    shape: ColumnSumShape,
    name: &'static str,
    vector: &Operand,
) -> Result<(), LaunchError> {
    vector.check(name, Element::F32, shape.features.into())?;
    vector.check_aligned(name, 16)
}
