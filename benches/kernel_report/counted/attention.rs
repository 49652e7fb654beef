use super::{Device, extents};
use anyhow::{Context, Result};
use cudarc::driver::{DeviceRepr, ValidAsZeroBits};
use fuselora_kernels::Stored;
use fuselora_kernels::attention::{Attention, Gradients, Rows, Saved, backward, forward};

/// The shape is that of one sequence, with four query heads to each key head.
const GROUP: u64 = 4;

pub fn launch(device: &Device, kernel: &str, shape: Option<&[u64]>) -> Result<Option<Vec<u64>>> {
    let Some(name) = kernel.strip_prefix("attention_") else {
        return Ok(None);
    };
    let (operation, element) = name.rsplit_once('_').context("a kernel's name has words")?;
    let head_dim = operation.rsplit('_').next().map(str::parse);
    let head_dim = head_dim.and_then(Result::ok).unwrap_or(64);
    let decoding = name.starts_with("merge");
    let own = match decoding {
        true => [1, 4096, 2, head_dim],
        false => [256, 256, 2, head_dim],
    };
    let shape = extents(shape, own)?;
    match element {
        "f32" => run::<f32>(device, shape, !decoding)?,
        "f16" => run::<half::f16>(device, shape, !decoding)?,
        "bf16" => run::<half::bf16>(device, shape, !decoding)?,
        _ => return Ok(None),
    }
    Ok(Some(shape.to_vec()))
}

fn run<T: Stored + DeviceRepr + ValidAsZeroBits>(
    device: &Device,
    [queries, keys, kv_heads, head_dim]: [u64; 4],
    with_backward: bool,
) -> Result<()> {
    let rows = |len: u64| -> Result<_> { Ok(device.stream.clone_htod(&[0, u32::try_from(len)?])?) };
    let (q_seqlens, k_seqlens) = (rows(queries)?, rows(keys)?);
    let attention = Attention {
        heads: (GROUP * kv_heads).try_into()?,
        kv_heads: kv_heads.try_into()?,
        head_dim: head_dim.try_into()?,
        scale: 1.0 / (head_dim as f32).sqrt(),
        window: None,
        q_rows: Rows {
            cu_seqlens: device.operand(&q_seqlens),
            total: queries.try_into()?,
            max_len: queries.try_into()?,
        },
        kv_rows: Rows {
            cu_seqlens: device.operand(&k_seqlens),
            total: keys.try_into()?,
            max_len: keys.try_into()?,
        },
    };
    let q_len = queries * GROUP * kv_heads * head_dim;
    let kv_len = keys * kv_heads * head_dim;
    let (q, d_o) = (device.zeros::<T>(q_len)?, device.zeros::<T>(q_len)?);
    let (k, v) = (device.zeros::<T>(kv_len)?, device.zeros::<T>(kv_len)?);
    let (mut o, mut dq) = (device.zeros::<T>(q_len)?, device.zeros::<T>(q_len)?);
    let (mut dk, mut dv) = (device.zeros::<T>(kv_len)?, device.zeros::<T>(kv_len)?);
    let mut lse = device.zeros::<f32>(queries * GROUP * kv_heads)?;
    let mut partial = device.zeros::<f32>(attention.partial_len().max(1))?;
    let mut statistics = device.zeros::<f32>(attention.statistics_len())?;
    let partial_len = usize::try_from(attention.partial_len())?;
    forward(
        &device.kernels,
        &attention,
        device.operand(&q),
        device.operand(&k),
        device.operand(&v),
        device.operand_mut(&mut o),
        device.operand_mut(&mut lse),
        device.operand_mut(&mut partial.slice_mut(..partial_len)),
    )?;
    if !with_backward {
        return Ok(());
    }
    backward(
        &device.kernels,
        &attention,
        &Saved {
            d_o: device.operand(&d_o),
            q: device.operand(&q),
            k: device.operand(&k),
            v: device.operand(&v),
            o: device.operand(&o),
            lse: device.operand(&lse),
        },
        device.operand_mut(&mut statistics),
        Gradients {
            dq: device.operand_mut(&mut dq),
            dk: device.operand_mut(&mut dk),
            dv: device.operand_mut(&mut dv),
        },
    )?;
    Ok(())
}
