use super::{Counting, Device, extents};
use anyhow::Result;
use fuselora_kernels::abi::MatmulShape;
use fuselora_kernels::matmul::{Layout, matmul};
use half::{bf16, f16};

pub fn launch(device: &Device, kernel: &str, shape: Option<&[u64]>) -> Result<Option<Vec<u64>>> {
    let Some((storage, rest)) = kernel
        .strip_prefix("matmul_")
        .and_then(|operation| operation.split_once('_'))
    else {
        return Ok(None);
    };
    let (layout, tile) = rest.split_once('_').unwrap_or((rest, ""));
    let layout = match layout {
        "nn" => Layout::Nn,
        "nt" => Layout::Nt,
        _ => Layout::Tn,
    };
    // Few tiles get the smaller ones.
    let own = match tile {
        "large" => [1024, 3072, 256],
        "unaligned" => [256, 250, 250],
        _ => [256, 256, 256],
    };
    let shape = extents(shape, own)?;
    match storage {
        "f32" => run::<f32>(device, layout, shape)?,
        "f16" => run::<f16>(device, layout, shape)?,
        _ => run::<bf16>(device, layout, shape)?,
    }
    Ok(Some(shape.to_vec()))
}

fn run<T: Counting>(device: &Device, layout: Layout, [m, n, k]: [u64; 3]) -> Result<()> {
    let (a, b) = (device.zeros::<T>(m * k)?, device.zeros::<T>(k * n)?);
    let mut c = device.zeros::<T>(m * n)?;
    let shape = MatmulShape {
        m: m.try_into()?,
        n: n.try_into()?,
        k: k.try_into()?,
    };
    matmul(
        &device.kernels,
        layout,
        shape,
        device.operand(&a),
        device.operand(&b),
        device.operand_mut(&mut c),
    )?;
    Ok(())
}
