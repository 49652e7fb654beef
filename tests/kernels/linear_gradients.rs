//! Gradients of a linear layer's own parameters.

use crate::device::{Device, numbers};
use crate::storage::{Storage, check_close, for_every_storage, stored};
use fuselora_kernels::abi::ColumnSumShape;
use fuselora_kernels::linear_gradients::{bias, weight};
use half::{bf16, f16};
use proptest::prelude::*;
use proptest::test_runner::TestCaseError;

pub const KERNELS: &[&str] = &[
    "bias_gradient_f32",
    "bias_gradient_f16",
    "bias_gradient_bf16",
    "weight_gradient_f32",
    "weight_gradient_f16_large",
    "weight_gradient_f16_small",
    "weight_gradient_f16_unaligned",
    "weight_gradient_bf16_large",
    "weight_gradient_bf16_small",
    "weight_gradient_bf16_unaligned",
];

/// Adds to what was there; every order of blocks and warps gives the same bits.
fn of_the_weight<T: Storage>(
    [tokens, out_features, in_features]: [usize; 3],
    seed: u64,
) -> Result<(), TestCaseError> {
    let device = Device::open();
    let (dy, x) = (
        stored::<T>(seed, tokens * out_features),
        stored::<T>(!seed, tokens * in_features),
    );
    let before = numbers(seed ^ 1, out_features * in_features);
    let (dy_device, x_device) = (device.upload(&dy), device.upload(&x));
    let run = |order: u64| -> Result<Vec<f32>, TestCaseError> {
        device.shuffle(order);
        let mut dw = device.upload(&before);
        weight(
            &device.kernels,
            tokens as u32,
            out_features as u32,
            in_features as u32,
            device.operand(&dy_device),
            device.operand(&x_device),
            device.operand_mut(&mut dw),
        )?;
        Ok(device.download(&dw))
    };
    let exact = |i: usize| {
        let (o, column) = (i / in_features, i % in_features);
        let products = (0..tokens)
            .map(|t| dy[t * out_features + o].value() * x[t * in_features + column].value());
        f64::from(before[i]) + products.sum::<f64>()
    };
    let expected: Vec<f64> = (0..before.len()).map(exact).collect();
    let found = run(seed)?;
    check_close("dw", &found, &expected, tokens as f64)?;
    prop_assert!(found == run(!seed)?, "another order, other bits");
    Ok(())
}

fn of_the_bias<T: Storage>(tokens: usize, features: usize, seed: u64) -> Result<(), TestCaseError> {
    let device = Device::open();
    device.shuffle(seed);
    let (dy, before) = (
        stored::<T>(seed, tokens * features),
        numbers(!seed, features),
    );
    let dy_device = device.upload(&dy);
    let mut dbias = device.upload(&before);
    let shape = ColumnSumShape {
        tokens: tokens as u32,
        features: features as u32,
    };
    let scaling = -1.3f32;
    bias(
        &device.kernels,
        shape,
        device.operand(&dy_device),
        scaling,
        device.operand_mut(&mut dbias),
    )?;
    let exact = |o: usize| {
        let sum: f64 = (0..tokens).map(|t| dy[t * features + o].value()).sum();
        f64::from(before[o]) + f64::from(scaling) * sum
    };
    let expected: Vec<f64> = (0..features).map(exact).collect();
    check_close("dbias", &device.download(&dbias), &expected, tokens as f64)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn weights_have_their_gradient(
        tokens in 1usize..90,
        (out_features, in_features) in prop_oneof![
            (1usize..140, 1usize..140),
            (1usize..18, 1usize..20).prop_map(|(out, features)| (8 * out, 8 * features)),
        ],
        seed: u64,
    ) {
        for_every_storage!(of_the_weight([tokens, out_features, in_features], seed));
    }

    #[test]
    fn biases_have_their_gradient(
        tokens in 1usize..100, features in prop_oneof![1usize..70, Just(64), Just(160)], seed: u64,
    ) {
        for_every_storage!(of_the_bias(tokens, features, seed));
    }
}

/// Enough tiles for the larger ones, which the extents above never reach.
#[test]
fn many_tiles() {
    of_the_weight::<bf16>([40, 136, 12296], 1).unwrap();
    of_the_weight::<f16>([70, 12296, 136], 3).unwrap();
}
