//! Element-wise operations.

use crate::device::Device;
use crate::storage::{Storage, exact, for_every_storage, stored};
use fuselora_kernels::LaunchError;
use fuselora_kernels::elementwise::{add_assign, cast, find_nonfinite, scale, subtract_assign};
use half::{bf16, f16};
use proptest::prelude::*;
use proptest::test_runner::TestCaseError;

pub const KERNELS: &[&str] = &[
    "cast_f32_f16",
    "cast_f32_bf16",
    "cast_f16_f32",
    "cast_f16_bf16",
    "cast_bf16_f32",
    "cast_bf16_f16",
    "add_assign_f32",
    "add_assign_f16",
    "add_assign_bf16",
    "subtract_assign_f32",
    "subtract_assign_f16",
    "subtract_assign_bf16",
    "scale_f32",
    "scale_f16",
    "scale_bf16",
    "find_nonfinite_f32",
    "find_nonfinite_f16",
    "find_nonfinite_bf16",
];

type Tested = Result<(), TestCaseError>;

/// Every conversion rounds once, to nearest even, as `half` does.
fn casts_to<From: Storage, To: Storage>(count: usize, seed: u64) -> Tested {
    let device = Device::open();
    device.shuffle(seed);
    let x = stored::<From>(seed, count);
    let x_device = device.upload(&x);
    let mut y = device.output::<To>(count);
    cast(
        &device.kernels,
        device.operand(&x_device),
        device.operand_mut(&mut y),
    )?;
    // Each storage type is exact in f32.
    let expected: Vec<To> = x.iter().map(|x| To::of(x.value() as f32)).collect();
    prop_assert_eq!(exact(&device.download(&y)), exact(&expected));
    Ok(())
}

fn adds_scales_and_subtracts<T: Storage>(count: usize, factor: f32, seed: u64) -> Tested {
    let device = Device::open();
    device.shuffle(seed);
    let (x, y) = (stored::<T>(seed, count), stored::<T>(!seed, count));
    let x_device = device.upload(&x);
    let mut y_device = device.upload(&y);
    add_assign(
        &device.kernels,
        device.operand(&x_device),
        device.operand_mut(&mut y_device),
    )?;
    let sums: Vec<T> = x
        .iter()
        .zip(&y)
        .map(|(x, y)| T::of(x.value() as f32 + y.value() as f32))
        .collect();
    prop_assert_eq!(exact(&device.download(&y_device)), exact(&sums));
    scale(&device.kernels, device.operand_mut(&mut y_device), factor)?;
    let scaled: Vec<T> = sums
        .iter()
        .map(|x| T::of(factor * x.value() as f32))
        .collect();
    prop_assert_eq!(exact(&device.download(&y_device)), exact(&scaled));
    subtract_assign(
        &device.kernels,
        device.operand(&x_device),
        device.operand_mut(&mut y_device),
    )?;
    let differences: Vec<T> = x
        .iter()
        .zip(&scaled)
        .map(|(x, y)| T::of(y.value() as f32 - x.value() as f32))
        .collect();
    prop_assert_eq!(exact(&device.download(&y_device)), exact(&differences));
    Ok(())
}

fn finds_the_first<T: Storage>(count: usize, bad: &[usize], seed: u64) -> Tested {
    let device = Device::open();
    device.shuffle(seed);
    let mut x = stored::<T>(seed, count);
    for (i, &at) in bad.iter().enumerate() {
        x[at % count] = T::of([f32::NAN, f32::INFINITY, f32::NEG_INFINITY][i % 3]);
    }
    let x_device = device.upload(&x);
    let mut first = device.upload(&[u32::MAX]);
    find_nonfinite(
        &device.kernels,
        device.operand(&x_device),
        device.operand_mut(&mut first),
    )?;
    let expected = x.iter().position(|x| !x.value().is_finite());
    prop_assert_eq!(
        device.download(&first)[0],
        expected.map_or(u32::MAX, |at| at as u32)
    );
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]

    #[test]
    fn casts_round_once(count in 1usize..9000, seed: u64) {
        casts_to::<f32, f16>(count, seed)?;
        casts_to::<f32, bf16>(count, seed)?;
        casts_to::<f16, f32>(count, seed)?;
        casts_to::<f16, bf16>(count, seed)?;
        casts_to::<bf16, f32>(count, seed)?;
        casts_to::<bf16, f16>(count, seed)?;
    }

    #[test]
    fn sums_and_multiples_round_once(count in 1usize..9000, factor in -3.0f32..3.0, seed: u64) {
        for_every_storage!(adds_scales_and_subtracts(count, factor, seed));
    }

    #[test]
    fn the_first_bad_element_is_found(
        count in 1usize..9000, bad in prop::collection::vec(0usize..9000, 0..4), seed: u64,
    ) {
        for_every_storage!(finds_the_first(count, &bad, seed));
    }
}

#[test]
fn names_what_does_not_fit() {
    let device = Device::open();
    let (x, mut y) = (device.upload(&[0.0f32; 6]), device.upload(&[0.0f32; 5]));
    let message = |result: Result<(), LaunchError>| result.unwrap_err().to_string();
    let result = add_assign(
        &device.kernels,
        device.operand(&x),
        device.operand_mut(&mut y),
    );
    assert_eq!(message(result), "x holds 6 elements where 5 were expected");
    let result = cast(
        &device.kernels,
        device.operand(&x),
        device.operand_mut(&mut y),
    );
    assert_eq!(message(result), "y holds f32 where bf16 was expected");
}
