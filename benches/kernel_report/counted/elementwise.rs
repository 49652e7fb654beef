use super::{Counting, Device, extents};
use anyhow::Result;
use fuselora_kernels::elementwise::{add_assign, cast, find_nonfinite, scale, subtract_assign};
use half::{bf16, f16};

pub fn launch(device: &Device, kernel: &str, shape: Option<&[u64]>) -> Result<Option<Vec<u64>>> {
    match kernel.strip_prefix("cast_") {
        Some("f32_f16") => run_cast::<f32, f16>(device, shape),
        Some("f32_bf16") => run_cast::<f32, bf16>(device, shape),
        Some("f16_f32") => run_cast::<f16, f32>(device, shape),
        Some("f16_bf16") => run_cast::<f16, bf16>(device, shape),
        Some("bf16_f32") => run_cast::<bf16, f32>(device, shape),
        Some("bf16_f16") => run_cast::<bf16, f16>(device, shape),
        _ => by_storage!(kernel, run(device, shape)),
    }
}

fn run_cast<From: Counting, To: Counting>(
    device: &Device,
    shape: Option<&[u64]>,
) -> Result<Option<Vec<u64>>> {
    let [elements] = extents(shape, [1 << 20])?;
    let (x, mut y) = (
        device.zeros::<From>(elements)?,
        device.zeros::<To>(elements)?,
    );
    cast(
        &device.kernels,
        device.operand(&x),
        device.operand_mut(&mut y),
    )?;
    Ok(Some(vec![elements]))
}

fn run<T: Counting>(
    operation: &str,
    device: &Device,
    shape: Option<&[u64]>,
) -> Result<Option<Vec<u64>>> {
    if !["add_assign", "subtract_assign", "scale", "find_nonfinite"].contains(&operation) {
        return Ok(None);
    }
    let [elements] = extents(shape, [1 << 20])?;
    let (x, mut y) = (device.zeros::<T>(elements)?, device.zeros::<T>(elements)?);
    match operation {
        "add_assign" => add_assign(
            &device.kernels,
            device.operand(&x),
            device.operand_mut(&mut y),
        )?,
        "subtract_assign" => subtract_assign(
            &device.kernels,
            device.operand(&x),
            device.operand_mut(&mut y),
        )?,
        "scale" => scale(&device.kernels, device.operand_mut(&mut y), 2.0)?,
        _ => {
            let mut first = device.zeros::<u32>(1)?;
            find_nonfinite(
                &device.kernels,
                device.operand(&x),
                device.operand_mut(&mut first),
            )?;
        }
    }
    Ok(Some(vec![elements]))
}
