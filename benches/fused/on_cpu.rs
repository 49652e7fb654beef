//! What is compared on the CPU device, in f32.
#![allow(dead_code, reason = "each program uses its own part")]

use crate::layer::{Layer, linear, linear_backward, random};
use crate::{Bench, Side};
use anyhow::Result;
use fuselora_tensor::ops::attention::{self, AttentionConfig, Rows};
use fuselora_tensor::ops::elementwise::{add_assign, scale};
use fuselora_tensor::ops::optimizer::{
    AdamWHyper, AdamWParam, AdamWRate, AdamWRates, adamw, global_norm,
};
use fuselora_tensor::ops::{cross_entropy, lora_linear, rms_norm};
use fuselora_tensor::{DType, Device, Nf4Weight, Tensor, Weight};
use std::time::Instant;

/// The shapes to compare on.
pub struct Shapes {
    tokens: usize,
    /// Inputs and outputs of linear layers.
    layers: &'static [[usize; 2]],
    /// Outputs of layers that share an input as wide as the first of them.
    group: &'static [usize],
    rank: usize,
    /// Query heads, key heads and their width.
    heads: [usize; 3],
    /// Targets, the vocabulary and the features before the head; targets of a chunk.
    loss: ([usize; 3], usize),
    /// Tensors of the optimizer and the elements of each.
    adapter: [usize; 2],
}

/// A short row of Llama 3.2 1B, but for the head: that is SmolLM2-135M's.
pub const SMALL: Shapes = Shapes {
    tokens: 128,
    layers: &[[2048, 2048], [2048, 512], [2048, 8192], [8192, 2048]],
    group: &[2048, 512, 512],
    rank: 16,
    heads: [32, 8, 64],
    loss: ([512, 49152, 576], 256),
    adapter: [224, 16 * 2048],
};

/// What a test runs in a moment.
pub const TINY: Shapes = Shapes {
    tokens: 24,
    layers: &[[64, 48]],
    group: &[64, 16, 16],
    rank: 4,
    heads: [2, 1, 32],
    loss: ([12, 40, 32], 8),
    adapter: [3, 100],
};

/// Compares everything.
pub fn run(shapes: &Shapes, bench: &mut Bench) -> Result<()> {
    let device = Device::cpu();
    for &extents in shapes.layers {
        layer(&device, bench, shapes, extents)?;
    }
    group(&device, bench, shapes)?;
    norm(&device, bench, shapes)?;
    nf4(&device, bench, shapes)?;
    attention(&device, bench, shapes)?;
    loss(&device, bench, shapes)?;
    optimizer(&device, bench, shapes)
}

/// Repeats work, and tells how long that took.
fn side<'a>(mut work: impl FnMut() -> fuselora_tensor::Result<()> + 'a) -> Side<'a> {
    Box::new(move |count| {
        let start = Instant::now();
        (0..count).try_for_each(|_| work())?;
        Ok(start.elapsed())
    })
}

/// A LoRA layer, and PEFT's sequence of operations: both give the same.
fn layer(device: &Device, bench: &mut Bench, shapes: &Shapes, extents: [usize; 2]) -> Result<()> {
    let [tokens, rank] = [shapes.tokens, shapes.rank];
    let [in_features, out_features] = extents;
    let new = || Layer::new(device, [tokens, in_features, out_features, rank]);
    let (mut fused, mut unfused) = (new()?, new()?);
    let [y, h] = fused.fused_forward()?;
    let [expected, _] = unfused.unfused_forward()?;
    check("y", &y, &expected)?;
    let dx = fused.fused_backward(&h)?;
    let expected = unfused.unfused_backward(&h)?;
    check("dx", &dx, &expected)?;

    let name = format!("{tokens} x {in_features} x {out_features}, r = {rank}");
    let forward = [
        side(|| fused.fused_forward().map(drop)),
        side(|| unfused.unfused_forward().map(drop)),
    ];
    bench.compare(&format!("lora_linear forward: {name}"), forward)?;
    let backward = [
        side(|| fused.fused_backward(&h).map(drop)),
        side(|| unfused.unfused_backward(&h).map(drop)),
    ];
    bench.compare(&format!("lora_linear backward: {name}"), backward)
}

/// That two orders of the same sums differ by rounding alone.
fn check(name: &str, found: &Tensor, expected: &Tensor) -> Result<()> {
    let (found, expected) = (found.as_f32()?, expected.as_f32()?);
    let square = |x: f32| f64::from(x) * f64::from(x);
    let norm: f64 = expected.iter().map(|&x| square(x)).sum();
    let error: f64 = found.iter().zip(expected).map(|(a, b)| square(a - b)).sum();
    anyhow::ensure!(
        error < 1e-10 * norm,
        "{name}: fused and unfused differ by {:.1e}",
        (error / norm).sqrt()
    );
    Ok(())
}

/// Projections that share an input in one call, and each in its own.
fn group(device: &Device, bench: &mut Bench, shapes: &Shapes) -> Result<()> {
    let in_features = shapes.group[0];
    let layers = shapes
        .group
        .iter()
        .map(|&out| Layer::new(device, [shapes.tokens, in_features, out, shapes.rank]))
        .collect::<Result<Vec<_>, _>>()?;
    let projections: Vec<_> = layers.iter().map(Layer::projection).collect();
    let x = &layers[0].x;
    let sides = [
        side(|| lora_linear::forward(x, &projections).map(drop)),
        side(|| {
            let mut each = projections.iter();
            each.try_for_each(|&own| lora_linear::forward(x, &[own]).map(drop))
        }),
    ];
    let name = format!("projections together forward: {} tokens", shapes.tokens);
    bench.compare(&name, sides)
}

/// The residual added within the norm, and before it.
fn norm(device: &Device, bench: &mut Bench, shapes: &Shapes) -> Result<()> {
    let width = shapes.group[0];
    let x = random(device, &[shapes.tokens, width])?;
    let mut residual = x.try_clone()?;
    let weight = random(device, &[width])?;
    let sides = [
        side(|| rms_norm::forward_add(&x, &x, &weight, 1e-5).map(drop)),
        side(|| {
            add_assign(&mut residual, &x)?;
            rms_norm::forward(&residual, &weight, 1e-5).map(drop)
        }),
    ];
    let name = format!(
        "rms_norm forward, residual added: {} x {width}",
        shapes.tokens
    );
    bench.compare(&name, sides)
}

/// A weight dequantized panel by panel within the product, and before it.
fn nf4(device: &Device, bench: &mut Bench, shapes: &Shapes) -> Result<()> {
    let [in_features, out_features] = shapes.layers[0];
    let x = random(device, &[shapes.tokens, in_features])?;
    let dense = random(device, &[out_features, in_features])?;
    let weight = Weight::from(Nf4Weight::quantize(&dense, 64, true)?);
    let Weight::Nf4(quantized) = &weight else {
        unreachable!("it was just made");
    };
    let sides = [
        side(|| linear(&x, &weight).map(drop)),
        side(|| linear(&x, &Weight::Dense(quantized.dequantize(DType::F32)?)).map(drop)),
    ];
    let name = format!(
        "nf4 product: {} x {out_features} x {in_features}",
        shapes.tokens
    );
    bench.compare(&name, sides)
}

/// Causal attention, and its two products alone, with all scores stored.
fn attention(device: &Device, bench: &mut Bench, shapes: &Shapes) -> Result<()> {
    let (tokens, [heads, kv_heads, head_dim]) = (shapes.tokens, shapes.heads);
    let q = random(device, &[tokens, heads * head_dim])?;
    let k = random(device, &[tokens, kv_heads * head_dim])?;
    let rows = Rows::new(device, &[tokens])?;
    let config = AttentionConfig {
        heads,
        kv_heads,
        head_dim,
        scale: 1.0 / (head_dim as f32).sqrt(),
        window: None,
    };
    let all_heads = random(device, &[tokens * heads, head_dim])?;
    let key = Weight::Dense(random(device, &[tokens, head_dim])?);
    let value = Weight::Dense(random(device, &[head_dim, tokens])?);
    let sides = [
        side(|| attention::forward(&q, &k, &k, &rows, &rows, &config).map(drop)),
        side(|| linear(&linear(&all_heads, &key)?, &value).map(drop)),
    ];
    let name = format!(
        "attention forward against its products alone: {tokens} tokens, {heads} heads of {head_dim}"
    );
    bench.compare(&name, sides)
}

/// The head, the loss and their backward pass in chunks of targets, and with all logits at once, the loss apart from its
/// gradient.
fn loss(device: &Device, bench: &mut Bench, shapes: &Shapes) -> Result<()> {
    let ([tokens, vocab, in_features], per_chunk) = shapes.loss;
    let head = Weight::Dense(random(device, &[vocab, in_features])?);
    let grad_scale = Tensor::full_f32(device, [1], 1.0)?;
    let inputs = |count: usize| -> Result<(Tensor, Tensor)> {
        let targets: Vec<u32> = (0..count)
            .map(|token| (37 * token % vocab) as u32)
            .collect();
        let x = random(device, &[count, in_features])?;
        Ok((x, Tensor::from_u32(device, [count], &targets)?))
    };
    let chunks = (0..tokens)
        .step_by(per_chunk)
        .map(|first| inputs(per_chunk.min(tokens - first)))
        .collect::<Result<Vec<_>>>()?;
    let (x, targets) = inputs(tokens)?;
    let zero = || Tensor::zeros(device, [1], DType::F32);
    let (mut chunks_loss, mut whole_loss) = (zero()?, zero()?);
    let sides = [
        side(|| {
            chunks.iter().try_for_each(|(x, targets)| {
                let mut logits = linear(x, &head)?;
                cross_entropy::forward_backward(
                    &mut logits,
                    targets,
                    &grad_scale,
                    &mut chunks_loss,
                )?;
                linear_backward(x, &head, &logits).map(drop)
            })
        }),
        side(|| {
            let mut logits = linear(&x, &head)?;
            cross_entropy::forward(&logits, &targets, &mut whole_loss)?;
            cross_entropy::forward_backward(&mut logits, &targets, &grad_scale, &mut whole_loss)?;
            linear_backward(&x, &head, &logits).map(drop)
        }),
    ];
    bench.compare(
        &format!("linear cross_entropy: {tokens} x {vocab} x {in_features}"),
        sides,
    )
}

/// A parameter with its gradient and moments.
struct Param {
    param: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
}

impl Param {
    fn borrow(&mut self) -> AdamWParam<'_> {
        AdamWParam {
            param: &mut self.param,
            grad: &self.grad,
            m: &mut self.m,
            v: &mut self.v,
            rate: 0,
        }
    }
}

/// A clipped step of all tensors at once, and of each in passes of its own.
fn optimizer(device: &Device, bench: &mut Bench, shapes: &Shapes) -> Result<()> {
    let [tensors, elements] = shapes.adapter;
    let hyper = AdamWHyper {
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        max_grad_norm: 1.0,
    };
    let mut rates = AdamWRates::new(device, 1)?;
    let rate = AdamWRate {
        lr: 1e-3,
        weight_decay: 0.0,
    };
    rates.set(1, &hyper, &[rate])?;
    let params = || {
        let zeros = || Tensor::zeros(device, [elements], DType::F32);
        let param = |_| {
            Ok(Param {
                param: random(device, &[elements])?,
                grad: random(device, &[elements])?,
                m: zeros()?,
                v: zeros()?,
            })
        };
        (0..tensors).map(param).collect::<Result<Vec<Param>>>()
    };
    let (mut together, mut apart) = (params()?, params()?);
    let norm_of = |params: &[Param]| {
        let mut norm = Tensor::zeros(device, [1], DType::F32)?;
        let grads: Vec<_> = params.iter().map(|own| &own.grad).collect();
        global_norm(&grads, &mut norm)?;
        Ok(norm)
    };
    let sides = [
        side(|| {
            let norm = norm_of(&together)?;
            let mut params: Vec<_> = together.iter_mut().map(Param::borrow).collect();
            adamw(&mut params, hyper, &rates, &norm)
        }),
        side(|| {
            let norm = norm_of(&apart)?;
            apart.iter_mut().try_for_each(|own| {
                scale(&mut own.grad, 1.0)?;
                adamw(&mut [own.borrow()], hyper, &rates, &norm)
            })
        }),
    ];
    bench.compare(
        &format!("gradient_norm, adamw: {tensors} x {elements}"),
        sides,
    )
}
