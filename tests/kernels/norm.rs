//! RMSNorm and LayerNorm against their formulas in f64.

use crate::device::Device;
use crate::storage::{Storage, check_close, exact, for_every_storage, stored};
use fuselora_kernels::abi::NormShape;
use fuselora_kernels::norm::{layer_norm, rms_norm};
use proptest::prelude::*;
use proptest::test_runner::TestCaseError;

pub const KERNELS: &[&str] = &[
    "rms_norm_forward_f32",
    "rms_norm_forward_f16",
    "rms_norm_forward_bf16",
    "rms_norm_forward_add_f32",
    "rms_norm_forward_add_f16",
    "rms_norm_forward_add_bf16",
    "rms_norm_recompute_f32",
    "rms_norm_recompute_f16",
    "rms_norm_recompute_bf16",
    "rms_norm_backward_f32",
    "rms_norm_backward_f16",
    "rms_norm_backward_bf16",
    "rms_norm_dweight_f32",
    "rms_norm_dweight_f16",
    "rms_norm_dweight_bf16",
    "layer_norm_forward_f32",
    "layer_norm_forward_f16",
    "layer_norm_forward_bf16",
    "layer_norm_recompute_f32",
    "layer_norm_recompute_f16",
    "layer_norm_recompute_bf16",
    "layer_norm_backward_f32",
    "layer_norm_backward_f16",
    "layer_norm_backward_bf16",
    "layer_norm_gradients_f32",
    "layer_norm_gradients_f16",
    "layer_norm_gradients_bf16",
];

const EPS: f32 = 1e-2;

fn shape(tokens: usize, width: usize) -> NormShape {
    NormShape {
        tokens: tokens as u32,
        width: width as u32,
        eps: EPS,
    }
}

fn mean(values: impl Iterator<Item = f64>, width: usize) -> f64 {
    values.sum::<f64>() / width as f64
}

fn rms<T: Storage>(tokens: usize, width: usize, seed: u64) -> Result<(), TestCaseError> {
    let device = Device::open();
    device.shuffle(seed);
    let kernels = &device.kernels;
    let shape = shape(tokens, width);
    let [residual, delta, dy, dx] = [0, 1, 2, 3].map(|i| stored::<T>(seed ^ i, tokens * width));
    let weight = stored::<f32>(seed ^ 4, width);
    let (residual_device, delta_device) = (device.upload(&residual), device.upload(&delta));
    let weight_device = device.upload(&weight);
    let mut sum_device = device.output::<T>(tokens * width);
    let mut y_device = device.output::<T>(tokens * width);
    let mut rstd_device = device.output::<f32>(tokens);
    rms_norm::forward_add(
        kernels,
        shape,
        device.operand(&residual_device),
        device.operand(&delta_device),
        device.operand_mut(&mut sum_device),
        device.operand(&weight_device),
        device.operand_mut(&mut y_device),
        device.operand_mut(&mut rstd_device),
    )?;
    let sum = device.download(&sum_device);
    let rounded: Vec<T> = residual
        .iter()
        .zip(&delta)
        .map(|(a, b)| T::of(a.value() as f32 + b.value() as f32))
        .collect();
    prop_assert_eq!(exact(&sum), exact(&rounded));

    let (x, weight) = (exact(&sum), exact(&weight));
    let rstd: Vec<f64> = x
        .chunks(width)
        .map(|row| 1.0 / (mean(row.iter().map(|x| x * x), width) + f64::from(EPS)).sqrt())
        .collect();
    let y: Vec<f64> = (0..tokens * width)
        .map(|i| x[i] * rstd[i / width] * weight[i % width])
        .collect();
    check_close("rstd", &device.download(&rstd_device), &rstd, 0.0)?;
    let y_found = device.download(&y_device);
    check_close("y", &y_found, &y, 0.0)?;

    // The same rows without the addition, and once more from the statistics.
    let mut again = device.output::<T>(tokens * width);
    rms_norm::forward(
        kernels,
        shape,
        device.operand(&sum_device),
        device.operand(&weight_device),
        device.operand_mut(&mut again),
        device.operand_mut(&mut rstd_device),
    )?;
    prop_assert_eq!(exact(&device.download(&again)), exact(&y_found));
    let mut again = device.output::<T>(tokens * width);
    rms_norm::recompute(
        kernels,
        shape,
        device.operand(&sum_device),
        device.operand(&rstd_device),
        device.operand(&weight_device),
        device.operand_mut(&mut again),
    )?;
    prop_assert_eq!(exact(&device.download(&again)), exact(&y_found));

    let dy_device = device.upload(&dy);
    let mut dx_device = device.upload(&dx);
    let dweight = stored::<f32>(seed ^ 5, width);
    let mut dweight_device = device.upload(&dweight);
    rms_norm::backward(
        kernels,
        shape,
        device.operand(&dy_device),
        device.operand(&sum_device),
        device.operand(&rstd_device),
        device.operand(&weight_device),
        device.operand_mut(&mut dx_device),
    )?;
    rms_norm::dweight(
        kernels,
        shape,
        device.operand(&dy_device),
        device.operand(&sum_device),
        device.operand(&rstd_device),
        device.operand_mut(&mut dweight_device),
    )?;
    let dy = exact(&dy);
    let mut dx = exact(&dx);
    let mut dweight = exact(&dweight);
    for t in 0..tokens {
        let row = t * width..(t + 1) * width;
        let g: Vec<f64> = row.clone().map(|i| dy[i] * weight[i - t * width]).collect();
        let average = mean(g.iter().zip(&x[row.clone()]).map(|(g, x)| g * x), width);
        for (j, i) in row.enumerate() {
            dx[i] += rstd[t] * (g[j] - x[i] * rstd[t] * rstd[t] * average);
            dweight[j] += dy[i] * x[i] * rstd[t];
        }
    }
    // rstd is at most 1 / sqrt(eps) = 10.
    check_close("dx", &device.download(&dx_device), &dx, 10.0)?;
    check_close(
        "dweight",
        &device.download(&dweight_device),
        &dweight,
        10.0 * tokens as f64,
    )
}

fn layer<T: Storage>(tokens: usize, width: usize, seed: u64) -> Result<(), TestCaseError> {
    let device = Device::open();
    device.shuffle(seed);
    let kernels = &device.kernels;
    let shape = shape(tokens, width);
    let [x, dy, dx] = [0, 1, 2].map(|i| stored::<T>(seed ^ i, tokens * width));
    let [weight, bias, dweight, dbias] = [3, 4, 5, 6].map(|i| stored::<f32>(seed ^ i, width));
    let (x_device, weight_device, bias_device) = (
        device.upload(&x),
        device.upload(&weight),
        device.upload(&bias),
    );
    let mut y_device = device.output::<T>(tokens * width);
    let mut mean_device = device.output::<f32>(tokens);
    let mut rstd_device = device.output::<f32>(tokens);
    layer_norm::forward(
        kernels,
        shape,
        device.operand(&x_device),
        device.operand(&weight_device),
        device.operand(&bias_device),
        device.operand_mut(&mut y_device),
        device.operand_mut(&mut mean_device),
        device.operand_mut(&mut rstd_device),
    )?;
    let [x, dy, mut dx] = [x, dy, dx].map(|x| exact(&x));
    let dx_start: Vec<T> = stored::<T>(seed ^ 2, tokens * width);
    let dy_start: Vec<T> = stored::<T>(seed ^ 1, tokens * width);
    let [weight, bias, mut dweight_exact, mut dbias_exact] =
        [&weight, &bias, &dweight, &dbias].map(|x| exact(x));
    let means: Vec<f64> = x
        .chunks(width)
        .map(|row| mean(row.iter().copied(), width))
        .collect();
    let rstd: Vec<f64> = x
        .chunks(width)
        .zip(&means)
        .map(|(row, m)| {
            let variance = mean(row.iter().map(|x| (x - m).powi(2)), width);
            1.0 / (variance + f64::from(EPS)).sqrt()
        })
        .collect();
    let n: Vec<f64> = (0..tokens * width)
        .map(|i| (x[i] - means[i / width]) * rstd[i / width])
        .collect();
    let y: Vec<f64> = (0..tokens * width)
        .map(|i| n[i] * weight[i % width] + bias[i % width])
        .collect();
    check_close("mean", &device.download(&mean_device), &means, 1.0)?;
    check_close("rstd", &device.download(&rstd_device), &rstd, 0.0)?;
    let y_found = device.download(&y_device);
    check_close("y", &y_found, &y, 10.0)?;

    let statistics = layer_norm::Statistics {
        mean: device.operand(&mean_device),
        rstd: device.operand(&rstd_device),
    };
    let mut again = device.output::<T>(tokens * width);
    layer_norm::recompute(
        kernels,
        shape,
        device.operand(&x_device),
        statistics,
        device.operand(&weight_device),
        device.operand(&bias_device),
        device.operand_mut(&mut again),
    )?;
    prop_assert_eq!(exact(&device.download(&again)), exact(&y_found));

    let dy_device = device.upload(&dy_start);
    let mut dx_device = device.upload(&dx_start);
    let (mut dweight_device, mut dbias_device) = (device.upload(&dweight), device.upload(&dbias));
    layer_norm::backward(
        kernels,
        shape,
        device.operand(&dy_device),
        device.operand(&x_device),
        statistics,
        device.operand(&weight_device),
        device.operand_mut(&mut dx_device),
    )?;
    layer_norm::gradients(
        kernels,
        shape,
        device.operand(&dy_device),
        device.operand(&x_device),
        statistics,
        device.operand_mut(&mut dweight_device),
        device.operand_mut(&mut dbias_device),
    )?;
    for t in 0..tokens {
        let row = t * width..(t + 1) * width;
        let g: Vec<f64> = row.clone().map(|i| dy[i] * weight[i - t * width]).collect();
        let mean_g = mean(g.iter().copied(), width);
        let mean_gn = mean(g.iter().zip(&n[row.clone()]).map(|(g, n)| g * n), width);
        for (j, i) in row.enumerate() {
            dx[i] += rstd[t] * (g[j] - mean_g - n[i] * mean_gn);
            dweight_exact[j] += dy[i] * n[i];
            dbias_exact[j] += dy[i];
        }
    }
    // n is at most 2 / sqrt(eps) = 20, and so is the mean of g n.
    check_close("dx", &device.download(&dx_device), &dx, 100.0)?;
    check_close(
        "dweight",
        &device.download(&dweight_device),
        &dweight_exact,
        20.0 * tokens as f64,
    )?;
    check_close(
        "dbias",
        &device.download(&dbias_device),
        &dbias_exact,
        tokens as f64,
    )
}

fn width() -> impl Strategy<Value = usize> {
    prop_oneof![1usize..100, Just(64usize), Just(576), Just(2056)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]

    #[test]
    fn rms_norm_matches(tokens in 1usize..12, width in width(), seed: u64) {
        for_every_storage!(rms(tokens, width, seed));
    }

    #[test]
    fn layer_norm_matches(tokens in 1usize..12, width in width(), seed: u64) {
        for_every_storage!(layer(tokens, width, seed));
    }
}
