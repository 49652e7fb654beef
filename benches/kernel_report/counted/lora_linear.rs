use super::{Device, extents};
use anyhow::{Context, Result};
use cudarc::driver::{DeviceRepr, ValidAsZeroBits};
use fuselora_kernels::Stored;
use fuselora_kernels::lora_linear::{
    Backward, Gradients, Lora, Output, Projection, backward, backward_workspace, forward,
    forward_workspace,
};

pub fn launch(device: &Device, kernel: &str, shape: Option<&[u64]>) -> Result<Option<Vec<u64>>> {
    let Some(operation) = kernel.strip_prefix("lora_linear_") else {
        return Ok(None);
    };
    // Few tiles get the smaller ones.
    let own = match operation {
        "forward_f32_128" => [1024, 128, 1024, 16],
        "dx_f32_128" => [1024, 1024, 128, 16],
        _ => [256, 256, 256, 16],
    };
    let shape = extents(shape, own)?;
    match operation.starts_with("forward") || operation.starts_with("h_") || operation == "sum" {
        true => run_forward::<f32>(device, shape)?,
        false => run_backward::<f32>(device, shape, !operation.starts_with("dh_f"))?,
    }
    Ok(Some(shape.to_vec()))
}

/// The tensors of one projection.
fn with_projection<T: Stored + DeviceRepr + ValidAsZeroBits>(
    device: &Device,
    [_, in_features, out_features, rank]: [u64; 4],
    then: impl FnOnce(Projection) -> Result<()>,
) -> Result<()> {
    let weight = device.zeros::<T>(out_features * in_features)?;
    let a = device.zeros::<f32>(rank * in_features)?;
    let b = device.zeros::<f32>(out_features * rank)?;
    then(Projection {
        weight: device.operand(&weight),
        bias: None,
        out_features: out_features.try_into()?,
        lora: Some(Lora {
            a: device.operand(&a),
            b: device.operand(&b),
            rank: rank.try_into()?,
            scaling: 1.0,
            dropout: None,
        }),
    })
}

fn run_forward<T: Stored + DeviceRepr + ValidAsZeroBits>(
    device: &Device,
    shape: [u64; 4],
) -> Result<()> {
    let [tokens, in_features, out_features, rank] = shape;
    let x = device.zeros::<T>(tokens * in_features)?;
    let mut y = device.zeros::<T>(tokens * out_features)?;
    let mut h = device.zeros::<f32>(tokens * rank)?;
    let (tokens, in_features) = (tokens.try_into()?, in_features.try_into()?);
    with_projection::<T>(device, shape, |projection| {
        let mut workspace =
            device.zeros::<f32>(forward_workspace(tokens, in_features, &[projection]))?;
        let output = Output {
            y: device.operand_mut(&mut y),
            h: Some(device.operand_mut(&mut h)),
        };
        forward(
            &device.kernels,
            tokens,
            in_features,
            device.operand(&x),
            &[projection],
            &[output],
            device.operand_mut(&mut workspace),
        )
        .context("forward")
    })
}

fn run_backward<T: Stored + DeviceRepr + ValidAsZeroBits>(
    device: &Device,
    shape: [u64; 4],
    trained: bool,
) -> Result<()> {
    let [tokens, in_features, out_features, rank] = shape;
    let x = device.zeros::<T>(tokens * in_features)?;
    let mut dx = device.zeros::<T>(tokens * in_features)?;
    let dy = device.zeros::<T>(tokens * out_features)?;
    let h = device.zeros::<f32>(tokens * rank)?;
    let mut da = device.zeros::<f32>(rank * in_features)?;
    let mut db = device.zeros::<f32>(out_features * rank)?;
    let (tokens, in_features) = (tokens.try_into()?, in_features.try_into()?);
    with_projection::<T>(device, shape, |projection| {
        let items = [Backward {
            projection,
            dy: device.operand(&dy),
            h: Some(device.operand(&h)),
            gradients: trained.then(|| Gradients {
                a: device.operand_mut(&mut da),
                b: device.operand_mut(&mut db),
            }),
        }];
        let mut workspace = device.zeros::<f32>(backward_workspace(tokens, in_features, &items))?;
        backward(
            &device.kernels,
            tokens,
            in_features,
            device.operand(&x),
            &items,
            Some(device.operand_mut(&mut dx)),
            device.operand_mut(&mut workspace),
        )
        .context("backward")
    })
}
