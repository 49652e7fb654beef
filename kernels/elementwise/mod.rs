//! Element-wise operations on whole tensors. Launches `elementwise.cu`.

use crate::abi::ELEMENTWISE_THREADS;
use crate::launch::{GRID_X, blocks, launch};
use crate::modules::{self, Kernel};
use crate::{Element, Kernels, LaunchError, Operand, OperandMut};

/// `y [elements] = x [elements]`, rounded to nearest even, between two different types of f32, f16 and bf16.
///
/// # Errors
/// When the lengths differ, a type is none of these or both are the same, a tensor does not start at a
/// multiple of 16 bytes, or the driver refuses.
pub fn cast(kernels: &Kernels, x: Operand, y: OperandMut) -> Result<(), LaunchError> {
    use Element::{Bf16, F16, F32};
    let kernel = match (x.element(), y.element()) {
        (F32, F16) => &modules::CAST_F32_F16,
        (F32, Bf16) => &modules::CAST_F32_BF16,
        (F16, F32) => &modules::CAST_F16_F32,
        (F16, Bf16) => &modules::CAST_F16_BF16,
        (Bf16, F32) => &modules::CAST_BF16_F32,
        (Bf16, F16) => &modules::CAST_BF16_F16,
        (found, _) => {
            return Err(LaunchError::Element {
                tensor: "y",
                expected: if found == F32 { Bf16 } else { F32 },
                found: y.element(),
            });
        }
    };
    x.check("x", x.element(), y.len())?;
    let wider = x.element().size_in_bytes().max(y.element().size_in_bytes());
    let Some(grid) = grid("x", &x, wider)? else {
        return Ok(());
    };
    y.check_aligned("y", 16)?;
    // SAFETY: the kernel's parameters in order; both buffers hold as many elements.
    unsafe {
        launch!(
            kernels,
            kernel,
            grid,
            BLOCK,
            x.address(),
            y.address(),
            x.len()
        );
    }
    Ok(())
}

/// `y [elements] += x [elements]`, f32, f16 or bf16.
///
/// # Errors
/// As [`cast`].
pub fn add_assign(kernels: &Kernels, x: Operand, y: OperandMut) -> Result<(), LaunchError> {
    let kernel = modules::ADD_ASSIGN.of("y", y.element())?;
    launch_two(kernels, kernel, x, y)
}

/// `y [elements] -= x [elements]`, f32, f16 or bf16.
///
/// # Errors
/// As [`cast`].
pub fn subtract_assign(kernels: &Kernels, x: Operand, y: OperandMut) -> Result<(), LaunchError> {
    let kernel = modules::SUBTRACT_ASSIGN.of("y", y.element())?;
    launch_two(kernels, kernel, x, y)
}

/// A kernel of `x` and `y`, alike.
fn launch_two(
    kernels: &Kernels,
    kernel: &'static Kernel,
    x: Operand,
    y: OperandMut,
) -> Result<(), LaunchError> {
    x.check("x", y.element(), y.len())?;
    let Some(grid) = grid("y", &y, y.element().size_in_bytes())? else {
        return Ok(());
    };
    x.check_aligned("x", 16)?;
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

/// `x [elements] *= factor`, f32, f16 or bf16.
///
/// # Errors
/// As [`cast`].
pub fn scale(kernels: &Kernels, x: OperandMut, factor: f32) -> Result<(), LaunchError> {
    let kernel = modules::SCALE.of("x", x.element())?;
    let Some(grid) = grid("x", &x, x.element().size_in_bytes())? else {
        return Ok(());
    };
    // SAFETY: as above.
    unsafe {
        launch!(kernels, kernel, grid, BLOCK, x.address(), factor, x.len());
    }
    Ok(())
}

/// Lowers `first [1]` u32 to the index of the first NaN or infinite element of `x [elements]`, f32, f16 or
/// bf16. Put `u32::MAX` there first: what is left of it says that every element is finite. An index of
/// 2^32 - 2 stands for all larger ones too.
///
/// # Errors
/// As [`cast`].
pub fn find_nonfinite(kernels: &Kernels, x: Operand, first: OperandMut) -> Result<(), LaunchError> {
    let kernel = modules::FIND_NONFINITE.of("x", x.element())?;
    first.check("first", Element::U32, 1)?;
    let Some(grid) = grid("x", &x, x.element().size_in_bytes())? else {
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
            first.address(),
            x.len()
        );
    }
    Ok(())
}

const BLOCK: (u32, u32, u32) = (ELEMENTWISE_THREADS, 1, 1);

/// The grid for `x`, with 16 bytes of elements of `size` bytes per thread; `None` where there are none.
fn grid(
    tensor: &'static str,
    x: &Operand,
    size: u64,
) -> Result<Option<(u32, u32, u32)>, LaunchError> {
    x.check_aligned(tensor, 16)?;
    let per_block = u64::from(ELEMENTWISE_THREADS) * (16 / size);
    let blocks = blocks(tensor, x.len(), per_block, GRID_X)?;
    Ok((blocks > 0).then_some((blocks, 1, 1)))
}
