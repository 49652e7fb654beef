use super::{Counting, Device, extents};
use anyhow::Result;
use fuselora_kernels::activation::{
    Gelu, gelu_backward, gelu_forward, swiglu_backward, swiglu_forward,
};

pub fn launch(device: &Device, kernel: &str, shape: Option<&[u64]>) -> Result<Option<Vec<u64>>> {
    by_storage!(kernel, run(device, shape))
}

fn run<T: Counting>(
    operation: &str,
    device: &Device,
    shape: Option<&[u64]>,
) -> Result<Option<Vec<u64>>> {
    if !operation.starts_with("swiglu") && !operation.starts_with("gelu") {
        return Ok(None);
    }
    let [elements] = extents(shape, [1 << 20])?;
    let kernels = &device.kernels;
    let gelu = if operation.contains("tanh") {
        Gelu::Tanh
    } else {
        Gelu::Erf
    };
    let (x, mut y) = (device.zeros::<T>(elements)?, device.zeros::<T>(elements)?);
    let mut z = device.zeros::<T>(elements)?;
    let read = device.operand(&x);
    match operation {
        "swiglu_forward" => {
            swiglu_forward(
                kernels,
                read,
                device.operand(&y),
                device.operand_mut(&mut z),
            )?;
        }
        "swiglu_backward" => {
            swiglu_backward(
                kernels,
                read,
                device.operand_mut(&mut y),
                device.operand_mut(&mut z),
            )?;
        }
        forward if forward.ends_with("forward") => {
            gelu_forward(kernels, gelu, read, device.operand_mut(&mut y))?;
        }
        _ => gelu_backward(kernels, gelu, device.operand_mut(&mut y), read)?,
    }
    Ok(Some(vec![elements]))
}
