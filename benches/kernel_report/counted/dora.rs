use super::{Counting, Device, extents};
use anyhow::Result;
use fuselora_kernels::abi::{ColumnSumShape, DoraWeight};
use fuselora_kernels::dora::{backward, forward, gain, scale_rows, weight_norm};

pub fn launch(device: &Device, kernel: &str, shape: Option<&[u64]>) -> Result<Option<Vec<u64>>> {
    if kernel == "dora_gain" {
        let [features] = extents(shape, [2048])?;
        let vector = || device.zeros::<f32>(features);
        let (magnitude, norm, mut out) = (vector()?, vector()?, vector()?);
        gain(
            &device.kernels,
            device.operand(&magnitude),
            device.operand(&norm),
            device.operand_mut(&mut out),
        )?;
        return Ok(Some(vec![features]));
    }
    if kernel == "dora_scale_rows" {
        let [rows, in_features] = extents(shape, [256, 2048])?;
        let mut weight = device.zeros::<f32>(rows * in_features)?;
        let gain = device.zeros::<f32>(rows)?;
        scale_rows(
            &device.kernels,
            in_features.try_into()?,
            device.operand_mut(&mut weight),
            device.operand(&gain),
        )?;
        return Ok(Some(vec![rows, in_features]));
    }
    by_storage!(kernel, run(device, shape))
}

fn run<T: Counting>(
    operation: &str,
    device: &Device,
    shape: Option<&[u64]>,
) -> Result<Option<Vec<u64>>> {
    match operation {
        "dora_weight_norm" => run_norm::<T>(device, shape),
        "dora_forward" | "dora_backward" => run_magnitude::<T>(operation, device, shape),
        _ => Ok(None),
    }
}

fn run_norm<T: Counting>(device: &Device, shape: Option<&[u64]>) -> Result<Option<Vec<u64>>> {
    let [rows, in_features, rank] = extents(shape, [256, 2048, 16])?;
    let w = device.zeros::<T>(rows * in_features)?;
    let (a, b) = (
        device.zeros::<f32>(rank * in_features)?,
        device.zeros::<f32>(rows * rank)?,
    );
    let mut norm = device.zeros::<f32>(rows)?;
    let shape = DoraWeight {
        first_row: 0,
        rows: rows.try_into()?,
        in_features: in_features.try_into()?,
        rank: rank.try_into()?,
        scaling: 2.0,
    };
    weight_norm(
        &device.kernels,
        shape,
        device.operand(&w),
        device.operand(&a),
        device.operand(&b),
        device.operand_mut(&mut norm),
    )?;
    Ok(Some(vec![rows, in_features, rank]))
}

fn run_magnitude<T: Counting>(
    operation: &str,
    device: &Device,
    shape: Option<&[u64]>,
) -> Result<Option<Vec<u64>>> {
    let [tokens, features] = extents(shape, [256, 2048])?;
    let activations = || device.zeros::<T>(tokens * features);
    let (dy, z, mut y) = (activations()?, activations()?, activations()?);
    let vector = || device.zeros::<f32>(features);
    let (gain, norm, mut dmagnitude) = (vector()?, vector()?, vector()?);
    let shape = ColumnSumShape {
        tokens: tokens.try_into()?,
        features: features.try_into()?,
    };
    let (z, gain) = (device.operand(&z), device.operand(&gain));
    let y = device.operand_mut(&mut y);
    if operation == "dora_forward" {
        forward(&device.kernels, shape, z, gain, None, y)?;
    } else {
        backward(
            &device.kernels,
            shape,
            device.operand(&dy),
            z,
            gain,
            device.operand(&norm),
            y,
            device.operand_mut(&mut dmagnitude),
        )?;
    }
    Ok(Some(vec![tokens, features]))
}
