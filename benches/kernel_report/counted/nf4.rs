use super::{Device, extents};
use anyhow::Result;
use cudarc::driver::{DeviceRepr, ValidAsZeroBits};
use fuselora_kernels::Stored;
use fuselora_kernels::nf4::{Absmax, dequantize};
use half::{bf16, f16};

pub fn launch(device: &Device, kernel: &str, shape: Option<&[u64]>) -> Result<Option<Vec<u64>>> {
    let shape = match kernel {
        "nf4_dequantize_f32" => run::<f32>(device, false, shape)?,
        "nf4_dequantize_f16" => run::<f16>(device, false, shape)?,
        "nf4_dequantize_bf16" => run::<bf16>(device, false, shape)?,
        "nf4_dequantize_nested_f32" => run::<f32>(device, true, shape)?,
        "nf4_dequantize_nested_f16" => run::<f16>(device, true, shape)?,
        "nf4_dequantize_nested_bf16" => run::<bf16>(device, true, shape)?,
        _ => return Ok(None),
    };
    Ok(Some(shape))
}

fn run<T: Stored + DeviceRepr + ValidAsZeroBits>(
    device: &Device,
    nested: bool,
    shape: Option<&[u64]>,
) -> Result<Vec<u64>> {
    let [elements, block_size] = extents(shape, [1 << 20, 64])?;
    let blocks = elements.div_ceil(block_size.max(1));
    let packed = device.zeros::<u8>(elements.div_ceil(2))?;
    let absmax = device.zeros::<f32>(blocks)?;
    let codes = device.zeros::<u8>(blocks)?;
    let quant_map = device.zeros::<f32>(256)?;
    let outer = device.zeros::<f32>(blocks.div_ceil(256))?;
    let mut out = device.zeros::<T>(elements)?;
    let statistics = match nested {
        false => Absmax::Plain(device.operand(&absmax)),
        true => Absmax::Nested {
            absmax: device.operand(&codes),
            nested_quant_map: device.operand(&quant_map),
            nested_absmax: device.operand(&outer),
            offset: 0.0,
        },
    };
    dequantize(
        &device.kernels,
        device.operand(&packed),
        statistics,
        block_size.try_into()?,
        device.operand_mut(&mut out),
    )?;
    Ok(vec![elements, block_size])
}
