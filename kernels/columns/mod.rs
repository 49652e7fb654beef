//! Columns of a matrix. Launches `columns.cu`.

use crate::abi::{COLUMNS_THREADS, ColumnBlock};
use crate::launch::{GRID_X, blocks, check_row, launch};
use crate::modules;
use crate::{Element, Kernels, LaunchError, Operand, OperandMut};

/// Copies the block of columns `block` of `x [rows, from_columns]` into `y [rows, to_columns]`, both f32, f16 or bf16.
/// What is beside it in `y` stays.
///
/// # Errors
/// When a length or type does not fit `block`, the block reaches beyond a row, a tensor does not start at a
/// multiple of 16 bytes, or the driver refuses.
pub fn copy(
    kernels: &Kernels,
    block: ColumnBlock,
    x: Operand,
    y: OperandMut,
) -> Result<(), LaunchError> {
    let kernel = modules::COPY_COLUMNS.of("x", x.element())?;
    let rows = u64::from(block.rows);
    let sides = [
        ("from_first", block.from_first, block.from_columns),
        ("to_first", block.to_first, block.to_columns),
    ];
    for (parameter, first, columns) in sides {
        check_row(parameter, columns.into())?;
        if u64::from(first) + u64::from(block.width) > u64::from(columns) {
            return Err(LaunchError::Parameter {
                parameter,
                found: first.into(),
                expected: "the block must end within the row",
            });
        }
    }
    x.check("x", x.element(), rows * u64::from(block.from_columns))?;
    y.check("y", x.element(), rows * u64::from(block.to_columns))?;
    x.check_aligned("x", 16)?;
    y.check_aligned("y", 16)?;
    let grid = (blocks("rows", rows, 1, GRID_X)?, 1, 1);
    if rows == 0 || block.width == 0 {
        return Ok(());
    }
    // SAFETY: the kernel's parameters in order; the block was checked to lie within both matrices.
    unsafe {
        launch!(
            kernels,
            kernel,
            grid,
            BLOCK,
            x.address(),
            y.address(),
            block
        );
    }
    Ok(())
}

/// `y [rows, n] = x [rows, columns]` at the columns `ids [n]` u32; `x` and `y` are both f32, f16 or bf16. An id that is
/// no column ends the launch with a device fault.
///
/// # Errors
/// When a length or type does not fit, or the driver refuses.
pub fn take(
    kernels: &Kernels,
    rows: u32,
    columns: u32,
    x: Operand,
    ids: Operand,
    y: OperandMut,
) -> Result<(), LaunchError> {
    let kernel = modules::TAKE_COLUMNS.of("x", x.element())?;
    check_row("columns", columns.into())?;
    check_row("ids", ids.len())?;
    x.check("x", x.element(), u64::from(rows) * u64::from(columns))?;
    ids.check("ids", Element::U32, ids.len())?;
    y.check("y", x.element(), u64::from(rows) * ids.len())?;
    let grid = (blocks("rows", rows.into(), 1, GRID_X)?, 1, 1);
    if y.is_empty() {
        return Ok(());
    }
    // SAFETY: as above, and ids are checked by the kernel.
    unsafe {
        launch!(
            kernels,
            kernel,
            grid,
            BLOCK,
            x.address(),
            ids.address(),
            y.address(),
            columns,
            ids.len() as u32,
        );
    }
    Ok(())
}

const BLOCK: (u32, u32, u32) = (COLUMNS_THREADS, 1, 1);
