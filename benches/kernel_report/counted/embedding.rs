use super::{Counting, Device, extents};
use anyhow::Result;
use fuselora_kernels::abi::EmbeddingShape;
use fuselora_kernels::embedding::{gather, gather_transposed, scatter_add, scatter_add_transposed};

pub fn launch(device: &Device, kernel: &str, shape: Option<&[u64]>) -> Result<Option<Vec<u64>>> {
    match kernel {
        "gather_transposed" | "scatter_add_transposed" => run::<f32>(kernel, device, shape),
        _ => by_storage!(kernel, run(device, shape)),
    }
}

/// Every row once, in order.
fn run<T: Counting>(
    operation: &str,
    device: &Device,
    shape: Option<&[u64]>,
) -> Result<Option<Vec<u64>>> {
    let run = match operation {
        "gather" => gather,
        "gather_transposed" => gather_transposed,
        "scatter_add" => scatter_add,
        "scatter_add_transposed" => scatter_add_transposed,
        _ => return Ok(None),
    };
    let [n, width] = extents(shape, [256, 2048])?;
    let ids: Vec<u32> = (0..u32::try_from(n)?).collect();
    let ids = device.stream.clone_htod(&ids)?;
    let (x, mut y) = (device.zeros::<T>(n * width)?, device.zeros::<T>(n * width)?);
    let shape = EmbeddingShape {
        rows: n.try_into()?,
        width: width.try_into()?,
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
