use super::{Device, extents};
use anyhow::Result;
use fuselora_kernels::abi::AdamWStep;
use fuselora_kernels::optimizer::{
    AdamWParam, RATE_LEN, adamw, gradient_norm, gradient_norm_workspace,
};

pub fn launch(device: &Device, kernel: &str, shape: Option<&[u64]>) -> Result<Option<Vec<u64>>> {
    if !["gradient_squares", "gradient_norm", "adamw"].contains(&kernel) {
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
    Ok(Some(vec![elements]))
}
