use super::lora_linear::run_forward;
use super::{Counting, Device, extents};
use anyhow::Result;
use fuselora_kernels::nf4::{Absmax, Weight, dequantize, quantize};

pub fn launch(device: &Device, kernel: &str, shape: Option<&[u64]>) -> Result<Option<Vec<u64>>> {
    by_storage!(kernel, run(device, shape))
}

fn run<T: Counting>(
    operation: &str,
    device: &Device,
    shape: Option<&[u64]>,
) -> Result<Option<Vec<u64>>> {
    match operation {
        "nf4_dequantize" | "nf4_quantize" => {}
        "nf4_gemv" => {
            let [tokens, in_features, out_features] = extents(shape, [1, 4096, 1024])?;
            run_forward::<T>(device, [tokens, in_features, out_features, 0], true)?;
            return Ok(Some(vec![tokens, in_features, out_features]));
        }
        _ => return Ok(None),
    }
    let [elements, block_size] = extents(shape, [1 << 20, 64])?;
    let mut packed = device.zeros::<u8>(elements.div_ceil(2))?;
    let mut absmax = device.zeros::<f32>(elements.div_ceil(block_size.max(1)))?;
    let mut dense = device.zeros::<T>(elements)?;
    let block = block_size.try_into()?;
    if operation == "nf4_quantize" {
        quantize(
            &device.kernels,
            device.operand(&dense),
            block,
            device.operand_mut(&mut packed),
            device.operand_mut(&mut absmax),
        )?;
    } else {
        let weight = Weight {
            elements,
            block_size: block,
            packed: device.operand(&packed),
            absmax: Absmax::Plain(device.operand(&absmax)),
        };
        dequantize(&device.kernels, &weight, 0, device.operand_mut(&mut dense))?;
    }
    Ok(Some(vec![elements, block_size]))
}
