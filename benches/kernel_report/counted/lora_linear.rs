use super::{Counting, Device, extents};
use anyhow::{Context, Result};
use fuselora_kernels::lora_linear::{
    Backward, Dropout, Gradients, Lora, Output, Projection, Segment, Weight, add_segments,
    backward, backward_workspace, dropout, forward, forward_workspace,
};
use fuselora_kernels::nf4;
use half::{bf16, f16};

pub fn launch(device: &Device, kernel: &str, shape: Option<&[u64]>) -> Result<Option<Vec<u64>>> {
    let (kernel, nf4) = match kernel.strip_prefix("nf4_") {
        Some(kernel) => (kernel, true),
        None => (kernel, false),
    };
    match kernel.rsplit_once('_') {
        Some(("lora_segmented", _)) => return by_storage!(kernel, run_segmented(device, shape)),
        Some(("lora_dropout", _)) => return by_storage!(kernel, run_dropout(device, shape)),
        _ => {}
    }
    let Some(operation) = kernel.strip_prefix("lora_linear_") else {
        return Ok(None);
    };
    // The storage type is before the tile's name, or last.
    let named = |storage: &str| operation.split('_').any(|word| word == storage);
    match (named("f16"), named("bf16")) {
        (true, _) => run::<f16>(device, operation, nf4, shape),
        (_, true) => run::<bf16>(device, operation, nf4, shape),
        _ => run::<f32>(device, operation, nf4, shape),
    }
    .map(Some)
}

fn run<T: Counting>(
    device: &Device,
    operation: &str,
    nf4: bool,
    shape: Option<&[u64]>,
) -> Result<Vec<u64>> {
    let is = |name: &str| operation.starts_with(name);
    // Tokens, in_features, out_features, rank. Few tiles get the smaller ones, few blocks of a pass too.
    let own = match operation {
        "forward_f32_128" => [1024, 128, 1024, 16],
        "dx_f32_128" => [1024, 1024, 128, 16],
        _ if is("forward") && operation.ends_with("large") => [1024, 256, 3072, 16],
        _ if is("dx") && operation.ends_with("large") => [1024, 3072, 256, 16],
        _ if operation.ends_with("unaligned") => [256, 250, 250, 16],
        _ if is("skinny") && operation.ends_with("_8") => [8, 1024, 1024, 16],
        _ if is("skinny") => [16, 1024, 1024, 16],
        _ if (is("h_") || is("da_")) && !operation.ends_with("f32") => [2048, 2048, 128, 16],
        _ if is("dh_") && !operation.ends_with("f32") => [2048, 128, 2048, 16],
        _ => [256, 256, 256, 16],
    };
    let shape = extents(shape, own)?;
    match is("forward") || is("skinny") || is("h_") || is("sum") {
        true => run_forward::<T>(device, shape, nf4)?,
        false => run_backward::<T>(device, shape, nf4, !is("dh_") || is("dh_db"))?,
    }
    Ok(shape.to_vec())
}

/// Tokens, in_features, out_features and rank of four adapters, each for its share of the tokens.
fn run_segmented<T: Counting>(
    _: &str,
    device: &Device,
    shape: Option<&[u64]>,
) -> Result<Option<Vec<u64>>> {
    let shape = extents(shape, [64, 1024, 1024, 16])?;
    let [tokens, in_features, out_features, rank] = shape;
    let x = device.zeros::<T>(tokens * in_features)?;
    let mut y = device.zeros::<T>(tokens * out_features)?;
    let pairs = (0..4)
        .map(|_| {
            let a = device.zeros::<f32>(rank * in_features)?;
            Ok((a, device.zeros::<f32>(out_features * rank)?))
        })
        .collect::<Result<Vec<_>>>()?;
    let share = u32::try_from(tokens.div_ceil(4))?;
    let segments = pairs
        .iter()
        .zip(0..)
        .map(|((a, b), index)| {
            Ok(Segment {
                rows: index * share..((index + 1) * share).min(tokens as u32),
                lora: Lora {
                    a: device.operand(a),
                    b: device.operand(b),
                    rank: rank.try_into()?,
                    scaling: 1.0,
                    dropout: None,
                },
            })
        })
        .collect::<Result<Vec<_>>>()?;
    add_segments(
        &device.kernels,
        [
            tokens.try_into()?,
            in_features.try_into()?,
            out_features.try_into()?,
        ],
        device.operand(&x),
        &segments,
        device.operand_mut(&mut y),
    )?;
    Ok(Some(shape.to_vec()))
}

/// The tensors of one projection.
fn with_projection<T: Counting>(
    device: &Device,
    [_, in_features, out_features, rank]: [u64; 4],
    nf4: bool,
    then: impl FnOnce(Projection) -> Result<()>,
) -> Result<()> {
    let elements = out_features * in_features;
    let dense = device.zeros::<T>(elements)?;
    let packed = device.zeros::<u8>(elements.div_ceil(2))?;
    let absmax = device.zeros::<f32>(elements.div_ceil(64))?;
    let a = device.zeros::<f32>((rank * in_features).max(1))?;
    let b = device.zeros::<f32>((out_features * rank).max(1))?;
    then(Projection {
        weight: match nf4 {
            false => Weight::Dense(device.operand(&dense)),
            true => Weight::Nf4(nf4::Weight {
                elements,
                block_size: 64,
                packed: device.operand(&packed),
                absmax: nf4::Absmax::Plain(device.operand(&absmax)),
            }),
        },
        bias: None,
        out_features: out_features.try_into()?,
        lora: (rank > 0).then_some(Lora {
            a: device.operand(&a),
            b: device.operand(&b),
            rank: rank.try_into()?,
            scaling: 1.0,
            dropout: None,
        }),
    })
}

pub(super) fn run_forward<T: Counting>(device: &Device, shape: [u64; 4], nf4: bool) -> Result<()> {
    let [tokens, in_features, out_features, rank] = shape;
    let x = device.zeros::<T>(tokens * in_features)?;
    let mut y = device.zeros::<T>(tokens * out_features)?;
    let mut h = device.zeros::<f32>((tokens * rank).max(1))?;
    let (tokens, in_features) = (tokens.try_into()?, in_features.try_into()?);
    with_projection::<T>(device, shape, nf4, |projection| {
        let mut workspace =
            device.zeros::<f32>(forward_workspace(tokens, in_features, &[projection]).max(1))?;
        let output = Output {
            y: device.operand_mut(&mut y),
            h: (rank > 0).then(|| device.operand_mut(&mut h)),
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

fn run_backward<T: Counting>(
    device: &Device,
    shape: [u64; 4],
    nf4: bool,
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
    with_projection::<T>(device, shape, nf4, |projection| {
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

fn run_dropout<T: Counting>(
    _operation: &str,
    device: &Device,
    shape: Option<&[u64]>,
) -> Result<Option<Vec<u64>>> {
    let [elements] = extents(shape, [1 << 20])?;
    let (x, mut y) = (device.zeros::<T>(elements)?, device.zeros::<T>(elements)?);
    let step = device.zeros::<u32>(1)?;
    let own = Dropout {
        probability: 0.1,
        seed: 1,
        stream: 0,
        step: device.operand(&step),
    };
    dropout(
        &device.kernels,
        own,
        device.operand(&x),
        device.operand_mut(&mut y),
    )?;
    Ok(Some(vec![elements]))
}
