use super::{Counting, Device, extents};
use anyhow::Result;
use fuselora_kernels::abi::NormShape;
use fuselora_kernels::norm::{layer_norm, rms_norm};

pub fn launch(device: &Device, kernel: &str, shape: Option<&[u64]>) -> Result<Option<Vec<u64>>> {
    by_storage!(kernel, run(device, shape))
}

fn run<T: Counting>(
    operation: &str,
    device: &Device,
    shape: Option<&[u64]>,
) -> Result<Option<Vec<u64>>> {
    if !operation.starts_with("rms_norm") && !operation.starts_with("layer_norm") {
        return Ok(None);
    }
    let [tokens, width] = extents(shape, [256, 2048])?;
    let kernels = &device.kernels;
    let [x, delta] = [
        device.zeros::<T>(tokens * width)?,
        device.zeros::<T>(tokens * width)?,
    ];
    let (mut y, mut sum) = (
        device.zeros::<T>(tokens * width)?,
        device.zeros::<T>(tokens * width)?,
    );
    let [weight, bias] = [device.zeros::<f32>(width)?, device.zeros::<f32>(width)?];
    let (mut mean, mut rstd) = (device.zeros::<f32>(tokens)?, device.zeros::<f32>(tokens)?);
    let (mut dweight, mut dbias) = (device.zeros::<f32>(width)?, device.zeros::<f32>(width)?);
    let (x, delta) = (device.operand(&x), device.operand(&delta));
    let (weight, bias) = (device.operand(&weight), device.operand(&bias));
    let (y, dweight) = (device.operand_mut(&mut y), device.operand_mut(&mut dweight));
    let shape = NormShape {
        tokens: tokens.try_into()?,
        width: width.try_into()?,
        eps: 1e-5,
    };
    match operation {
        "rms_norm_forward" => {
            rms_norm::forward(kernels, shape, x, weight, y, device.operand_mut(&mut rstd))?;
        }
        "rms_norm_forward_add" => {
            let (sum, rstd) = (device.operand_mut(&mut sum), device.operand_mut(&mut rstd));
            rms_norm::forward_add(kernels, shape, x, delta, sum, weight, y, rstd)?;
        }
        "layer_norm_forward" => {
            let (mean, rstd) = (device.operand_mut(&mut mean), device.operand_mut(&mut rstd));
            layer_norm::forward(kernels, shape, x, weight, bias, y, mean, rstd)?;
        }
        _ => {
            let (mean, rstd) = (device.operand(&mean), device.operand(&rstd));
            let statistics = layer_norm::Statistics { mean, rstd };
            match operation {
                "rms_norm_recompute" => rms_norm::recompute(kernels, shape, x, rstd, weight, y)?,
                "rms_norm_backward" => {
                    rms_norm::backward(kernels, shape, x, delta, rstd, weight, y)?
                }
                "rms_norm_dweight" => rms_norm::dweight(kernels, shape, x, delta, rstd, dweight)?,
                "layer_norm_recompute" => {
                    layer_norm::recompute(kernels, shape, x, statistics, weight, bias, y)?;
                }
                "layer_norm_backward" => {
                    layer_norm::backward(kernels, shape, x, delta, statistics, weight, y)?;
                }
                "layer_norm_gradients" => {
                    let dbias = device.operand_mut(&mut dbias);
                    layer_norm::gradients(kernels, shape, x, delta, statistics, dweight, dbias)?;
                }
                _ => return Ok(None),
            }
        }
    }
    Ok(Some(vec![tokens, width]))
}
