//! The linear layer with an NF4 weight for a few tokens.

use crate::device::{Device, numbers};
use crate::nf4::Quantized;
use crate::storage::{Storage, stored};
use fuselora_kernels::lora_linear::{Lora, Output, Projection, Weight, forward, forward_workspace};
use half::{bf16, f16};
use proptest::prelude::*;

pub const KERNELS: &[&str] = &["nf4_gemv_bf16", "nf4_gemv_f16", "nf4_gemv_f32"];

#[derive(Debug, Clone, Copy)]
struct Case {
    tokens: usize,
    in_features: usize,
    out_features: usize,
    block_size: u32,
    nested: bool,
    bias: bool,
    /// No update: 0.
    rank: usize,
    seed: u64,
}

const SCALING: f32 = 0.75;

/// Holds a case against f64. A weight in a 16-bit type is rounded once, as are the factors of the update and a
/// result; the sums are f32.
fn agrees<T: Storage>(case: Case) -> Result<(), TestCaseError> {
    let Case {
        tokens: t,
        in_features: i,
        out_features: o,
        rank: r,
        seed,
        ..
    } = case;
    let (x, bias) = (stored::<T>(seed ^ 10, t * i), numbers(seed ^ 11, o));
    let (a, b) = (
        numbers(seed ^ 12, (r * i).max(1)),
        numbers(seed ^ 13, (o * r).max(1)),
    );
    let weight = Quantized::random(o * i, case.block_size, case.nested, seed);

    let device = Device::open();
    device.shuffle(seed);
    let uploaded = weight.upload(&device);
    let (x_device, bias_device) = (device.upload(&x), device.upload(&bias));
    let (a_device, b_device) = (device.upload(&a), device.upload(&b));
    let mut y = device.output::<T>(t * o);
    let mut h = device.output::<f32>((t * r).max(1));
    let projection = Projection {
        weight: Weight::Nf4(uploaded.weight(&device)),
        bias: case.bias.then(|| device.operand(&bias_device)),
        out_features: o as u32,
        lora: (r > 0).then(|| Lora {
            a: device.operand(&a_device),
            b: device.operand(&b_device),
            rank: r as u32,
            scaling: SCALING,
            dropout: None,
        }),
    };
    let len = forward_workspace(t as u32, i as u32, &[projection]);
    let mut workspace = device.output::<f32>(len.max(1) as usize);
    let output = Output {
        y: device.operand_mut(&mut y),
        h: (r > 0).then(|| device.operand_mut(&mut h)),
    };
    forward(
        &device.kernels,
        t as u32,
        i as u32,
        device.operand(&x_device),
        &[projection],
        &[output],
        device.operand_mut(&mut workspace),
    )?;
    prop_assert_eq!(
        device.kernels.last().map(|name| &name[..8]),
        Some("nf4_gemv")
    );

    let (found, w) = (device.download(&y), weight.values());
    for (index, found) in found.into_iter().enumerate() {
        let (token, row) = (index / o, index % o);
        let x = &x[token * i..][..i];
        let dot = |w: &[f32]| -> (f64, f64) {
            let terms = x.iter().zip(w).map(|(x, &w)| x.value() * f64::from(w));
            terms.fold((0.0, 0.0), |(sum, size), term| {
                (sum + term, size + term.abs())
            })
        };
        let (mut expected, size) = dot(&w[row * i..][..i]);
        let mut update_size = 0.0;
        for rank in 0..r {
            let factor = f64::from(SCALING) * f64::from(b[row * r + rank]);
            let (h, h_size) = dot(&a[rank * i..][..i]);
            expected += factor * h;
            update_size += factor.abs() * h_size;
        }
        if case.bias {
            expected += f64::from(bias[row]);
        }
        let sums = (i + r + 16) as f64 * f64::from(f32::EPSILON) / 2.0;
        let rounding = if T::ROUNDING > 1e-6 { T::ROUNDING } else { 0.0 };
        let bound = (sums + rounding) * (size + 1.0)
            + (sums + 4.0 * rounding) * update_size
            + T::ROUNDING * expected.abs();
        let error = (found.value() - expected).abs();
        prop_assert!(
            error <= bound,
            "y[{}][{}] = {}, not {}: {:e} off where {:e} is allowed",
            token,
            row,
            found.value(),
            expected,
            error,
            bound
        );
    }
    Ok(())
}

fn case() -> impl Strategy<Value = Case> {
    let extents = (1usize..=8, 1usize..=20, prop_oneof![1usize..40, Just(16)]);
    let rank = prop_oneof![Just(0), 1usize..40];
    (extents, 6u32..=12, any::<[bool; 2]>(), rank, any::<u64>()).prop_map(
        |((tokens, steps, out_features), log2, [nested, bias], rank, seed)| Case {
            tokens,
            in_features: 64 * steps,
            out_features,
            block_size: 1 << log2,
            nested,
            bias,
            rank,
            seed,
        },
    )
}

/// More columns than the warps of a block take at once.
const LONG: Case = Case {
    tokens: 3,
    in_features: 4096 + 64 * 11,
    out_features: 19,
    block_size: 64,
    nested: true,
    bias: true,
    rank: 9,
    seed: 5,
};

/// More rows than the blocks of an H100 take at once, 16 each.
const TALL: Case = Case {
    tokens: 2,
    in_features: 192,
    out_features: 2 * 2 * 132 * 16 + 7,
    block_size: 64,
    nested: true,
    bias: false,
    rank: 3,
    seed: 6,
};

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn agrees_in_f32(case in case()) {
        agrees::<f32>(case)?;
    }

    #[test]
    fn agrees_in_16_bits(case in case()) {
        agrees::<f16>(case)?;
        agrees::<bf16>(case)?;
    }
}

#[test]
fn long_rows() {
    agrees::<f32>(LONG).unwrap();
    agrees::<f16>(LONG).unwrap();
    agrees::<bf16>(LONG).unwrap();
}

#[test]
fn many_rows() {
    agrees::<f16>(TALL).unwrap();
    agrees::<bf16>(TALL).unwrap();
}
