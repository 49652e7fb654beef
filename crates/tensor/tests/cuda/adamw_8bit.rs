//! AdamW with moments in 8 bits on a device: the numbers of the CPU, which are those of bitsandbytes.

use std::path::Path;

use fuselora_tensor::ops::optimizer::{
    AdamW8bitParam, AdamWHyper, AdamWRate, AdamWRates, Moment8bit, adamw_8bit,
};
use fuselora_tensor::{Device, Tensor};
use safetensors::SafeTensors;

use crate::device;

/// Parameter and moments after the steps of `tests/adamw_8bit/case.safetensors`.
fn trained(device: &Device) -> (Tensor, [Moment8bit; 2]) {
    let path = "../../tests/adamw_8bit/case.safetensors";
    let bytes = std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap();
    let case = SafeTensors::deserialize(&bytes).unwrap();
    let floats = |name: &str| -> Vec<f32> {
        bytemuck::pod_collect_to_vec(case.tensor(name).unwrap().data())
    };
    let (before, grads) = (floats("param.before"), floats("grads"));
    let upload = |values: &[f32]| Tensor::from_f32(device, [values.len()], values).unwrap();
    let mut param = upload(&before);
    let zeros = || Moment8bit::zeros(device, param.shape()).unwrap();
    let (mut m, mut v) = (zeros(), zeros());
    let hyper = AdamWHyper {
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        max_grad_norm: 0.0,
    };
    let rate = AdamWRate {
        lr: 3e-3,
        weight_decay: 0.1,
    };
    let mut rates = AdamWRates::new(device, 1).unwrap();
    for (grad, step) in grads.chunks(before.len()).zip(1..) {
        rates.set(step, &hyper, &[rate]).unwrap();
        let item = AdamW8bitParam {
            param: &mut param,
            grad: &upload(grad),
            m: &mut m,
            v: &mut v,
            rate: 0,
        };
        adamw_8bit(&mut [item], hyper, &rates, &upload(&[1.0])).unwrap();
    }
    (param, [m, v])
}

/// Multiplications and additions are fused on the device: a code of two that are as near may differ.
#[test]
fn steps_on_the_device_are_those_of_the_cpu() {
    let (on_cpu, on_device) = (trained(&Device::cpu()), trained(&device()));
    let floats = |tensor: &Tensor| tensor.to_f32_vec().unwrap();
    let (expected, found) = (floats(&on_cpu.0), floats(&on_device.0));
    for (found, expected) in found.iter().zip(&expected) {
        assert!((found - expected).abs() < 1e-6, "{found}, {expected}");
    }
    let mut differing = 0;
    for (expected, found) in on_cpu.1.iter().zip(&on_device.1) {
        let absmax = floats(&expected.absmax);
        for (found, expected) in floats(&found.absmax).iter().zip(absmax) {
            assert!((found - expected).abs() <= 1e-6 * expected);
        }
        let codes = |moment: &Moment8bit| moment.codes.to_bytes().unwrap();
        for (found, expected) in codes(found).into_iter().zip(codes(expected)) {
            assert!(found.abs_diff(expected) <= 1);
            differing += usize::from(found != expected);
        }
    }
    assert!(
        differing <= expected.len() / 1000,
        "{differing} codes differ"
    );
}
