//! Gradients of a linear layer's own parameters. Launches `weight_f32.cu`, `weight_16bit.cu` and `bias.cu`.

use crate::abi::{ColumnSumShape, MatmulShape};
use crate::gemm::{ByTile, are_aligned, by_tile};
use crate::launch::{check_row, launch};
use crate::matmul::in_f32;
use crate::modules;
use crate::{Element, Kernels, LaunchError, Operand, OperandMut, column_sum};
use cudarc::driver::PushKernelArg;

const WEIGHT: ByTile = by_tile!(
    WEIGHT_GRADIENT_F16_LARGE,
    WEIGHT_GRADIENT_F16_SMALL,
    WEIGHT_GRADIENT_F16_UNALIGNED,
    WEIGHT_GRADIENT_BF16_LARGE,
    WEIGHT_GRADIENT_BF16_SMALL,
    WEIGHT_GRADIENT_BF16_UNALIGNED,
);

/// `dw [out, in] f32 += dyᵀ·x`, with `dy [tokens, out]` and `x [tokens, in]` both f32, f16 or bf16.
///
/// # Errors
/// When a length or type does not fit, when the grid cannot cover `dw`, or when the driver refuses.
pub fn weight(
    kernels: &Kernels,
    tokens: u32,
    out_features: u32,
    in_features: u32,
    dy: Operand,
    x: Operand,
    dw: OperandMut,
) -> Result<(), LaunchError> {
    let extents = [tokens, out_features, in_features].map(u64::from);
    for (parameter, extent) in ["tokens", "out_features", "in_features"]
        .into_iter()
        .zip(extents)
    {
        check_row(parameter, extent)?;
    }
    let [depth, rows, cols] = extents;
    let element = dy.element();
    dy.check("dy", element, depth * rows)?;
    x.check("x", element, depth * cols)?;
    dw.check("dw", Element::F32, rows * cols)?;
    if dw.is_empty() || tokens == 0 {
        return Ok(());
    }
    let shape = MatmulShape {
        m: out_features,
        n: in_features,
        k: tokens,
    };
    let (function, config) = match element {
        Element::F32 => in_f32(kernels, &modules::WEIGHT_GRADIENT_F32, shape)?,
        _ => {
            let addresses = [dy.address(), x.address(), dw.address()];
            let aligned = are_aligned(&addresses, &[out_features, in_features]);
            WEIGHT.choose(kernels, "dy", element, out_features, in_features, aligned)?
        }
    };
    let (dy, x, dw) = (dy.address(), x.address(), dw.address());
    let mut launch = kernels.stream().launch_builder(&function);
    launch.arg(&dy).arg(&x).arg(&dw).arg(&shape);
    // SAFETY: the kernel's parameters in order, and every length was checked against the shape.
    unsafe { launch.launch(config) }?;
    Ok(())
}

/// `dbias [features] f32 += scaling·Σ dy` over the tokens, with `dy [tokens, features]` f32, f16 or bf16.
///
/// # Errors
/// When a length or type does not fit `shape`, `dy` does not start at a multiple of 16 bytes, or the driver refuses.
pub fn bias(
    kernels: &Kernels,
    shape: ColumnSumShape,
    dy: Operand,
    scaling: f32,
    dbias: OperandMut,
) -> Result<(), LaunchError> {
    let kernel = modules::BIAS_GRADIENT.of("dy", dy.element())?;
    let elements = u64::from(shape.tokens) * u64::from(shape.features);
    dy.check("dy", dy.element(), elements)?;
    dbias.check("dbias", Element::F32, shape.features.into())?;
    dy.check_aligned("dy", 16)?;
    if elements == 0 {
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
            scaling,
            dbias.address(),
            shape,
        );
    }
    Ok(())
}
