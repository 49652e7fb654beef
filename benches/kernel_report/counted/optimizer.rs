use super::{Device, extents};
use anyhow::Result;
use fuselora_kernels::abi::{AdamWStep, DYNAMIC_8BIT_BLOCK};
use fuselora_kernels::optimizer::{
    AdamW8bitParam, AdamWParam, Moment8bit, RATE_LEN, adamw, adamw_8bit, gradient_norm,
    gradient_norm_workspace,
};

pub fn launch(device: &Device, kernel: &str, shape: Option<&[u64]>) -> Result<Option<Vec<u64>>> {
    if !["gradient_squares", "gradient_norm", "adamw", "adamw_8bit"].contains(&kernel) {
        return Ok(None);
    }
    let [elements] = extents(shape, [1 << 20])?;
    let zeros = || device.zeros::<f32>(elements);
    let (mut param, grad, mut m, mut v) = (zeros()?, zeros()?, zeros()?, zeros()?);
    let needed = gradient_norm_workspace([elements].into_iter());
    let (mut workspace, mut norm) = (device.zeros::<f32>(needed)?, device.zeros::<f32>(1)?);
    let grad = device.operand(&grad);
    gradient_norm(
        &device.kernels,
        &[grad],
        device.operand_mut(&mut workspace),
        device.operand_mut(&mut norm),
    )?;
    let param = AdamWParam {
        param: device.operand_mut(&mut param),
        grad,
        m: device.operand_mut(&mut m),
        v: device.operand_mut(&mut v),
        rate: 0,
    };
    let step = AdamWStep {
        new1: 0.1,
        keep2: 0.999,
        new2: 0.001,
        eps: 1e-8,
        max_grad_norm: 1.0,
    };
    let rates = device.zeros::<f32>(RATE_LEN as u64)?;
    let (rates, norm) = (device.operand(&rates), device.operand(&norm));
    adamw(&device.kernels, &[param], step, rates, norm)?;

    let blocks = elements.div_ceil(u64::from(DYNAMIC_8BIT_BLOCK));
    // Codes that differ: equal ones would look up one place of the tables, without a conflict.
    let codes: Vec<u8> = (0..elements).map(|i| ((i * 167) >> 3) as u8).collect();
    let (mut m, mut v) = (device.upload(&codes)?, device.upload(&codes)?);
    let (mut m_absmax, mut v_absmax) = (device.zeros::<f32>(blocks)?, device.zeros::<f32>(blocks)?);
    let mut own = zeros()?;
    let param = AdamW8bitParam {
        param: device.operand_mut(&mut own),
        grad,
        m: Moment8bit {
            codes: device.operand_mut(&mut m),
            absmax: device.operand_mut(&mut m_absmax),
        },
        v: Moment8bit {
            codes: device.operand_mut(&mut v),
            absmax: device.operand_mut(&mut v_absmax),
        },
        rate: 0,
    };
    adamw_8bit(&device.kernels, &[param], step, rates, norm)?;
    Ok(Some(vec![elements]))
}
