//! AdamW with moments in 8 bits: against bitsandbytes, and step by step against f64 from the moments as stored.

use std::path::Path;

use fuselora_tensor::ops::optimizer::{
    AdamW8bitParam, AdamWHyper, AdamWRate, AdamWRates, Moment8bit, adamw_8bit,
};
use fuselora_tensor::{DType, Device, Tensor, reference};
use proptest::prelude::*;
use safetensors::SafeTensors;

use crate::sample::{Sample, tensor};

const BLOCK: usize = 256;
/// The grid by which codes are looked up: a value is off by half of a step of it.
const HALF_STEP: f64 = 1.0 / 65535.0;

/// What bitsandbytes computed; `tests/adamw_8bit/make_case.py` says what is in it.
struct Case(Vec<u8>);

impl Case {
    fn read() -> Case {
        let path = "../../tests/adamw_8bit/case.safetensors";
        Case(std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap())
    }

    fn codes(&self, name: &str) -> Vec<u8> {
        let file = SafeTensors::deserialize(&self.0).unwrap();
        file.tensor(name).unwrap().data().to_vec()
    }

    fn floats(&self, name: &str) -> Vec<f32> {
        bytemuck::pod_collect_to_vec(&self.codes(name))
    }
}

struct State {
    param: Tensor,
    m: Moment8bit,
    v: Moment8bit,
}

impl State {
    fn new(param: &[f32]) -> State {
        let param = tensor([param.len()], param);
        let zeros = || Moment8bit::zeros(&Device::cpu(), param.shape()).unwrap();
        let (m, v) = (zeros(), zeros());
        State { param, m, v }
    }

    fn step(&mut self, step: u64, grad: &[f32], lr: f32, hyper: AdamWHyper, norm: f32) {
        let grad = tensor([grad.len()], grad);
        let param = AdamW8bitParam {
            param: &mut self.param,
            grad: &grad,
            m: &mut self.m,
            v: &mut self.v,
            rate: 0,
        };
        let rate = AdamWRate {
            lr,
            weight_decay: 0.1,
        };
        let mut rates = AdamWRates::new(&Device::cpu(), 1).unwrap();
        rates.set(step, &hyper, &[rate]).unwrap();
        adamw_8bit(&mut [param], hyper, &rates, &tensor([1], &[norm])).unwrap();
    }
}

/// A moment's values, by what bitsandbytes says that the codes stand for.
fn decoded(moment: &Moment8bit, quant_map: &[f32]) -> Vec<f64> {
    let absmax = moment.absmax.as_f32().unwrap();
    let codes = moment.codes.to_bytes().unwrap();
    let value = |(i, code): (usize, &u8)| {
        f64::from(quant_map[usize::from(*code)]) * f64::from(absmax[i / BLOCK])
    };
    codes.iter().enumerate().map(value).collect()
}

/// Sums are rounded in another order there: a code of two that are as near may differ.
#[test]
fn agrees_with_bitsandbytes() {
    let case = Case::read();
    let before = case.floats("param.before");
    let mut state = State::new(&before);
    for (grad, step) in case.floats("grads").chunks(before.len()).zip(1..) {
        let hyper = AdamWHyper {
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            max_grad_norm: 0.0,
        };
        state.step(step, grad, 3e-3, hyper, 1.0);
    }
    let mut differing = 0;
    for (name, moment) in [("m", &state.m), ("v", &state.v)] {
        let absmax = case.floats(&format!("{name}.absmax"));
        for (found, expected) in moment.absmax.as_f32().unwrap().iter().zip(absmax) {
            let (found, expected) = (f64::from(*found), f64::from(expected));
            assert!(
                (found - expected).abs() <= 1e-6 * expected,
                "{name}: {found}, {expected}"
            );
        }
        let found = moment.codes.to_bytes().unwrap();
        for (found, expected) in found.iter().zip(case.codes(name)) {
            assert!(found.abs_diff(expected) <= 1);
            differing += usize::from(*found != expected);
        }
    }
    assert!(differing <= before.len() / 1000, "{differing} codes differ");
    let after = case.floats("param.after");
    let found = state.param.as_f32().unwrap();
    let largest = found.iter().zip(&after).map(|(a, b)| (a - b).abs());
    let largest = largest.fold(0.0, f32::max);
    assert!(largest < 1e-6, "{largest:e}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn a_step_is_adamws_from_the_moments_as_stored(count in 1usize..20_000, steps in 1u64..5, seed: u64) {
        let case = Case::read();
        let (m_map, v_map) = (case.floats("m.quant_map"), case.floats("v.quant_map"));
        let mut sample = Sample::new(seed);
        let mut state = State::new(&sample.values(count));
        for step in 1..=steps {
            // Most blocks have gradients of another size.
            let mut grad = sample.values(count);
            for block in grad.chunks_mut(BLOCK) {
                let scale = 10_f32.powi(sample.below(7) as i32 - 6);
                block.iter_mut().for_each(|g| *g *= scale);
            }
            let before = state.param.as_f32().unwrap().to_vec();
            let moments = decoded(&state.m, &m_map).into_iter().zip(decoded(&state.v, &v_map));
            let exact: Vec<_> = before.iter().zip(moments).zip(&grad).map(|((&param, (m, v)), &g)| {
                let state = reference::AdamWState { param: f64::from(param), m, v };
                reference::adamw(state, 0.5 * f64::from(g), 1e-2, (0.9, 0.999), 1e-8, 0.1, step as i32)
            }).collect();
            let hyper = AdamWHyper { beta1: 0.9, beta2: 0.999, eps: 1e-8, max_grad_norm: 100.0 };
            // A norm of twice the largest: gradients are halved.
            state.step(step, &grad, 1e-2, hyper, 200.0);
            for (found, exact) in state.param.as_f32().unwrap().iter().zip(&exact) {
                prop_assert!((f64::from(*found) - exact.param).abs() <= 1e-6 * (1.0 + exact.param.abs()));
            }
            let (m, v) = (decoded(&state.m, &m_map), decoded(&state.v, &v_map));
            for (found, quant_map, exact) in [
                (m, &m_map, exact.iter().map(|s| s.m).collect::<Vec<_>>()),
                (v, &v_map, exact.iter().map(|s| s.v).collect()),
            ] {
                for (found, exact) in found.chunks(BLOCK).zip(exact.chunks(BLOCK)) {
                    let absmax = exact.iter().fold(0.0, |absmax: f64, x| absmax.max(x.abs()));
                    for (found, exact) in found.iter().zip(exact) {
                        let nearest = quant_map.iter().map(|&c| (f64::from(c) * absmax - exact).abs());
                        let nearest = nearest.fold(f64::INFINITY, f64::min);
                        let bound = nearest + (2.0 * HALF_STEP + 1e-6) * absmax;
                        prop_assert!((found - exact).abs() <= bound, "{found} for {exact} of {absmax}");
                    }
                }
            }
        }
    }
}

#[test]
fn nothing_changes_where_the_norm_is_not_finite() {
    let mut state = State::new(&[1.0, 2.0]);
    let hyper = AdamWHyper {
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        max_grad_norm: 1.0,
    };
    state.step(1, &[f32::INFINITY, 1.0], 1e-2, hyper, f32::INFINITY);
    assert_eq!(state.param.as_f32().unwrap(), [1.0, 2.0]);
    assert_eq!(state.m.absmax.as_f32().unwrap(), [0.0]);
    assert_eq!(state.v.absmax.as_f32().unwrap(), [0.0]);
}

#[test]
fn state_that_does_not_fit_is_named() {
    let mut state = State::new(&[0.5; 300]);
    state.v.absmax = tensor([1], &[0.0]);
    let hyper = AdamWHyper {
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        max_grad_norm: 0.0,
    };
    let grad = tensor([300], &[1.0; 300]);
    let refusal = |state: &mut State, rate| {
        let param = AdamW8bitParam {
            param: &mut state.param,
            grad: &grad,
            m: &mut state.m,
            v: &mut state.v,
            rate,
        };
        let rates = AdamWRates::new(&Device::cpu(), 1).unwrap();
        let error = adamw_8bit(&mut [param], hyper, &rates, &tensor([1], &[1.0]));
        error.unwrap_err().to_string()
    };
    let message = refusal(&mut state, 0);
    assert!(
        message.contains("v.absmax") && message.contains("[2]"),
        "{message}"
    );
    state.v.absmax = tensor([2], &[0.0; 2]);
    state.m.codes = Tensor::zeros(&Device::cpu(), [300], DType::F32).unwrap();
    let message = refusal(&mut state, 0);
    assert!(
        message.contains("`m`") || message.contains("m:"),
        "{message}"
    );
    state.m.codes = Tensor::zeros(&Device::cpu(), [300], DType::U8).unwrap();
    assert!(refusal(&mut state, 1).contains("the rate 1"));
}
