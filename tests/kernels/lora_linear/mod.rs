//! The linear layer with its low-rank update, forward and backward.

mod case;
pub mod dropout;
mod reference;

use crate::device::Device;
use crate::storage::Storage;
use case::{Case, Layer, Results, case, on_device};
use cudarc::driver::CudaSlice;
use fuselora_kernels::lora_linear::{Dropout, Lora, Output, Projection, Weight, forward};
use fuselora_kernels::{Element, Operand, OperandMut};
use half::{bf16, f16};
use proptest::prelude::*;
use reference::{add, exact};

pub const KERNELS: &[&str] = &[
    "lora_linear_da_bf16",
    "lora_linear_da_f16",
    "lora_linear_da_f32",
    "lora_linear_dh_bf16",
    "lora_linear_dh_db_bf16",
    "lora_linear_dh_db_f16",
    "lora_linear_dh_db_f32",
    "lora_linear_dh_f16",
    "lora_linear_dh_f32",
    "lora_linear_dx_bf16_large",
    "lora_linear_dx_bf16_small",
    "lora_linear_dx_bf16_unaligned",
    "lora_linear_dx_f16_large",
    "lora_linear_dx_f16_small",
    "lora_linear_dx_f16_unaligned",
    "lora_linear_dx_f32_128",
    "lora_linear_dx_f32_64",
    "lora_linear_forward_bf16_large",
    "lora_linear_forward_bf16_small",
    "lora_linear_forward_bf16_unaligned",
    "lora_linear_forward_f16_large",
    "lora_linear_forward_f16_small",
    "lora_linear_forward_f16_unaligned",
    "lora_linear_forward_f32_128",
    "lora_linear_forward_f32_64",
    "lora_linear_h_bf16",
    "lora_linear_h_f16",
    "lora_linear_h_f32",
    "lora_linear_skinny_bf16_16",
    "lora_linear_skinny_bf16_8",
    "lora_linear_skinny_f16_16",
    "lora_linear_skinny_f16_8",
    "lora_linear_sum",
    "nf4_lora_linear_dx_bf16_large",
    "nf4_lora_linear_dx_bf16_small",
    "nf4_lora_linear_dx_bf16_unaligned",
    "nf4_lora_linear_dx_f16_large",
    "nf4_lora_linear_dx_f16_small",
    "nf4_lora_linear_dx_f16_unaligned",
    "nf4_lora_linear_dx_f32_128",
    "nf4_lora_linear_dx_f32_64",
    "nf4_lora_linear_forward_bf16_large",
    "nf4_lora_linear_forward_bf16_small",
    "nf4_lora_linear_forward_bf16_unaligned",
    "nf4_lora_linear_forward_f16_large",
    "nf4_lora_linear_forward_f16_small",
    "nf4_lora_linear_forward_f16_unaligned",
    "nf4_lora_linear_forward_f32_128",
    "nf4_lora_linear_forward_f32_64",
];

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

/// Holds a case against f64, and a second run, its blocks and warps in another order, against the first.
fn agrees<T: Storage>(case: &Case) -> Result<(), TestCaseError> {
    let first = agrees_in_one_order::<T>(case)?;
    let data = case.data::<T>();
    let x = case.stored::<T>(0, case.tokens * case.in_features);
    let again = on_device::<T>(&Device::open(), case, &data, &x, !case.seed)?;
    prop_assert_eq!(&first, &again, "another order, other bits");
    Ok(())
}

/// Holds a case against f64, and returns what the device computed. A sum of n products keeps an error below (n + 1) u times the sum of
/// their magnitudes in any order, with u half of f32's epsilon. Beside activations of 16 bits, a factor of
/// the update is rounded to tf32 each time that it meets tensor cores. A result of the storage type is
/// rounded once more, and so is an NF4 weight beside activations of 16 bits.
fn agrees_in_one_order<T: Storage>(case: &Case) -> Result<(Vec<Results>, Vec<f32>), TestCaseError> {
    let device = Device::open();
    let x = case.stored::<T>(0, case.tokens * case.in_features);
    let data = case.data::<T>();
    let (results, dx) = on_device::<T>(&device, case, &data, &x, case.seed)?;

    let sums = |terms: usize| (terms + 8) as f64 * f32::ROUNDING;
    let low_rank = match T::ELEMENT {
        Element::F32 => f32::ROUNDING,
        _ => 1.0 / 2048.0,
    };
    let weight = match (case.nf4, T::ELEMENT) {
        (None, _) | (_, Element::F32) => 0.0,
        _ => T::ROUNDING,
    };
    let stored = |exact: f64, error: f64| {
        // f16 has no exponent left for small numbers.
        let smallest = if T::ELEMENT == Element::F16 {
            3.1e-8
        } else {
            0.0
        };
        error + T::ROUNDING * (exact.abs() + error) + smallest
    };
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
        // lora_a is rounded.
        check("h", &found.h, &value.h, |e| {
            (sums(i) + low_rank) * size.h[e]
        })?;
        let mut y = value.y.clone();
        add(&mut y, &value.y_update, 1.0);
        // And h, and lora_b.
        check("y", &found.y, &y, |e| {
            let update = (2.0 * sums(i + r) + 3.0 * low_rank) * size.y_update[e];
            stored(y[e], (sums(i + r) + weight) * size.y[e] + update)
        })?;
        // lora_b on the way to dh, and dh.
        check("da", &found.da, &value.da, |e| {
            (sums(t + o) + 2.0 * low_rank) * size.da[e]
        })?;
        // lora_a on the way to h, and h.
        check("db", &found.db, &value.db, |e| {
            (sums(t + i) + 2.0 * low_rank) * size.db[e]
        })?;
        add(&mut dx_exact, &value.dx, 1.0);
        add(&mut dx_exact, &value.dx_update, 1.0);
        add(&mut dx_bound, &size.dx, sums(all_outs) + weight);
        add(
            &mut dx_bound,
            &size.dx_update,
            sums(all_outs + o) + 3.0 * low_rank,
        );
    }
    check("dx", &dx, &dx_exact, |e| stored(dx_exact[e], dx_bound[e]))?;
    Ok((results, dx))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(10))]

    #[test]
    fn agrees_in_f32(case in case()) {
        agrees::<f32>(&case)?;
    }

    #[test]
    fn agrees_in_f16(case in case()) {
        agrees::<f16>(&case)?;
    }

    /// Generation: whole chunks of 16 bytes and few tokens.
    #[test]
    fn agrees_for_few_tokens(mut case in case(), tokens in 1usize..=16) {
        case.tokens = tokens;
        case.in_features = case.in_features.next_multiple_of(8);
        for layer in &mut case.layers {
            layer.out_features = layer.out_features.next_multiple_of(8);
        }
        agrees::<f16>(&case)?;
        agrees::<bf16>(&case)?;
    }

    #[test]
    fn agrees_in_bf16(case in case()) {
        agrees::<bf16>(&case)?;
    }

    /// Every size of block, from rows of a part of one to rows of many. The passes of an update never see a weight: it is
    /// small here, to be added within the tile.
    #[test]
    fn agrees_in_nf4(case in case(), log2_block_size in 5u32..=12, nested: bool) {
        let nf4 = Some((1 << log2_block_size, nested));
        let mut case = Case { nf4, ..case };
        case.layers.truncate(2);
        for layer in &mut case.layers {
            layer.rank = layer.rank.min(20);
        }
        agrees::<f32>(&case)?;
        agrees::<f16>(&case)?;
        agrees::<bf16>(&case)?;
    }
}

/// A projection with everything.
fn one_layer(tokens: usize, in_features: usize, out_features: usize, dropout: f32) -> Case {
    let layer = Layer {
        out_features,
        bias: true,
        rank: 5,
        dropout,
        frozen: false,
    };
    Case {
        tokens,
        in_features,
        layers: vec![layer],
        nf4: None,
        seed: 1,
    }
}

/// Enough tiles for the larger ones, which the extents above never reach. Blocks write tiles of their own, so that
/// another order would show nothing that it does not show on fewer.
#[test]
fn many_tiles() {
    for nf4 in [None, Some((64, true))] {
        let case = |in_features, out_features, tokens, dropout| Case {
            nf4,
            ..one_layer(tokens, in_features, out_features, dropout)
        };
        agrees_in_one_order::<f32>(&case(9, 8135, 70, 0.0)).unwrap();
        agrees_in_one_order::<f32>(&case(8135, 9, 70, 0.3)).unwrap();
        agrees_in_one_order::<f16>(&case(136, 12296, 136, 0.0)).unwrap();
        agrees_in_one_order::<bf16>(&case(12296, 136, 136, 0.3)).unwrap();
    }
}

/// Enough blocks for those of a pass to cover more than one of its tiles.
#[test]
fn many_tiles_of_a_pass() {
    agrees_in_one_order::<bf16>(&one_layer(2050, 2056, 8, 0.3)).unwrap();
    agrees_in_one_order::<f16>(&one_layer(1030, 9, 2049, 0.0)).unwrap();
}

#[test]
fn names_what_does_not_fit() {
    let device = Device::open();
    let buffer = device.upload(&[0.0f32; 64]);
    let of = |len: usize| {
        // SAFETY: within the buffer, which outlives the calls.
        unsafe { Operand::from_raw(device.operand(&buffer).address(), len, Element::F32) }
    };
    let step = device.upload(&[0u32]);
    let run = |x: usize, rank: u32, b: usize, h: Option<usize>, probability: f32| {
        let mut others: Vec<_> = (0..3).map(|_| device.output::<f32>(4096)).collect();
        let [y, h_buffer, workspace] = others.as_mut_slice() else {
            unreachable!()
        };
        let dropout = Dropout {
            probability,
            seed: 0,
            stream: 0,
            step: device.operand(&step),
        };
        let projection = Projection {
            weight: Weight::Dense(of(6)),
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
