//! The linear layer with its low-rank update, forward and backward.

use crate::device::{Device, numbers};
use cudarc::driver::{CudaSlice, DeviceRepr, ValidAsZeroBits};
use fuselora_kernels::lora_linear::{
    Backward, Dropout, Gradients, Lora, Output, Projection, backward, backward_workspace, forward,
    forward_workspace,
};
use fuselora_kernels::{Element, LaunchError, Operand, OperandMut, Stored};
use proptest::prelude::*;

pub const KERNELS: &[&str] = &[
    "lora_linear_da_f32",
    "lora_linear_dh_db_f32",
    "lora_linear_dh_f32",
    "lora_linear_dx_f32_128",
    "lora_linear_dx_f32_64",
    "lora_linear_forward_f32_128",
    "lora_linear_forward_f32_64",
    "lora_linear_h_f32",
    "lora_linear_sum",
];

/// One projection of a case; its numbers follow from the case's seed.
#[derive(Debug, Clone, Copy)]
struct Layer {
    out_features: usize,
    bias: bool,
    /// No update: 0.
    rank: usize,
    dropout: f32,
    frozen: bool,
}

#[derive(Debug, Clone)]
struct Case {
    tokens: usize,
    in_features: usize,
    layers: Vec<Layer>,
    seed: u64,
}

const SCALING: f32 = 1.75;

/// A storage type of activations and weights.
trait Storage: Stored + DeviceRepr + ValidAsZeroBits + Copy + Default {
    /// The most that one rounding changes a number, relatively.
    const ROUNDING: f64;
    fn from_f32(value: f32) -> Self;
    fn to_f32(self) -> f32;
}

impl Storage for f32 {
    const ROUNDING: f64 = f32::EPSILON as f64 / 2.0;
    fn from_f32(value: f32) -> f32 {
        value
    }
    fn to_f32(self) -> f32 {
        self
    }
}

/// The numbers of one projection, as the device holds them.
struct Data {
    w: Vec<f32>,
    bias: Vec<f32>,
    a: Vec<f32>,
    b: Vec<f32>,
    dy: Vec<f32>,
    /// The gradients before the backward pass adds to them.
    da: Vec<f32>,
    db: Vec<f32>,
    dropout: Option<Dropout>,
}

impl Case {
    fn stored<T: Storage>(&self, salt: u64, count: usize) -> Vec<f32> {
        let values = numbers(self.seed.wrapping_mul(31).wrapping_add(salt), count);
        values
            .into_iter()
            .map(|x| T::from_f32(x).to_f32())
            .collect()
    }

    fn data<T: Storage>(&self) -> Vec<Data> {
        let of = |(index, layer): (usize, &Layer)| {
            let (out, rank) = (layer.out_features, layer.rank);
            let salt = 10 * (index as u64 + 1);
            Data {
                w: self.stored::<T>(salt, out * self.in_features),
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
                    step: 7,
                }),
            }
        };
        self.layers.iter().enumerate().map(of).collect()
    }
}

/// What the device computed for one projection, and the gradient of the input.
#[derive(Debug, Clone, PartialEq)]
struct Results {
    y: Vec<f32>,
    h: Vec<f32>,
    da: Vec<f32>,
    db: Vec<f32>,
}

/// A copy on the device, which has no buffers of no elements.
fn not_empty(device: &Device, values: &[f32]) -> CudaSlice<f32> {
    device.upload(if values.is_empty() { &[0.0] } else { values })
}

fn on_device<T: Storage>(
    device: &Device,
    case: &Case,
    data: &[Data],
    x: &[f32],
    order: u64,
) -> Result<(Vec<Results>, Vec<f32>), LaunchError> {
    let store = |values: &[f32]| -> CudaSlice<T> {
        device.upload(&values.iter().map(|&x| T::from_f32(x)).collect::<Vec<_>>())
    };
    let load = |values: &CudaSlice<T>| -> Vec<f32> {
        device.download(values).into_iter().map(T::to_f32).collect()
    };
    device.shuffle(order);
    let (tokens, in_features) = (case.tokens as u32, case.in_features as u32);
    let x = store(x);
    let inputs: Vec<_> = data
        .iter()
        .map(|data| {
            let f32s = [&data.bias, &data.a, &data.b].map(|values| not_empty(device, values));
            (store(&data.w), store(&data.dy), f32s)
        })
        .collect();
    let projections: Vec<Projection> = case
        .layers
        .iter()
        .zip(data)
        .zip(&inputs)
        .map(|((layer, data), (w, _, [bias, a, b]))| Projection {
            weight: device.operand(w),
            bias: layer.bias.then(|| device.operand(bias)),
            out_features: layer.out_features as u32,
            lora: (layer.rank > 0).then(|| Lora {
                a: device.operand(a),
                b: device.operand(b),
                rank: layer.rank as u32,
                scaling: SCALING,
                dropout: data.dropout,
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

/// `c[i][j] = Σ a[i][d]·b[d][j]`, with the strides of each factor along (i or j) and d.
fn product(
    [m, n, k]: [usize; 3],
    a: &[f64],
    (a_edge, a_depth): (usize, usize),
    b: &[f64],
    (b_edge, b_depth): (usize, usize),
) -> Vec<f64> {
    (0..m * n)
        .map(|i| {
            let (row, col) = (i / n, i % n);
            (0..k)
                .map(|d| a[row * a_edge + d * a_depth] * b[col * b_edge + d * b_depth])
                .sum()
        })
        .collect()
}

fn add(to: &mut [f64], values: &[f64], scaling: f64) {
    to.iter_mut()
        .zip(values)
        .for_each(|(to, value)| *to += scaling * value);
}

/// One projection in f64: the frozen part and the update apart, for they are rounded differently.
struct Exact {
    y: Vec<f64>,
    y_update: Vec<f64>,
    h: Vec<f64>,
    da: Vec<f64>,
    db: Vec<f64>,
    dx: Vec<f64>,
    dx_update: Vec<f64>,
}

/// The projection on `number` of each of its numbers: the identity, or the magnitude that bounds what
/// rounding can do.
fn exact(case: &Case, layer: &Layer, data: &Data, x: &[f32], number: fn(f32) -> f64) -> Exact {
    let all = |values: &[f32]| -> Vec<f64> { values.iter().map(|&x| number(x)).collect() };
    let (t, i, o, r) = (
        case.tokens,
        case.in_features,
        layer.out_features,
        layer.rank,
    );
    let scaling = f64::from(SCALING);
    let [x, w, a, b, dy] = [x, &data.w, &data.a, &data.b, &data.dy].map(all);
    let keep = kept(data.dropout, t * i);
    let dropped: Vec<f64> = x.iter().zip(&keep).map(|(x, keep)| x * keep).collect();

    let mut y = product([t, o, i], &x, (i, 1), &w, (i, 1));
    if layer.bias {
        for y in y.chunks_exact_mut(o) {
            add(y, &all(&data.bias), 1.0);
        }
    }
    let h = product([t, r, i], &dropped, (i, 1), &a, (i, 1));
    let mut y_update = vec![0.0; t * o];
    add(
        &mut y_update,
        &product([t, o, r], &h, (r, 1), &b, (r, 1)),
        scaling,
    );

    let mut dh = vec![0.0; t * r];
    add(
        &mut dh,
        &product([t, r, o], &dy, (o, 1), &b, (1, r)),
        scaling,
    );
    let (mut da, mut db) = (all(&data.da), all(&data.db));
    if !layer.frozen {
        add(
            &mut da,
            &product([r, i, t], &dh, (1, r), &dropped, (1, i)),
            1.0,
        );
        add(
            &mut db,
            &product([o, r, t], &dy, (1, o), &h, (1, r)),
            scaling,
        );
    }
    let dx = product([t, i, o], &dy, (o, 1), &w, (1, i));
    let mut dx_update = product([t, i, r], &dh, (r, 1), &a, (1, i));
    dx_update
        .iter_mut()
        .zip(&keep)
        .for_each(|(dx, keep)| *dx *= keep);
    Exact {
        y,
        y_update,
        h,
        da,
        db,
        dx,
        dx_update,
    }
}

/// What dropout multiplies each element with.
fn kept(dropout: Option<Dropout>, count: usize) -> Vec<f64> {
    let Some(dropout) = dropout else {
        return vec![1.0; count];
    };
    let factor = |index: usize| {
        let words = philox(
            [dropout.seed as u32, (dropout.seed >> 32) as u32],
            [(index / 4) as u32, 0, dropout.stream, dropout.step],
        );
        let uniform = (words[index % 4] >> 8) as f32 / 16_777_216.0;
        match uniform >= dropout.probability {
            true => 1.0 / (1.0 - f64::from(dropout.probability)),
            false => 0.0,
        }
    };
    (0..count).map(factor).collect()
}

/// Philox4x32-10.
fn philox(mut key: [u32; 2], mut c: [u32; 4]) -> [u32; 4] {
    for _ in 0..10 {
        let (p, q) = (u64::from(c[0]) * 0xD251_1F53, u64::from(c[2]) * 0xCD9E_8D57);
        c = [
            (q >> 32) as u32 ^ c[1] ^ key[0],
            q as u32,
            (p >> 32) as u32 ^ c[3] ^ key[1],
            p as u32,
        ];
        key = [
            key[0].wrapping_add(0x9E37_79B9),
            key[1].wrapping_add(0xBB67_AE85),
        ];
    }
    c
}

fn check(
    name: &str,
    found: &[f32],
    expected: &[f64],
    bound: impl Fn(usize) -> f64,
) -> Result<(), TestCaseError> {
    prop_assert_eq!(found.len(), expected.len());
    for (i, (&found, &expected)) in found.iter().zip(expected).enumerate() {
        let error = (f64::from(found) - expected).abs();
        prop_assert!(
            error <= bound(i),
            "{}[{}] = {}, not {}: {:e} off where {:e} is allowed",
            name,
            i,
            found,
            expected,
            error,
            bound(i)
        );
    }
    Ok(())
}

/// Holds a case against f64. A sum of n products keeps an error below (n + 1) u times the sum of
/// their magnitudes in any order, with u half of f32's epsilon. The factors of the update are rounded to
/// the storage type where they meet tensor cores, which adds that type's rounding once for each
/// factor on the way; a result of that type is rounded once more.
fn agrees<T: Storage>(case: &Case) -> Result<(), TestCaseError> {
    let device = Device::open();
    let x = case.stored::<T>(0, case.tokens * case.in_features);
    let data = case.data::<T>();
    let (results, dx) = on_device::<T>(&device, case, &data, &x, case.seed)?;
    let again = on_device::<T>(&device, case, &data, &x, !case.seed)?;
    prop_assert_eq!(
        &(results.clone(), dx.clone()),
        &again,
        "another order, other bits"
    );

    let f32_rounding = f64::from(f32::EPSILON) / 2.0;
    let sums = |terms: usize| (terms + 8) as f64 * f32_rounding;
    let (t, i) = (case.tokens, case.in_features);
    let (mut dx_exact, mut dx_bound) = (vec![0.0; t * i], vec![0.0; t * i]);
    let all_outs: usize = case
        .layers
        .iter()
        .map(|layer| layer.out_features + layer.rank)
        .sum();
    for ((layer, data), found) in case.layers.iter().zip(&data).zip(&results) {
        let (o, r) = (layer.out_features, layer.rank);
        let exact_of = |number| exact(case, layer, data, &x, number);
        let value = exact_of(|x| x.into());
        let size = exact_of(|x| x.abs().into());
        check("h", &found.h, &value.h, |e| {
            (sums(i) + 2.0 * T::ROUNDING) * size.h[e]
        })?;
        let mut y = value.y.clone();
        add(&mut y, &value.y_update, 1.0);
        check("y", &found.y, &y, |e| {
            sums(i + r) * size.y[e]
                + (sums(i + r) + 4.0 * T::ROUNDING) * size.y_update[e]
                + T::ROUNDING * y[e].abs()
        })?;
        check("da", &found.da, &value.da, |e| {
            (sums(t + o) + 4.0 * T::ROUNDING) * size.da[e]
        })?;
        check("db", &found.db, &value.db, |e| {
            (sums(t + i) + 4.0 * T::ROUNDING) * size.db[e]
        })?;
        add(&mut dx_exact, &value.dx, 1.0);
        add(&mut dx_exact, &value.dx_update, 1.0);
        add(&mut dx_bound, &size.dx, sums(all_outs));
        add(
            &mut dx_bound,
            &size.dx_update,
            sums(all_outs + o) + 4.0 * T::ROUNDING,
        );
    }
    check("dx", &dx, &dx_exact, |e| {
        dx_bound[e] + T::ROUNDING * dx_exact[e].abs()
    })
}

fn layer() -> impl Strategy<Value = Layer> {
    let rank = prop_oneof![1 => Just(0), 4 => 1usize..20, 2 => 20usize..70, 1 => Just(256)];
    let dropout = prop_oneof![Just(0.0f32), 0.05f32..0.6];
    let out = prop_oneof![1usize..90, (1usize..12).prop_map(|eights| 8 * eights)];
    (out, any::<bool>(), rank, dropout, prop::bool::weighted(0.2)).prop_map(
        |(out_features, bias, rank, dropout, frozen)| Layer {
            out_features,
            bias,
            rank,
            dropout,
            frozen,
        },
    )
}

fn case() -> impl Strategy<Value = Case> {
    let extent = || prop_oneof![1usize..90, (1usize..12).prop_map(|eights| 8 * eights)];
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
            seed,
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(10))]

    #[test]
    fn agrees_in_f32(case in case()) {
        agrees::<f32>(&case)?;
    }
}

/// Enough tiles for the larger ones, which the extents above never reach.
#[test]
fn many_tiles() {
    for (in_features, out_features, dropout) in [(9, 8135, 0.0), (8135, 9, 0.3)] {
        let layer = Layer {
            out_features,
            bias: true,
            rank: 5,
            dropout,
            frozen: false,
        };
        let case = Case {
            tokens: 70,
            in_features,
            layers: vec![layer],
            seed: 1,
        };
        agrees::<f32>(&case).unwrap();
    }
}

#[test]
fn names_what_does_not_fit() {
    let device = Device::open();
    let buffer = device.upload(&[0.0f32; 64]);
    let of = |len: usize| {
        // SAFETY: within the buffer, which outlives the calls.
        unsafe { Operand::from_raw(device.operand(&buffer).address(), len, Element::F32) }
    };
    let run = |x: usize, rank: u32, b: usize, h: Option<usize>, probability: f32| {
        let mut others: Vec<_> = (0..3).map(|_| device.output::<f32>(4096)).collect();
        let [y, h_buffer, workspace] = others.as_mut_slice() else {
            unreachable!()
        };
        let dropout = Dropout {
            probability,
            seed: 0,
            stream: 0,
            step: 0,
        };
        let projection = Projection {
            weight: of(6),
            bias: None,
            out_features: 3,
            lora: Some(Lora {
                a: of(2 * rank as usize),
                b: of(b),
                rank,
                scaling: 1.0,
                dropout: Some(dropout),
            }),
        };
        let output = Output {
            y: shortened(&device, y, 12),
            h: h.map(|len| shortened(&device, h_buffer, len)),
        };
        let (outputs, workspace) = ([output], device.operand_mut(workspace));
        let x = of(x);
        forward(&device.kernels, 4, 2, x, &[projection], &outputs, workspace)
            .map_err(|error| error.to_string())
    };
    assert_eq!(run(8, 2, 6, Some(8), 0.5), Ok(()));
    for (result, expected) in [
        (
            run(7, 2, 6, Some(8), 0.0),
            "x holds 7 elements where 8 were expected",
        ),
        (
            run(8, 0, 0, Some(8), 0.0),
            "rank is 0: it must be from 1 to 256",
        ),
        (
            run(8, 2, 5, Some(8), 0.0),
            "lora_b holds 5 elements where 6 were expected",
        ),
        (
            run(8, 2, 6, Some(9), 0.0),
            "h holds 9 elements where 8 were expected",
        ),
        (
            run(8, 2, 6, None, 0.0),
            "h holds 0 elements where 8 were expected",
        ),
        (
            run(8, 2, 6, Some(8), 1.0),
            "dropout probability, in percent is 100: it must be at least 0 and below 100",
        ),
    ] {
        assert_eq!(result, Err(expected.to_owned()));
    }
}

fn shortened<'a>(device: &'a Device, buffer: &'a mut CudaSlice<f32>, len: usize) -> OperandMut<'a> {
    let operand = device.operand_mut(buffer);
    assert!(len as u64 <= operand.len());
    // SAFETY: the first elements of a buffer that is borrowed mutably.
    unsafe { OperandMut::from_raw(operand.address(), len, Element::F32) }
}
