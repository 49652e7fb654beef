//! Weight-decomposed low-rank adaptation.

use crate::device::{Device, numbers};
use crate::storage::{Storage, check_close, for_every_storage, stored};
use fuselora_kernels::abi::{ColumnSumShape, DoraWeight};
use fuselora_kernels::dora::{backward, forward, gain, scale_rows, weight_norm};
use proptest::prelude::*;
use proptest::test_runner::TestCaseError;

pub const KERNELS: &[&str] = &[
    "dora_gain",
    "dora_scale_rows",
    "dora_weight_norm_f32",
    "dora_weight_norm_f16",
    "dora_weight_norm_bf16",
    "dora_forward_f32",
    "dora_forward_f16",
    "dora_forward_bf16",
    "dora_backward_f32",
    "dora_backward_f16",
    "dora_backward_bf16",
];

const SCALING: f32 = 0.7;

/// The norms of a weight that is given in two parts, as one in NF4 is.
fn norms<T: Storage>(
    [rows, columns, rank, first_part]: [usize; 4],
    seed: u64,
) -> Result<(), TestCaseError> {
    let device = Device::open();
    let w = stored::<T>(seed, rows * columns);
    let (a, b) = (
        numbers(seed ^ 1, rank * columns),
        numbers(seed ^ 2, rows * rank),
    );
    let (a_device, b_device) = (device.upload(&a), device.upload(&b));
    let run = |order: u64| -> Result<Vec<f32>, TestCaseError> {
        device.shuffle(order);
        let mut norm = device.output::<f32>(rows);
        let parts = [(0, first_part), (first_part, rows - first_part)];
        for (first, part) in parts.into_iter().filter(|(_, part)| *part > 0) {
            let w_device = device.upload(&w[first * columns..][..part * columns]);
            let shape = DoraWeight {
                first_row: first as u32,
                rows: part as u32,
                in_features: columns as u32,
                rank: rank as u32,
                scaling: SCALING,
            };
            weight_norm(
                &device.kernels,
                shape,
                device.operand(&w_device),
                device.operand(&a_device),
                device.operand(&b_device),
                device.operand_mut(&mut norm),
            )?;
        }
        Ok(device.download(&norm))
    };
    let adapted = |row: usize, column: usize| {
        let update: f64 = (0..rank)
            .map(|r| f64::from(b[row * rank + r]) * f64::from(a[r * columns + column]))
            .sum();
        w[row * columns + column].value() + f64::from(SCALING) * update
    };
    let norm_of = |row: usize| {
        let squares = (0..columns).map(|column| adapted(row, column).powi(2));
        squares.sum::<f64>().sqrt()
    };
    let expected: Vec<f64> = (0..rows).map(norm_of).collect();
    let found = run(seed)?;
    check_close("norm", &found, &expected, 0.0)?;
    prop_assert!(found == run(!seed)?, "another order, other bits");
    Ok(())
}

fn magnitudes<T: Storage>(
    tokens: usize,
    features: usize,
    with_bias: bool,
    seed: u64,
) -> Result<(), TestCaseError> {
    let device = Device::open();
    device.shuffle(seed);
    let positive = |seed: u64| -> Vec<f32> {
        numbers(seed, features)
            .iter()
            .map(|x| x.abs() + 0.5)
            .collect()
    };
    let (magnitude, norm) = (positive(seed ^ 1), positive(seed ^ 2));
    let (bias, before) = (numbers(seed ^ 3, features), numbers(seed ^ 4, features));
    let (z, dy) = (
        stored::<T>(seed ^ 5, tokens * features),
        stored::<T>(seed ^ 6, tokens * features),
    );
    let (magnitude_device, norm_device) = (device.upload(&magnitude), device.upload(&norm));
    let mut gain_device = device.output::<f32>(features);
    gain(
        &device.kernels,
        device.operand(&magnitude_device),
        device.operand(&norm_device),
        device.operand_mut(&mut gain_device),
    )?;
    let gains: Vec<f32> = magnitude.iter().zip(&norm).map(|(m, n)| m / n).collect();
    prop_assert_eq!(device.download(&gain_device), gains.clone());

    let shape = ColumnSumShape {
        tokens: tokens as u32,
        features: features as u32,
    };
    let (z_device, dy_device, bias_device) =
        (device.upload(&z), device.upload(&dy), device.upload(&bias));
    let mut y = device.output::<T>(tokens * features);
    forward(
        &device.kernels,
        shape,
        device.operand(&z_device),
        device.operand(&gain_device),
        with_bias.then(|| device.operand(&bias_device)),
        device.operand_mut(&mut y),
    )?;
    let of = |i: usize| (i % features, f64::from(gains[i % features]));
    let y_exact = |i: usize| {
        let (o, gain) = of(i);
        gain * z[i].value() + if with_bias { f64::from(bias[o]) } else { 0.0 }
    };
    let expected: Vec<f64> = (0..tokens * features).map(y_exact).collect();
    check_close("y", &device.download(&y), &expected, 1.0)?;

    // A weight of as many rows as there are features.
    let (mut weight, columns) = (numbers(seed ^ 7, features * tokens), tokens);
    let mut weight_device = device.upload(&weight);
    scale_rows(
        &device.kernels,
        columns as u32,
        device.operand_mut(&mut weight_device),
        device.operand(&gain_device),
    )?;
    for (row, gain) in weight.chunks_exact_mut(columns).zip(&gains) {
        row.iter_mut().for_each(|value| *value *= gain);
    }
    prop_assert_eq!(device.download(&weight_device), weight);

    let mut dz = device.output::<T>(tokens * features);
    let mut dmagnitude = device.upload(&before);
    backward(
        &device.kernels,
        shape,
        device.operand(&dy_device),
        device.operand(&z_device),
        device.operand(&gain_device),
        device.operand(&norm_device),
        device.operand_mut(&mut dz),
        device.operand_mut(&mut dmagnitude),
    )?;
    let dz_exact: Vec<f64> = (0..tokens * features)
        .map(|i| of(i).1 * dy[i].value())
        .collect();
    check_close("dz", &device.download(&dz), &dz_exact, 0.0)?;
    let dmagnitude_exact = |o: usize| {
        let products = (0..tokens).map(|t| t * features + o);
        let sum: f64 = products.map(|i| dy[i].value() * z[i].value()).sum();
        f64::from(before[o]) + sum / f64::from(norm[o])
    };
    let expected: Vec<f64> = (0..features).map(dmagnitude_exact).collect();
    check_close(
        "dmagnitude",
        &device.download(&dmagnitude),
        &expected,
        tokens as f64,
    )?;
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn adapted_rows_have_their_norm(
        rows in 1usize..80, columns in prop_oneof![1usize..200, Just(128), Just(256)], rank in 1usize..40,
        part in 0.0..1.0f64, seed: u64,
    ) {
        let first_part = (part * rows as f64) as usize;
        for_every_storage!(norms([rows, columns, rank, first_part], seed));
    }

    #[test]
    fn outputs_have_their_magnitude(
        tokens in 1usize..100, features in prop_oneof![1usize..70, Just(64), Just(160)], with_bias: bool, seed: u64,
    ) {
        for_every_storage!(magnitudes(tokens, features, with_bias, seed));
    }
}
