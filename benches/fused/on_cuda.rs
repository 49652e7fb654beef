//! What is compared on a CUDA device, in bf16.
#![allow(dead_code, reason = "each program uses its own part")]

use crate::case::Case;
use crate::cases::{attention, loss, nf4, norm, optimizer};
use crate::device::{Device, Make, turns::Turns};
use crate::lora_layer::llama::{MODELS, Model};
use crate::lora_layer::{Fused, Shape, Unfused, Wanted, group::Group};
use crate::{Bench, Side};
use anyhow::Result;
use fuselora_kernels::{Element, Kernels, LaunchError};
use std::time::Duration;

const ELEMENT: Element = Element::Bf16;

/// The shapes to compare on.
pub struct Shapes {
    models: &'static [Model],
    tokens: &'static [u32],
    rank: u32,
    /// The longest row of attention.
    seqlen: u32,
}

/// Llama's projections, at lengths from a short row to a long batch.
pub const LLAMA: Shapes = Shapes {
    models: &MODELS,
    tokens: &[128, 1024, 4096, 16384],
    rank: 16,
    seqlen: 2048,
};

/// What a simulated device runs in a moment.
pub const TINY: Shapes = Shapes {
    models: &[Model {
        name: "tiny",
        hidden: 64,
        intermediate: 72,
        layers: 1,
        heads: 2,
        kv_heads: 1,
        head_dim: 32,
        vocab: 80,
    }],
    tokens: &[40],
    rank: 4,
    seqlen: 20,
};

/// Compares everything.
pub fn run(device: &Device, shapes: &Shapes, bench: &mut Bench) -> Result<()> {
    for model in shapes.models {
        for &tokens in shapes.tokens {
            for (name, [in_features, out_features]) in model.projections() {
                let shape = Shape {
                    tokens,
                    in_features,
                    out_features,
                    rank: shapes.rank,
                };
                layer(device, bench, &format!("{} {name}", model.name), shape)?;
            }
            for (name, out_features) in model.groups() {
                let name = format!("{} {name}", model.name);
                let extents = [tokens, model.hidden, shapes.rank];
                group(device, bench, &name, extents, &out_features)?;
            }
            others(device, bench, model, tokens, shapes.seqlen)?;
        }
        // A and B of seven projections in every layer, as if all were square.
        let adapter = [14 * model.layers, shapes.rank * model.hidden];
        compare(device, bench, model.name, optimizer::compared(adapter))?;
    }
    Ok(())
}

/// An operation on tensors of its own.
type Run<T> = fn(&mut T, &Kernels) -> Result<(), LaunchError>;

/// A LoRA layer, and PEFT's sequence of operations.
fn layer(device: &Device, bench: &mut Bench, name: &str, shape: Shape) -> Result<()> {
    let bytes = ELEMENT.size_in_bytes() * shape.elements().iter().sum::<u64>();
    let fused = |run: Run<Fused>| -> Make {
        Box::new(move |device| {
            let mut layer = Fused::new(device, shape, ELEMENT)?;
            Ok(Box::new(move |kernels| run(&mut layer, kernels)))
        })
    };
    let unfused = |run: Run<Unfused>| -> Make {
        Box::new(move |device| {
            let mut layer = Unfused::new(device, shape, ELEMENT)?;
            Ok(Box::new(move |kernels| run(&mut layer, kernels)))
        })
    };
    let forward = [fused(Fused::forward), unfused(Unfused::forward)];
    let backward = [
        fused(|layer, kernels| layer.backward(kernels, Wanted::All)),
        unfused(Unfused::backward),
    ];
    for (pass, sides) in [("forward", forward), ("backward", backward)] {
        let name = format!("lora_linear {pass}, {name}: {shape}");
        time(device, bench, &name, bytes, sides)?;
    }
    Ok(())
}

/// Projections that share an input in one call, and each in its own.
fn group(
    device: &Device,
    bench: &mut Bench,
    name: &str,
    extents: [u32; 3],
    out_features: &[u32],
) -> Result<()> {
    let [tokens, in_features, _] = extents.map(u64::from);
    let out: u64 = out_features.iter().copied().map(u64::from).sum();
    let elements = tokens * in_features + out * (in_features + tokens);
    let bytes = ELEMENT.size_in_bytes() * elements;
    let side = |run: Run<Group>| -> Make {
        let out_features = out_features.to_vec();
        Box::new(move |device| {
            let mut group = Group::new(device, extents, &out_features, ELEMENT)?;
            Ok(Box::new(move |kernels| run(&mut group, kernels)))
        })
    };
    let forward: [Run<Group>; 2] = [
        |group, kernels| group.forward(kernels, true),
        |group, kernels| group.forward(kernels, false),
    ];
    let backward: [Run<Group>; 2] = [
        |group, kernels| group.backward(kernels, true),
        |group, kernels| group.backward(kernels, false),
    ];
    for (pass, sides) in [("forward", forward), ("backward", backward)] {
        let name = format!("projections together {pass}, {name}: {tokens} tokens");
        time(device, bench, &name, bytes, sides.map(side))?;
    }
    Ok(())
}

/// The other operations of a step.
fn others(
    device: &Device,
    bench: &mut Bench,
    model: &Model,
    tokens: u32,
    seqlen: u32,
) -> Result<()> {
    let seqlen = seqlen.min(tokens);
    let heads = [
        tokens / seqlen,
        seqlen,
        model.heads,
        model.kv_heads,
        model.head_dim,
    ];
    let hidden = model.hidden;
    for pair in [
        norm::compared([tokens, hidden], ELEMENT),
        attention::compared(heads, ELEMENT, true),
        attention::compared(heads, ELEMENT, false),
        nf4::compared(tokens, [hidden, hidden], ELEMENT),
        loss::compared(
            [tokens, model.vocab, hidden],
            loss::TARGETS_PER_CHUNK,
            ELEMENT,
        ),
    ] {
        compare(device, bench, model.name, pair)?;
    }
    Ok(())
}

fn compare(device: &Device, bench: &mut Bench, model: &str, pair: [Case; 2]) -> Result<()> {
    let [fused, unfused] = pair;
    let shape: Vec<String> = fused.shape.iter().map(u32::to_string).collect();
    let shape = shape.join(" x ");
    let name = format!("{} against {}, {model}: {shape}", fused.name, unfused.name);
    time(
        device,
        bench,
        &name,
        fused.bytes,
        [fused.make, unfused.make],
    )
}

/// Sets of tensors at most.
const MOST_SETS: u64 = 16;

fn time(
    device: &Device,
    bench: &mut Bench,
    name: &str,
    bytes: u64,
    sides: [Make; 2],
) -> Result<()> {
    let sides = sides.map(|make| {
        let mut prepared: Option<Turns> = None;
        let side = move |count| {
            let turns = match &mut prepared {
                Some(turns) => turns,
                None => prepared.insert(Turns::new(device, bytes, MOST_SETS, &make)?),
            };
            let seconds = device.seconds(|| turns.run(device, count))?;
            Ok(Duration::from_secs_f64(seconds))
        };
        Box::new(side) as Side
    });
    bench.compare(name, sides)
}
