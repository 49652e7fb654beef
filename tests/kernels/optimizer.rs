//! AdamW and the global gradient norm against their formulas in f64.

use crate::device::{Device, numbers};
use crate::storage::{check_close, exact};
use fuselora_kernels::abi::AdamWStep;
use fuselora_kernels::optimizer::{
    AdamWParam, RATE_LEN, adamw, gradient_norm, gradient_norm_workspace,
};
use proptest::prelude::*;

pub const KERNELS: &[&str] = &["gradient_squares", "gradient_norm", "adamw"];

/// A parameter tensor, its gradient and its moments.
fn tensors(length: usize, seed: u64) -> [Vec<f32>; 4] {
    let mut tensors = [0, 1, 2, 3].map(|i| numbers(seed ^ i << 32, length));
    // A mean of squares is not negative.
    tensors[3].iter_mut().for_each(|v| *v = v.abs());
    tensors
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    /// Several tensors of ragged sizes, and more of them than one launch takes.
    #[test]
    fn adamw_matches(
        lengths in prop_oneof![
            prop::collection::vec(prop_oneof![1usize..40, 4090usize..9000], 1..5),
            prop::collection::vec(1usize..40, 60..140),
        ],
        max_grad_norm in prop_oneof![Just(0.0f32), 0.1f32..100.0],
        seed: u64,
    ) {
        let device = Device::open();
        device.shuffle(seed);
        let host: Vec<_> = (0u64..).zip(&lengths).map(|(i, &length)| tensors(length, seed ^ i)).collect();
        let mut on_device: Vec<_> =
            host.iter().map(|tensors| tensors.each_ref().map(|values| device.upload(values))).collect();

        let grads: Vec<_> = on_device.iter().map(|[_, grad, ..]| device.operand(grad)).collect();
        let needed = gradient_norm_workspace(lengths.iter().map(|&length| length as u64));
        let mut workspace = device.output::<f32>(needed as usize);
        let mut norm = device.output::<f32>(1);
        gradient_norm(&device.kernels, &grads, device.operand_mut(&mut workspace), device.operand_mut(&mut norm))?;
        let squares = host.iter().flat_map(|[_, grad, ..]| exact(grad)).map(|g| g * g);
        let expected = squares.sum::<f64>().sqrt();
        check_close("norm", &device.download(&norm), &[expected], 0.0)?;

        let step = AdamWStep { new1: 0.1, keep2: 0.99, new2: 0.01, eps: 1e-3, max_grad_norm };
        // Each tensor has rates of its own.
        let rates: Vec<[f32; RATE_LEN]> =
            (0..lengths.len()).map(|i| [0.998 - 1e-3 * i as f32, 3e-2 + 1e-3 * i as f32, 1.7 + 0.01 * i as f32]).collect();
        let on_device_rates = device.upload(rates.as_flattened());
        let mut params: Vec<_> = on_device
            .iter_mut()
            .zip(0..)
            .map(|([param, grad, m, v], rate)| AdamWParam {
                param: device.operand_mut(param),
                grad: device.operand(grad),
                m: device.operand_mut(m),
                v: device.operand_mut(v),
                rate,
            })
            .collect();
        adamw(&device.kernels, &params, step, device.operand(&on_device_rates), device.operand(&norm))?;
        params.clear();
        drop(params);

        let clip = match max_grad_norm {
            0.0 => 1.0,
            max => (f64::from(max) / (expected + 1e-6)).min(1.0),
        };
        for ((host, found), rates) in host.iter().zip(&on_device).zip(&rates) {
            let [decay, step_size, inv_sqrt_correction2] = rates.map(f64::from);
            let [mut param, grad, mut m, mut v] = host.each_ref().map(|values| exact(values));
            for i in 0..param.len() {
                let g = clip * grad[i];
                m[i] += f64::from(step.new1) * (g - m[i]);
                v[i] = f64::from(step.keep2) * v[i] + f64::from(step.new2) * g * g;
                let divisor = v[i].sqrt() * inv_sqrt_correction2 + f64::from(step.eps);
                param[i] = param[i] * decay - step_size * m[i] / divisor;
            }
            check_close("param", &device.download(&found[0]), &param, 1.0)?;
            check_close("m", &device.download(&found[2]), &m, 1.0)?;
            check_close("v", &device.download(&found[3]), &v, 0.0)?;
        }
    }
}
