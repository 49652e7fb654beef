use super::{Counting, Device, extents};
use anyhow::Result;
use fuselora_kernels::abi::EmbeddingShape;
use fuselora_kernels::embedding::{gather, scatter_add};

pub fn launch(device: &Device, kernel: &str, shape: Option<&[u64]>) -> Result<Option<Vec<u64>>> {
    by_storage!(kernel, run(device, shape))
}

/// Every row once, in order.
fn run<T: Counting>(
    operation: &str,
    device: &Device,
    shape: Option<&[u64]>,
) -> Result<Option<Vec<u64>>> {
    if !["gather", "scatter_add"].contains(&operation) {
        return Ok(None);
    }
    let [n, width] = extents(shape, [256, 2048])?;
    let ids: Vec<u32> = (0..u32::try_from(n)?).collect();
    let ids = device.stream.clone_htod(&ids)?;
    let (x, mut y) = (device.zeros::<T>(n * width)?, device.zeros::<T>(n * width)?);
    let shape = EmbeddingShape {
        rows: n.try_into()?,
        width: width.try_into()?,
    };
    let run = if operation == "gather" {
        gather
    } else {
        scatter_add
    };
    run(
        &device.kernels,
        shape,
        device.operand(&x),
        device.operand(&ids),
        device.operand_mut(&mut y),
    )?;
    Ok(Some(vec![n, width]))
}
