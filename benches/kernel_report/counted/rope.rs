use super::{Counting, Device, extents};
use anyhow::Result;
use fuselora_kernels::abi::RopeShape;
use fuselora_kernels::rope::rope;

pub fn launch(device: &Device, kernel: &str, shape: Option<&[u64]>) -> Result<Option<Vec<u64>>> {
    by_storage!(kernel, run(device, shape))
}

fn run<T: Counting>(
    operation: &str,
    device: &Device,
    shape: Option<&[u64]>,
) -> Result<Option<Vec<u64>>> {
    if operation != "rope" {
        return Ok(None);
    }
    let [tokens, heads, head_dim] = extents(shape, [256, 32, 64])?;
    let half = head_dim / 2;
    let positions: Vec<u32> = (0..u32::try_from(tokens)?).collect();
    let positions = device.stream.clone_htod(&positions)?;
    let mut x = device.zeros::<T>(tokens * heads * head_dim)?;
    let (cos, sin) = (
        device.zeros::<f32>(tokens * half)?,
        device.zeros::<f32>(tokens * half)?,
    );
    let shape = RopeShape {
        heads: heads.try_into()?,
        head_dim: head_dim.try_into()?,
        half: half.try_into()?,
        table_rows: tokens.try_into()?,
        direction: 1.0,
    };
    rope(
        &device.kernels,
        shape,
        device.operand_mut(&mut x),
        device.operand(&positions),
        device.operand(&cos),
        device.operand(&sin),
    )?;
    Ok(Some(vec![tokens, heads, head_dim]))
}
