//! Rotary position embedding against rotations in f64.

use crate::device::{Device, numbers};
use crate::storage::{Storage, check_close, exact, for_every_storage, stored};
use fuselora_kernels::abi::RopeShape;
use fuselora_kernels::rope::rope;
use proptest::prelude::*;
use proptest::test_runner::TestCaseError;

pub const KERNELS: &[&str] = &["rope_f32", "rope_f16", "rope_bf16"];

fn turns<T: Storage>(tokens: usize, shape: RopeShape, seed: u64) -> Result<(), TestCaseError> {
    let device = Device::open();
    device.shuffle(seed);
    let (heads, head_dim, half) = (
        shape.heads as usize,
        shape.head_dim as usize,
        shape.half as usize,
    );
    let x = stored::<T>(seed, tokens * heads * head_dim);
    let rows = shape.table_rows as usize;
    let angles = numbers(seed ^ 1, rows * half);
    let cos: Vec<f32> = angles.iter().map(|x| (3.0 * x).cos()).collect();
    let sin: Vec<f32> = angles.iter().map(|x| (3.0 * x).sin()).collect();
    let positions: Vec<u32> = (0..tokens as u32)
        .map(|t| (t * 7 + 3) % rows as u32)
        .collect();
    let mut x_device = device.upload(&x);
    let (positions_device, cos_device, sin_device) = (
        device.upload(&positions),
        device.upload(&cos),
        device.upload(&sin),
    );
    let mut run = |direction: f32| {
        rope(
            &device.kernels,
            RopeShape { direction, ..shape },
            device.operand_mut(&mut x_device),
            device.operand(&positions_device),
            device.operand(&cos_device),
            device.operand(&sin_device),
        )
        .map(|()| device.download(&x_device))
    };
    let turned = run(1.0)?;
    let x = exact(&x);
    let mut expected = x.clone();
    for (t, &position) in positions.iter().enumerate() {
        for h in 0..heads {
            for i in 0..half {
                let first = (t * heads + h) * head_dim + i;
                let (a, b) = (x[first], x[first + half]);
                let at = position as usize * half + i;
                let (c, s) = (f64::from(cos[at]), f64::from(sin[at]));
                (expected[first], expected[first + half]) = (a * c - b * s, b * c + a * s);
            }
        }
    }
    check_close("turned", &turned, &expected, 1.0)?;
    // The inverse brings back what the rounding of the first turn left.
    let back = exact(&run(-1.0)?);
    for (found, x) in back.iter().zip(&x) {
        prop_assert!(
            (found - x).abs() <= 4.0 * T::ROUNDING + 1e-6,
            "{found} for {x}"
        );
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]

    #[test]
    fn rope_turns_and_turns_back(
        tokens in 1usize..20, heads in 1u32..5, half in prop_oneof![1u32..20, Just(16), Just(32)], rest in 0u32..9,
        table_rows in 1u32..40, seed: u64,
    ) {
        let shape = RopeShape { heads, head_dim: 2 * half + rest, half, table_rows, direction: 0.0 };
        for_every_storage!(turns(tokens, shape, seed));
    }
}
