use super::{Counting, Device, extents};
use anyhow::Result;
use fuselora_kernels::abi::ColumnBlock;
use fuselora_kernels::columns::{copy, take};

pub fn launch(device: &Device, kernel: &str, shape: Option<&[u64]>) -> Result<Option<Vec<u64>>> {
    by_storage!(kernel, run(device, shape))
}

/// The first of two equal blocks, or every column in order.
fn run<T: Counting>(
    operation: &str,
    device: &Device,
    shape: Option<&[u64]>,
) -> Result<Option<Vec<u64>>> {
    if !["copy_columns", "take_columns"].contains(&operation) {
        return Ok(None);
    }
    let [rows, width] = extents(shape, [256, 2048])?;
    let x = device.zeros::<T>(2 * rows * width)?;
    let mut y = device.zeros::<T>(rows * width)?;
    if operation == "copy_columns" {
        let width = width.try_into()?;
        let block = ColumnBlock {
            rows: rows.try_into()?,
            width,
            from_columns: 2 * width,
            from_first: 0,
            to_columns: width,
            to_first: 0,
        };
        copy(
            &device.kernels,
            block,
            device.operand(&x),
            device.operand_mut(&mut y),
        )?;
    } else {
        let ids: Vec<u32> = (0..u32::try_from(width)?).collect();
        let ids = device.upload(&ids)?;
        take(
            &device.kernels,
            rows.try_into()?,
            (2 * width).try_into()?,
            device.operand(&x),
            device.operand(&ids),
            device.operand_mut(&mut y),
        )?;
    }
    Ok(Some(vec![rows, width]))
}
