//! Cross-entropy against softmax in f64.

use crate::device::{Device, numbers};
use crate::storage::{Storage, check_close, exact, for_every_storage, stored};
use fuselora_kernels::loss::{cross_entropy_backward, cross_entropy_forward};
use proptest::prelude::*;
use proptest::test_runner::TestCaseError;

pub const KERNELS: &[&str] = &[
    "cross_entropy_forward_f32",
    "cross_entropy_forward_f16",
    "cross_entropy_forward_bf16",
    "cross_entropy_backward_f32",
    "cross_entropy_backward_f16",
    "cross_entropy_backward_bf16",
    "cross_entropy_sum",
];

fn cross_entropy<T: Storage>(
    n: usize,
    vocab: usize,
    spread: f32,
    seed: u64,
) -> Result<(), TestCaseError> {
    let device = Device::open();
    device.shuffle(seed);
    let logits: Vec<T> = stored::<f32>(seed, n * vocab)
        .iter()
        .map(|x| T::of(x * spread))
        .collect();
    let targets: Vec<u32> = numbers(!seed, n)
        .iter()
        .map(|x| ((x + 1.0) / 2.0 * vocab as f32) as u32 % vocab as u32)
        .collect();
    let (mut logits_device, targets_device) = (device.upload(&logits), device.upload(&targets));
    let (mut losses, mut total) = (device.output::<f32>(n), device.upload(&[0.5f32]));
    cross_entropy_forward(
        &device.kernels,
        vocab as u32,
        device.operand(&logits_device),
        device.operand(&targets_device),
        device.operand_mut(&mut losses),
        device.operand_mut(&mut total),
    )?;
    let x = exact(&logits);
    let grad_scale = 0.25;
    let (mut expected, mut gradient) = (Vec::new(), Vec::new());
    for (row, &target) in x.chunks(vocab).zip(&targets) {
        let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = row.iter().map(|x| (x - max).exp()).sum();
        expected.push(max + sum.ln() - row[target as usize]);
        gradient.extend(row.iter().enumerate().map(|(i, x)| {
            grad_scale * ((x - max).exp() / sum - f64::from(u8::from(i == target as usize)))
        }));
    }
    let found = device.download(&losses);
    check_close("losses", &found, &expected, f64::from(spread))?;
    let sum = 0.5 + expected.iter().sum::<f64>();
    check_close(
        "total",
        &device.download(&total),
        &[sum],
        f64::from(spread) * n as f64,
    )?;

    let on_device_scale = device.upload(&[grad_scale as f32]);
    let mut again = device.output::<f32>(n);
    cross_entropy_backward(
        &device.kernels,
        vocab as u32,
        device.operand_mut(&mut logits_device),
        device.operand(&targets_device),
        device.operand(&on_device_scale),
        device.operand_mut(&mut again),
        device.operand_mut(&mut total),
    )?;
    prop_assert_eq!(device.download(&again), found);
    // exp turns the rounding of its argument, relative to the spread, into a relative error of the result.
    check_close(
        "gradient",
        &device.download(&logits_device),
        &gradient,
        grad_scale * f64::from(spread),
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]

    #[test]
    fn cross_entropy_matches(
        n in 1usize..12, vocab in prop_oneof![1usize..600, Just(4096usize), 4000usize..5000], spread in 0.5f32..30.0, seed: u64,
    ) {
        for_every_storage!(cross_entropy(n, vocab, spread, seed));
    }
}

/// Logits of -infinity take no part, wherever they stand; NaN reaches the loss.
#[test]
fn masked_logits_and_nan() {
    let device = Device::open();
    let run = |logits: &[f32]| {
        let mut logits = device.upload(logits);
        let targets = device.upload(&[1030u32]);
        let (mut losses, mut total) = (device.output::<f32>(1), device.upload(&[0.0f32]));
        let grad_scale = device.upload(&[1.0f32]);
        cross_entropy_backward(
            &device.kernels,
            1032,
            device.operand_mut(&mut logits),
            device.operand(&targets),
            device.operand(&grad_scale),
            device.operand_mut(&mut losses),
            device.operand_mut(&mut total),
        )
        .unwrap();
        (device.download(&total)[0], device.download(&logits))
    };
    let mut logits = vec![f32::NEG_INFINITY; 1032];
    (logits[0], logits[1030]) = (2.0, 2.0);
    let (loss, gradient) = run(&logits);
    assert!((loss - 2f32.ln()).abs() < 1e-6, "{loss}");
    assert!((gradient[0] - 0.5).abs() < 1e-6 && (gradient[1030] + 0.5).abs() < 1e-6);
    assert!((1..1030).all(|i| gradient[i] == 0.0));
    logits[5] = f32::NAN;
    assert!(run(&logits).0.is_nan());
}
