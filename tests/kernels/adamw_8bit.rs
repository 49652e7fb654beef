//! AdamW with moments in 8 bits, against its formula in f64 from the moments as they are stored, by the maps of
//! bitsandbytes.

use crate::device::{Device, numbers};
use fuselora_kernels::abi::{AdamWRate, AdamWStep, DYNAMIC_8BIT_BLOCK};
use fuselora_kernels::optimizer::{AdamW8bitParam, Moment8bit, adamw_8bit};
use proptest::prelude::*;
use safetensors::SafeTensors;
use std::path::Path;

pub const KERNELS: &[&str] = &["adamw_8bit"];

const BLOCK: usize = DYNAMIC_8BIT_BLOCK as usize;
/// Half of a step of the grid by which codes are looked up.
const HALF_STEP: f64 = 1.0 / 65535.0;

/// The signed map and the unsigned one (`tests/adamw_8bit/make_case.py`).
fn quant_maps() -> [Vec<f32>; 2] {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/adamw_8bit/case.safetensors");
    let bytes = std::fs::read(path).unwrap();
    let case = SafeTensors::deserialize(&bytes).unwrap();
    ["m.quant_map", "v.quant_map"].map(|name| {
        let view = case.tensor(name).unwrap();
        let (values, _) = view.data().as_chunks();
        values
            .iter()
            .map(|&bytes| f32::from_le_bytes(bytes))
            .collect()
    })
}

/// A moment's codes and the largest magnitudes of its blocks.
struct Stored {
    codes: Vec<u8>,
    absmax: Vec<f32>,
}

impl Stored {
    /// Some blocks are zeros.
    fn new(length: usize, seed: u64) -> Stored {
        let codes = numbers(seed, length)
            .iter()
            .map(|x| (x.abs() * 1e4) as u8)
            .collect();
        let absmax = numbers(!seed, length.div_ceil(BLOCK));
        let absmax = absmax.iter().map(|&x| if x > 0.4 { 0.0 } else { x.abs() });
        Stored {
            codes,
            absmax: absmax.collect(),
        }
    }

    fn value(&self, quant_map: &[f32], i: usize) -> f64 {
        f64::from(quant_map[usize::from(self.codes[i])]) * f64::from(self.absmax[i / BLOCK])
    }

    /// That each element is the nearest to `exact` that its block can hold, but for the grid.
    fn check(&self, quant_map: &[f32], exact: &[f64]) -> Result<(), TestCaseError> {
        for (block, values) in exact.chunks(BLOCK).enumerate() {
            let absmax = values
                .iter()
                .fold(0.0, |absmax: f64, x| absmax.max(x.abs()));
            let found = f64::from(self.absmax[block]);
            prop_assert!(
                (found - absmax).abs() <= 1e-5 * absmax,
                "absmax {found}, not {absmax}"
            );
            for (i, exact) in values.iter().enumerate() {
                let found = self.value(quant_map, block * BLOCK + i);
                let nearest = quant_map
                    .iter()
                    .map(|&c| (f64::from(c) * absmax - exact).abs());
                let nearest = nearest.fold(f64::INFINITY, f64::min);
                let bound = nearest + (2.0 * HALF_STEP + 1e-5) * absmax;
                prop_assert!(
                    (found - exact).abs() <= bound,
                    "{found} for {exact} of {absmax}"
                );
            }
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(10))]

    /// Several tensors of ragged sizes, and more of them than one launch takes.
    #[test]
    fn adamw_8bit_matches(
        lengths in prop_oneof![
            prop::collection::vec(prop_oneof![1usize..300, 4090usize..9000], 1..4),
            prop::collection::vec(1usize..40, 60..130),
        ],
        max_grad_norm in prop_oneof![Just(0.0f32), 0.1f32..2.0],
        seed: u64,
    ) {
        let device = Device::open();
        device.shuffle(seed);
        let maps = quant_maps();
        let host: Vec<_> = (0u64..).zip(&lengths).map(|(i, &length)| {
            let seed = seed ^ i << 8;
            // A moment of one square is not negative, and is as large as the other's square.
            (numbers(seed, length), numbers(seed ^ 1, length), Stored::new(length, seed ^ 2), Stored::new(length, seed ^ 3))
        }).collect();
        let mut on_device: Vec<_> = host.iter().map(|(param, grad, m, v)| (
            device.upload(param),
            device.upload(grad),
            [device.upload(&m.codes), device.upload(&v.codes)],
            [device.upload(&m.absmax), device.upload(&v.absmax)],
        )).collect();
        let step = AdamWStep { new1: 0.1, keep2: 0.99, new2: 0.01, eps: 1e-3, max_grad_norm };
        let all = [(0.998f32, 3e-2f32), (1.0, 1e-3)].map(|(decay, step_size)| AdamWRate {
            decay, step_size, inv_sqrt_correction2: 1.7,
        });
        let rates = all.map(|rate| [rate.decay, rate.step_size, rate.inv_sqrt_correction2]).concat();
        let rates = device.upload(&rates);
        let norm = device.upload(&[2.5f32]);
        let params: Vec<_> = (0u32..).zip(&mut on_device).map(|(i, (param, grad, [m, v], [m_absmax, v_absmax]))| {
            AdamW8bitParam {
                param: device.operand_mut(param),
                grad: device.operand(grad),
                m: Moment8bit { codes: device.operand_mut(m), absmax: device.operand_mut(m_absmax) },
                v: Moment8bit { codes: device.operand_mut(v), absmax: device.operand_mut(v_absmax) },
                rate: i % 2,
            }
        }).collect();
        adamw_8bit(&device.kernels, &params, step, device.operand(&rates), device.operand(&norm))?;
        drop(params);

        let clip = if max_grad_norm > 0.0 { (f64::from(max_grad_norm) / (2.5 + 1e-6)).min(1.0) } else { 1.0 };
        for ((i, (param, grad, m, v)), found) in host.iter().enumerate().zip(&on_device) {
            let rate = all[i % 2];
            let (mut exact_m, mut exact_v) = (Vec::new(), Vec::new());
            let found_param = device.download(&found.0);
            for j in 0..param.len() {
                let g = clip * f64::from(grad[j]);
                let m = m.value(&maps[0], j);
                let m = m + f64::from(step.new1) * (g - m);
                let v = f64::from(step.keep2) * v.value(&maps[1], j) + f64::from(step.new2) * g * g;
                let divisor = v.sqrt() * f64::from(rate.inv_sqrt_correction2) + f64::from(step.eps);
                let update = f64::from(rate.step_size) * m / divisor;
                let p = f64::from(param[j]) * f64::from(rate.decay) - update;
                let error = (f64::from(found_param[j]) - p).abs();
                prop_assert!(error <= 1e-6 * (p.abs() + update.abs() + 1.0), "{}, not {p}", found_param[j]);
                exact_m.push(m);
                exact_v.push(v);
            }
            for ((which, exact), map) in [exact_m, exact_v].iter().enumerate().zip(&maps) {
                let stored = Stored { codes: device.download(&found.2[which]), absmax: device.download(&found.3[which]) };
                stored.check(map, exact)?;
            }
        }
    }
}
