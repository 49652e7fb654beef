use super::{Device, extents};
use anyhow::Result;
use fuselora_kernels::abi::MatmulShape;
use fuselora_kernels::matmul::{Layout, matmul};

pub fn launch(device: &Device, kernel: &str, shape: Option<&[u64]>) -> Result<Option<Vec<u64>>> {
    let layout = match kernel {
        "matmul_f32_nn" => Layout::Nn,
        "matmul_f32_nt" => Layout::Nt,
        "matmul_f32_tn" => Layout::Tn,
        _ => return Ok(None),
    };
    let [m, n, k] = extents(shape, [256, 256, 256])?;
    let (a, b) = (device.zeros::<f32>(m * k)?, device.zeros::<f32>(k * n)?);
    let mut c = device.zeros::<f32>(m * n)?;
    let extents = MatmulShape {
        m: m.try_into()?,
        n: n.try_into()?,
        k: k.try_into()?,
    };
    matmul(
        &device.kernels,
        layout,
        extents,
        device.operand(&a),
        device.operand(&b),
        device.operand_mut(&mut c),
    )?;
    Ok(Some(vec![m, n, k]))
}
