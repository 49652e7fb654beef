//! Rotary position embedding. Launches `rope.cu`.

use crate::abi::{ROPE_THREADS, RopeShape};
use crate::launch::{GRID_X, blocks, check_row, launch};
use crate::modules;
use crate::{Element, Kernels, LaunchError, Operand, OperandMut};

/// Turns `x [tokens, heads·head_dim]`, f32, f16 or bf16, in place by `positions [tokens]` u32, with
/// `cos, sin [table_rows, half]` f32; the pairs of a head are elements `i` and `i + half`. A position beyond the
/// tables ends the launch with a device fault.
///
/// # Errors
/// When `2·half` is more than `head_dim`, a length or type does not fit `shape`, `x`, `cos` or `sin` does not
/// start at a multiple of 16 bytes, or the driver refuses.
pub fn rope(
    kernels: &Kernels,
    shape: RopeShape,
    x: OperandMut,
    positions: Operand,
    cos: Operand,
    sin: Operand,
) -> Result<(), LaunchError> {
    let kernel = modules::ROPE.of("x", x.element())?;
    let [heads, head_dim, half, rows] =
        [shape.heads, shape.head_dim, shape.half, shape.table_rows].map(u64::from);
    if 2 * half > head_dim {
        return Err(LaunchError::Parameter {
            parameter: "half",
            found: half,
            expected: "it must be at most half of head_dim",
        });
    }
    check_row("heads times head_dim", heads * head_dim)?;
    positions.check("positions", Element::U32, positions.len())?;
    x.check("x", x.element(), positions.len() * heads * head_dim)?;
    cos.check("cos", Element::F32, rows * half)?;
    sin.check("sin", Element::F32, rows * half)?;
    for (name, tensor) in [("x", *x), ("cos", cos), ("sin", sin)] {
        tensor.check_aligned(name, 16)?;
    }
    let grid = blocks("positions", positions.len(), 1, GRID_X)?;
    if grid == 0 || heads * half == 0 {
        return Ok(());
    }
    // SAFETY: the kernel's parameters in order; every length was checked, and positions by the kernel.
    unsafe {
        launch!(
            kernels,
            kernel,
            (grid, 1, 1),
            (ROPE_THREADS, 1, 1),
            x.address(),
            positions.address(),
            cos.address(),
            sin.address(),
            shape,
        );
    }
    Ok(())
}
