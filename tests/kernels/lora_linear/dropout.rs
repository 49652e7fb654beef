//! Dropout in memory of its own.

use super::case::{self, STEP};
use super::reference::kept;
use crate::device::Device;
use crate::storage::{Storage, check_close, for_every_storage, stored};
use fuselora_kernels::lora_linear::{Dropout, dropout};
use proptest::prelude::*;
use proptest::test_runner::TestCaseError;

pub const KERNELS: &[&str] = &["lora_dropout_f32", "lora_dropout_f16", "lora_dropout_bf16"];

fn drops<T: Storage>(count: usize, probability: f32, seed: u64) -> Result<(), TestCaseError> {
    let device = Device::open();
    device.shuffle(seed);
    let x = stored::<T>(seed, count);
    let (x_device, step) = (device.upload(&x), device.upload(&[STEP]));
    let mut y = device.output::<T>(count);
    let stream = 3;
    let with = Dropout {
        probability,
        seed,
        stream,
        step: device.operand(&step),
    };
    dropout(
        &device.kernels,
        with,
        device.operand(&x_device),
        device.operand_mut(&mut y),
    )?;
    let mask = case::Dropout {
        probability,
        seed,
        stream,
    };
    let kept = kept(Some(mask), count);
    let expected: Vec<f64> = x
        .iter()
        .zip(kept)
        .map(|(x, kept)| x.value() * kept)
        .collect();
    check_close("y", &device.download(&y), &expected, 0.0)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]

    #[test]
    fn elements_are_dropped_by_their_position(count in 1usize..5000, probability in 0.05f32..0.95, seed: u64) {
        for_every_storage!(drops(count, probability, seed));
    }
}
