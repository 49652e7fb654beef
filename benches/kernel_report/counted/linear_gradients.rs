use super::{Counting, Device, extents};
use anyhow::Result;
use fuselora_kernels::abi::ColumnSumShape;
use fuselora_kernels::linear_gradients::{bias, weight};
use half::{bf16, f16};

pub fn launch(device: &Device, kernel: &str, shape: Option<&[u64]>) -> Result<Option<Vec<u64>>> {
    let Some(rest) = kernel.strip_prefix("weight_gradient_") else {
        return by_storage!(kernel, run_bias(device, shape));
    };
    let (storage, tile) = rest.split_once('_').unwrap_or((rest, ""));
    // Few tiles get the smaller ones.
    let own = match tile {
        "large" => [256, 1024, 3072],
        "unaligned" => [256, 250, 250],
        _ => [256, 256, 256],
    };
    let shape = extents(shape, own)?;
    match storage {
        "f32" => run_weight::<f32>(device, shape)?,
        "f16" => run_weight::<f16>(device, shape)?,
        _ => run_weight::<bf16>(device, shape)?,
    }
    Ok(Some(shape.to_vec()))
}

fn run_weight<T: Counting>(device: &Device, [tokens, out, features]: [u64; 3]) -> Result<()> {
    let (dy, x) = (
        device.zeros::<T>(tokens * out)?,
        device.zeros::<T>(tokens * features)?,
    );
    let mut dw = device.zeros::<f32>(out * features)?;
    weight(
        &device.kernels,
        tokens.try_into()?,
        out.try_into()?,
        features.try_into()?,
        device.operand(&dy),
        device.operand(&x),
        device.operand_mut(&mut dw),
    )?;
    Ok(())
}

fn run_bias<T: Counting>(
    operation: &str,
    device: &Device,
    shape: Option<&[u64]>,
) -> Result<Option<Vec<u64>>> {
    if operation != "bias_gradient" {
        return Ok(None);
    }
    let [tokens, features] = extents(shape, [256, 2048])?;
    let dy = device.zeros::<T>(tokens * features)?;
    let mut dbias = device.zeros::<f32>(features)?;
    let shape = ColumnSumShape {
        tokens: tokens.try_into()?,
        features: features.try_into()?,
    };
    bias(
        &device.kernels,
        shape,
        device.operand(&dy),
        1.0,
        device.operand_mut(&mut dbias),
    )?;
    Ok(Some(vec![tokens, features]))
}
