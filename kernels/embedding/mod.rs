//! Rows by index. Launches `embedding.cu`.

use crate::abi::{EMBEDDING_THREADS, EmbeddingShape};
use crate::launch::{GRID_X, GRID_YZ, blocks, check_row, launch};
use crate::modules::{self, Kernel};
use crate::{Element, Kernels, LaunchError, Operand, OperandMut};

/// `y [n, width] = table [rows, width]` at the rows `ids [n]` u32; `table` and `y` are both f32, f16 or bf16.
/// An id that is no row ends the launch with a device fault.
///
/// # Errors
/// When a length or type does not fit `shape`, a tensor does not start at a multiple of 16 bytes, or the driver
/// refuses.
pub fn gather(
    kernels: &Kernels,
    shape: EmbeddingShape,
    table: Operand,
    ids: Operand,
    y: OperandMut,
) -> Result<(), LaunchError> {
    let kernel = modules::GATHER.of("table", table.element())?;
    launch_gather(kernels, kernel, shape, table, ids, y)
}

/// [`gather`] from a table that is held transposed, `[width, rows]` f32.
///
/// # Errors
/// As [`gather`].
pub fn gather_transposed(
    kernels: &Kernels,
    shape: EmbeddingShape,
    table: Operand,
    ids: Operand,
    y: OperandMut,
) -> Result<(), LaunchError> {
    table.check("table", Element::F32, table.len())?;
    let kernel = &modules::GATHER_TRANSPOSED;
    launch_gather(kernels, kernel, shape, table, ids, y)
}

fn launch_gather(
    kernels: &Kernels,
    kernel: &'static Kernel,
    shape: EmbeddingShape,
    table: Operand,
    ids: Operand,
    y: OperandMut,
) -> Result<(), LaunchError> {
    let Some(grid) = grid(shape, table, ids, &y, "y")? else {
        return Ok(());
    };
    // SAFETY: the kernel's parameters in order; every length was checked, and ids are checked by the kernel.
    unsafe {
        launch!(
            kernels,
            kernel,
            grid,
            BLOCK,
            table.address(),
            ids.address(),
            y.address(),
            shape
        );
    }
    Ok(())
}

/// `dx [rows, width]` at the rows `ids [n]` u32 `+= dy [n, width]`; rows of the same id are added in order.
///
/// # Errors
/// As [`gather`].
pub fn scatter_add(
    kernels: &Kernels,
    shape: EmbeddingShape,
    dy: Operand,
    ids: Operand,
    dx: OperandMut,
) -> Result<(), LaunchError> {
    let kernel = modules::SCATTER_ADD.of("dx", dx.element())?;
    let vector = 16 / dx.element().size_in_bytes();
    let run = match u64::from(shape.width).is_multiple_of(vector) {
        true => vector,
        false => 1,
    };
    launch_scatter(kernels, kernel, run, shape, dy, ids, dx)
}

/// [`scatter_add`] to a table that is held transposed, `[width, rows]` f32.
///
/// # Errors
/// As [`gather`].
pub fn scatter_add_transposed(
    kernels: &Kernels,
    shape: EmbeddingShape,
    dy: Operand,
    ids: Operand,
    dx: OperandMut,
) -> Result<(), LaunchError> {
    dx.check("dx", Element::F32, dx.len())?;
    let kernel = &modules::SCATTER_ADD_TRANSPOSED;
    launch_scatter(kernels, kernel, 1, shape, dy, ids, dx)
}

/// With `run` columns per thread.
fn launch_scatter(
    kernels: &Kernels,
    kernel: &'static Kernel,
    run: u64,
    shape: EmbeddingShape,
    dy: Operand,
    ids: Operand,
    dx: OperandMut,
) -> Result<(), LaunchError> {
    let Some((n, ..)) = grid(shape, *dx, ids, &dy, "dy")? else {
        return Ok(());
    };
    let columns = blocks(
        "width",
        shape.width.into(),
        run * u64::from(EMBEDDING_THREADS),
        GRID_YZ,
    )?;
    // SAFETY: as above.
    unsafe {
        launch!(
            kernels,
            kernel,
            (n, columns, 1),
            BLOCK,
            dy.address(),
            ids.address(),
            dx.address(),
            shape,
            n
        );
    }
    Ok(())
}

const BLOCK: (u32, u32, u32) = (EMBEDDING_THREADS, 1, 1);

/// One block per id; `None` where there is nothing to do.
fn grid(
    shape: EmbeddingShape,
    table: Operand,
    ids: Operand,
    rows: &Operand,
    rows_name: &'static str,
) -> Result<Option<(u32, u32, u32)>, LaunchError> {
    let width = u64::from(shape.width);
    check_row("width", width)?;
    table.check("table", table.element(), u64::from(shape.rows) * width)?;
    ids.check("ids", Element::U32, ids.len())?;
    rows.check(rows_name, table.element(), ids.len() * width)?;
    table.check_aligned("table", 16)?;
    rows.check_aligned(rows_name, 16)?;
    let blocks = blocks("ids", ids.len(), 1, GRID_X)?;
    Ok((blocks > 0 && width > 0).then_some((blocks, 1, 1)))
}
