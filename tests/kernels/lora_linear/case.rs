//! A case: the numbers of projections that share an input, and what the device makes of them.

use crate::device::{Device, numbers};
use crate::nf4::{self, Quantized};
use crate::storage::Storage;
use cudarc::driver::CudaSlice;
use fuselora_kernels::LaunchError;
use fuselora_kernels::lora_linear::{
    self, Backward, Gradients, Lora, Output, Projection, Weight, backward, backward_workspace,
    forward, forward_workspace,
};
use proptest::prelude::*;

/// One projection of a case; its numbers follow from the case's seed.
#[derive(Debug, Clone, Copy)]
pub struct Layer {
    pub out_features: usize,
    pub bias: bool,
    /// No update: 0.
    pub rank: usize,
    pub dropout: f32,
    pub frozen: bool,
}

#[derive(Debug, Clone)]
pub struct Case {
    pub tokens: usize,
    pub in_features: usize,
    pub layers: Vec<Layer>,
    /// The block size of NF4 weights, and whether their absmax is quantized too.
    pub nf4: Option<(u32, bool)>,
    pub seed: u64,
}

pub const SCALING: f32 = 1.75;

fn extent() -> impl Strategy<Value = usize> {
    // The longer ones go round the ring of slices in shared memory.
    prop_oneof![
        2 => 1usize..90,
        2 => (1usize..12).prop_map(|eights| 8 * eights),
        1 => (12usize..32).prop_map(|eights| 8 * eights),
    ]
}

fn layer() -> impl Strategy<Value = Layer> {
    let rank = prop_oneof![1 => Just(0), 4 => 1usize..20, 2 => 20usize..70, 1 => Just(256)];
    let dropout = prop_oneof![Just(0.0f32), 0.05f32..0.6];
    (
        extent(),
        any::<bool>(),
        rank,
        dropout,
        prop::bool::weighted(0.2),
    )
        .prop_map(|(out_features, bias, rank, dropout, frozen)| Layer {
            out_features,
            bias,
            rank,
            dropout,
            frozen,
        })
}

pub fn case() -> impl Strategy<Value = Case> {
    (
        extent(),
        extent(),
        prop::collection::vec(layer(), 1..4),
        any::<u64>(),
    )
        .prop_map(|(tokens, in_features, layers, seed)| Case {
            tokens,
            in_features,
            layers,
            nf4: None,
            seed,
        })
}

/// The numbers of one projection, as the device holds them.
pub struct Data {
    pub w: Vec<f32>,
    quantized: Option<Quantized>,
    pub bias: Vec<f32>,
    pub a: Vec<f32>,
    pub b: Vec<f32>,
    pub dy: Vec<f32>,
    /// The gradients before the backward pass adds to them.
    pub da: Vec<f32>,
    pub db: Vec<f32>,
    pub dropout: Option<Dropout>,
}

/// A dropout in step [`STEP`].
#[derive(Debug, Clone, Copy)]
pub struct Dropout {
    pub probability: f32,
    pub seed: u64,
    pub stream: u32,
}

pub const STEP: u32 = 7;

impl Case {
    pub fn stored<T: Storage>(&self, salt: u64, count: usize) -> Vec<f32> {
        let values = numbers(self.seed.wrapping_mul(31).wrapping_add(salt), count);
        values
            .into_iter()
            .map(|x| T::of(x).value() as f32)
            .collect()
    }

    pub fn data<T: Storage>(&self) -> Vec<Data> {
        let of = |(index, layer): (usize, &Layer)| {
            let (out, rank) = (layer.out_features, layer.rank);
            let salt = 10 * (index as u64 + 1);
            let elements = out * self.in_features;
            let quantized = self.nf4.map(|(block_size, nested)| {
                Quantized::random(elements, block_size, nested, self.seed ^ salt)
            });
            Data {
                w: match &quantized {
                    Some(quantized) => quantized.values(),
                    None => self.stored::<T>(salt, elements),
                },
                quantized,
                bias: self.stored::<f32>(salt + 1, out),
                a: self.stored::<f32>(salt + 2, rank * self.in_features),
                b: self.stored::<f32>(salt + 3, out * rank),
                dy: self.stored::<T>(salt + 4, self.tokens * out),
                da: self.stored::<f32>(salt + 5, rank * self.in_features),
                db: self.stored::<f32>(salt + 6, out * rank),
                dropout: (layer.dropout > 0.0).then_some(Dropout {
                    probability: layer.dropout,
                    seed: self.seed,
                    stream: index as u32,
                }),
            }
        };
        self.layers.iter().enumerate().map(of).collect()
    }
}

/// What the device computed for one projection, and the gradient of the input.
#[derive(Debug, Clone, PartialEq)]
pub struct Results {
    pub y: Vec<f32>,
    pub h: Vec<f32>,
    pub da: Vec<f32>,
    pub db: Vec<f32>,
}

/// A weight on the device.
enum Uploaded<T> {
    Dense(CudaSlice<T>),
    Nf4(nf4::Uploaded),
}

/// A copy on the device, which has no buffers of no elements.
fn not_empty(device: &Device, values: &[f32]) -> CudaSlice<f32> {
    device.upload(if values.is_empty() { &[0.0] } else { values })
}

pub fn on_device<T: Storage>(
    device: &Device,
    case: &Case,
    data: &[Data],
    x: &[f32],
    order: u64,
) -> Result<(Vec<Results>, Vec<f32>), LaunchError> {
    let store = |values: &[f32]| -> CudaSlice<T> {
        device.upload(&values.iter().map(|&x| T::of(x)).collect::<Vec<_>>())
    };
    let load = |values: &CudaSlice<T>| -> Vec<f32> {
        device
            .download(values)
            .into_iter()
            .map(|x| x.value() as f32)
            .collect()
    };
    device.shuffle(order);
    let (tokens, in_features) = (case.tokens as u32, case.in_features as u32);
    let x = store(x);
    let step = device.upload(&[STEP]);
    let inputs: Vec<_> = data
        .iter()
        .map(|data| {
            let f32s = [&data.bias, &data.a, &data.b].map(|values| not_empty(device, values));
            let w = match &data.quantized {
                Some(quantized) => Uploaded::Nf4(quantized.upload(device)),
                None => Uploaded::Dense(store(&data.w)),
            };
            (w, store(&data.dy), f32s)
        })
        .collect();
    let projections: Vec<Projection> = case
        .layers
        .iter()
        .zip(data)
        .zip(&inputs)
        .map(|((layer, data), (w, _, [bias, a, b]))| Projection {
            weight: match w {
                Uploaded::Dense(w) => Weight::Dense(device.operand(w)),
                Uploaded::Nf4(w) => Weight::Nf4(w.weight(device)),
            },
            bias: layer.bias.then(|| device.operand(bias)),
            out_features: layer.out_features as u32,
            lora: (layer.rank > 0).then(|| Lora {
                a: device.operand(a),
                b: device.operand(b),
                rank: layer.rank as u32,
                scaling: SCALING,
                dropout: data.dropout.map(|dropout| lora_linear::Dropout {
                    probability: dropout.probability,
                    seed: dropout.seed,
                    stream: dropout.stream,
                    step: device.operand(&step),
                }),
            }),
        })
        .collect();

    let mut outputs: Vec<_> = case
        .layers
        .iter()
        .map(|layer| {
            (
                device.output::<T>(case.tokens * layer.out_features),
                device.output::<f32>((case.tokens * layer.rank).max(1)),
            )
        })
        .collect();
    let mut workspace =
        device.output::<f32>(forward_workspace(tokens, in_features, &projections).max(1) as usize);
    forward(
        &device.kernels,
        tokens,
        in_features,
        device.operand(&x),
        &projections,
        &outputs
            .iter_mut()
            .zip(&case.layers)
            .map(|((y, h), layer)| Output {
                y: device.operand_mut(y),
                h: (layer.rank > 0).then(|| device.operand_mut(h)),
            })
            .collect::<Vec<_>>(),
        device.operand_mut(&mut workspace),
    )?;

    let mut gradients: Vec<_> = data
        .iter()
        .map(|data| (not_empty(device, &data.da), not_empty(device, &data.db)))
        .collect();
    let mut dx = device.output::<T>(case.tokens * case.in_features);
    let items: Vec<Backward> = projections
        .iter()
        .zip(&inputs)
        .zip(&outputs)
        .zip(&mut gradients)
        .zip(&case.layers)
        .map(
            |((((projection, input), output), (da, db)), layer)| Backward {
                projection: *projection,
                dy: device.operand(&input.1),
                h: (layer.rank > 0).then(|| device.operand(&output.1)),
                gradients: (layer.rank > 0 && !layer.frozen).then(|| Gradients {
                    a: device.operand_mut(da),
                    b: device.operand_mut(db),
                }),
            },
        )
        .collect();
    let mut workspace =
        device.output::<f32>(backward_workspace(tokens, in_features, &items).max(1) as usize);
    backward(
        &device.kernels,
        tokens,
        in_features,
        device.operand(&x),
        &items,
        Some(device.operand_mut(&mut dx)),
        device.operand_mut(&mut workspace),
    )?;
    let results = outputs
        .iter()
        .zip(&gradients)
        .map(|((y, h), (da, db))| Results {
            y: load(y),
            h: device.download(h),
            da: device.download(da),
            db: device.download(db),
        })
        .zip(&case.layers)
        .map(|(results, layer)| match layer.rank {
            0 => Results {
                h: vec![],
                da: vec![],
                db: vec![],
                ..results
            },
            _ => results,
        })
        .collect();
    Ok((results, load(&dx)))
}
