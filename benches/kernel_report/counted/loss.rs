use super::{Counting, Device, extents};
use anyhow::Result;
use fuselora_kernels::abi::LossShape;
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
    let shape = LossShape {
        vocab: vocab.try_into()?,
        grad_scale: 1.0,
    };
    if forward {
        let logits = device.operand(&logits);
        cross_entropy_forward(kernels, shape.vocab, logits, targets, losses, total)?;
    } else {
        let logits = device.operand_mut(&mut logits);
        cross_entropy_backward(kernels, shape, logits, targets, losses, total)?;
    }
    Ok(Some(vec![n, vocab]))
}
