//! Activations against their formulas in f64.

use crate::device::Device;
use crate::storage::{Storage, check_close, exact, for_every_storage, stored};
use fuselora_kernels::activation::{
    Gelu, gelu_backward, gelu_forward, swiglu_backward, swiglu_forward,
};
use proptest::prelude::*;
use proptest::test_runner::TestCaseError;
use std::f64::consts::{PI, SQRT_2};

pub const KERNELS: &[&str] = &[
    "swiglu_forward_f32",
    "swiglu_forward_f16",
    "swiglu_forward_bf16",
    "swiglu_backward_f32",
    "swiglu_backward_f16",
    "swiglu_backward_bf16",
    "gelu_tanh_forward_f32",
    "gelu_tanh_forward_f16",
    "gelu_tanh_forward_bf16",
    "gelu_tanh_backward_f32",
    "gelu_tanh_backward_f16",
    "gelu_tanh_backward_bf16",
    "gelu_erf_forward_f32",
    "gelu_erf_forward_f16",
    "gelu_erf_forward_bf16",
    "gelu_erf_backward_f32",
    "gelu_erf_backward_f16",
    "gelu_erf_backward_bf16",
];

/// Numbers between -spread and spread.
fn spread<T: Storage>(seed: u64, count: usize, spread: f32) -> Vec<T> {
    stored::<f32>(seed, count)
        .into_iter()
        .map(|x| T::of(x * spread))
        .collect()
}

fn swiglu<T: Storage>(count: usize, width: f32, seed: u64) -> Result<(), TestCaseError> {
    let device = Device::open();
    device.shuffle(seed);
    let gate = spread::<T>(seed, count, width);
    let (up, dact) = (stored::<T>(seed ^ 1, count), stored::<T>(seed ^ 2, count));
    let (mut gate_device, mut up_device) = (device.upload(&gate), device.upload(&up));
    let dact_device = device.upload(&dact);
    let mut act = device.output::<T>(count);
    swiglu_forward(
        &device.kernels,
        device.operand(&gate_device),
        device.operand(&up_device),
        device.operand_mut(&mut act),
    )?;
    let (gate, up, dact) = (exact(&gate), exact(&up), exact(&dact));
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    let each = |f: &dyn Fn(usize) -> f64| (0..count).map(f).collect::<Vec<_>>();
    let silu = each(&|i| gate[i] * sigmoid(gate[i]));
    check_close(
        "act",
        &device.download(&act),
        &each(&|i| silu[i] * up[i]),
        0.0,
    )?;
    swiglu_backward(
        &device.kernels,
        device.operand(&dact_device),
        device.operand_mut(&mut gate_device),
        device.operand_mut(&mut up_device),
    )?;
    let dgate = each(&|i| {
        let s = sigmoid(gate[i]);
        dact[i] * up[i] * s * (1.0 + gate[i] * (1.0 - s))
    });
    check_close("dgate", &device.download(&gate_device), &dgate, 1.0)?;
    check_close(
        "dup",
        &device.download(&up_device),
        &each(&|i| dact[i] * silu[i]),
        0.0,
    )
}

fn gelu<T: Storage>(kind: Gelu, count: usize, width: f32, seed: u64) -> Result<(), TestCaseError> {
    let device = Device::open();
    device.shuffle(seed);
    let (x, dy) = (spread::<T>(seed, count, width), stored::<T>(!seed, count));
    let (x_device, mut dy_device) = (device.upload(&x), device.upload(&dy));
    let mut y = device.output::<T>(count);
    gelu_forward(
        &device.kernels,
        kind,
        device.operand(&x_device),
        device.operand_mut(&mut y),
    )?;
    gelu_backward(
        &device.kernels,
        kind,
        device.operand_mut(&mut dy_device),
        device.operand(&x_device),
    )?;
    // The cumulative distribution and the density of a normal variable.
    let density = |x: f64| (-x * x / 2.0).exp() / (2.0 * PI).sqrt();
    let cumulative = |x: f64| 0.5 * (1.0 + erf(x / SQRT_2));
    let inner = |x: f64| (2.0 / PI).sqrt() * (x + 0.044715 * x.powi(3));
    let inner_slope = |x: f64| (2.0 / PI).sqrt() * (1.0 + 3.0 * 0.044715 * x * x);
    let (value, slope): (Function, Function) = match kind {
        Gelu::Tanh => (&|x| 0.5 * x * (1.0 + inner(x).tanh()), &|x| {
            0.5 * (1.0 + inner(x).tanh()) + 0.5 * x * inner_slope(x) / inner(x).cosh().powi(2)
        }),
        Gelu::Erf => (&|x| x * cumulative(x), &|x| cumulative(x) + x * density(x)),
    };
    let x = exact(&x);
    // 1 + tanh cancels for negative x: the error is that of the 1, times x.
    let y_exact: Vec<f64> = x.iter().map(|&x| value(x)).collect();
    check_close("y", &device.download(&y), &y_exact, f64::from(width))?;
    let dx: Vec<f64> = x
        .iter()
        .zip(exact(&dy))
        .map(|(&x, dy)| dy * slope(x))
        .collect();
    check_close("dx", &device.download(&dy_device), &dx, f64::from(width))
}

type Function<'a> = &'a dyn Fn(f64) -> f64;

/// The error function by its series of positive terms, 2/sqrt(pi) e^(-x^2) sum of 2^n x^(2n+1) / (2n+1)!!.
fn erf(x: f64) -> f64 {
    let (mut term, mut sum) = (x, x);
    for n in 1..300 {
        term *= 2.0 * x * x / f64::from(2 * n + 1);
        sum += term;
    }
    2.0 / PI.sqrt() * (-x * x).exp() * sum
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]

    #[test]
    fn swiglu_matches(count in 1usize..6000, width in 0.1f32..12.0, seed: u64) {
        for_every_storage!(swiglu(count, width, seed));
    }

    #[test]
    fn gelu_matches(
        kind in prop::sample::select(vec![Gelu::Tanh, Gelu::Erf]),
        count in 1usize..6000, width in 0.1f32..8.0, seed: u64,
    ) {
        for_every_storage!(gelu(kind, count, width, seed));
    }
}
