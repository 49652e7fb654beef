use super::{Counting, Device, extents};
use anyhow::Result;
use fuselora_kernels::loss::{cross_entropy_backward, cross_entropy_forward};

pub fn launch(device: &Device, kernel: &str, shape: Option<&[u64]>) -> Result<Option<Vec<u64>>> {
    match kernel {
        "cross_entropy_sum" => run::<f32>("cross_entropy_forward", device, shape),
        _ => by_storage!(kernel, run(device, shape)),
    }
}

fn run<T: Counting>(
    operation: &str,
    device: &Device,
    shape: Option<&[u64]>,
) -> Result<Option<Vec<u64>>> {
    let forward = operation == "cross_entropy_forward";
    if !forward && operation != "cross_entropy_backward" {
        return Ok(None);
    }
    let [n, vocab] = extents(shape, [32, 32768])?;
    let mut logits = device.zeros::<T>(n * vocab)?;
    let targets = device.zeros::<u32>(n)?;
    let (mut losses, mut total) = (device.zeros::<f32>(n)?, device.zeros::<f32>(1)?);
    let kernels = &device.kernels;
    let targets = device.operand(&targets);
    let (losses, total) = (
        device.operand_mut(&mut losses),
        device.operand_mut(&mut total),
    );
    let width = vocab.try_into()?;
    if forward {
        let logits = device.operand(&logits);
        cross_entropy_forward(kernels, width, logits, targets, losses, total)?;
    } else {
        let (logits, scale) = (device.operand_mut(&mut logits), device.zeros::<f32>(1)?);
        let scale = device.operand(&scale);
        cross_entropy_backward(kernels, width, logits, targets, scale, losses, total)?;
    }
    Ok(Some(vec![n, vocab]))
}
