//! NF4 dequantization, to the bit.

use crate::device::{Device, numbers};
use cudarc::driver::{DeviceRepr, ValidAsZeroBits};
use fuselora_kernels::nf4::{Absmax, dequantize};
use fuselora_kernels::{LaunchError, Stored};
use half::{bf16, f16};
use proptest::prelude::*;

pub const KERNELS: &[&str] = &[
    "nf4_dequantize_f32",
    "nf4_dequantize_f16",
    "nf4_dequantize_bf16",
    "nf4_dequantize_nested_f32",
    "nf4_dequantize_nested_f16",
    "nf4_dequantize_nested_bf16",
];

/// The sixteen values, as bitsandbytes' create_normal_map gives them.
const QUANT_MAP: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// A quantized weight of random codes and statistics.
#[derive(Debug)]
struct Weight {
    elements: usize,
    block_size: u32,
    packed: Vec<u8>,
    absmax: Vec<f32>,
    absmax_codes: Vec<u8>,
    nested_quant_map: Vec<f32>,
    nested_absmax: Vec<f32>,
    offset: f32,
}

impl Weight {
    fn random(elements: usize, block_size: u32, seed: u64) -> Weight {
        let blocks = elements.div_ceil(block_size as usize);
        let bytes = |seed: u64, count: usize| -> Vec<u8> {
            numbers(seed, count)
                .iter()
                .map(|x| ((x + 1.0) * 128.0) as u8)
                .collect()
        };
        Weight {
            elements,
            block_size,
            packed: bytes(seed, elements.div_ceil(2)),
            absmax: numbers(seed ^ 1, blocks)
                .iter()
                .map(|x| x.abs() * 3.0)
                .collect(),
            absmax_codes: bytes(seed ^ 2, blocks),
            nested_quant_map: numbers(seed ^ 3, 256),
            nested_absmax: numbers(seed ^ 4, blocks.div_ceil(256)),
            offset: numbers(seed ^ 5, 1)[0],
        }
    }

    /// The absmax of a block, each operation rounded to f32.
    fn absmax(&self, block: usize, nested: bool) -> f32 {
        match nested {
            false => self.absmax[block],
            true => {
                let value = self.nested_quant_map[self.absmax_codes[block] as usize];
                value * self.nested_absmax[block / 256] + self.offset
            }
        }
    }

    /// Every element in f32.
    fn values(&self, nested: bool) -> Vec<f32> {
        let code = |i: usize| self.packed[i / 2] >> (if i.is_multiple_of(2) { 4 } else { 0 }) & 15;
        let scale = |i: usize| self.absmax(i / self.block_size as usize, nested);
        (0..self.elements)
            .map(|i| QUANT_MAP[code(i) as usize] * scale(i))
            .collect()
    }

    fn on_device<T: Stored + DeviceRepr + Clone + Default + ValidAsZeroBits>(
        &self,
        nested: bool,
        seed: u64,
    ) -> Result<Vec<T>, LaunchError> {
        let device = Device::open();
        device.shuffle(seed);
        let packed = device.upload(&self.packed);
        let absmax = device.upload(&self.absmax);
        let absmax_codes = device.upload(&self.absmax_codes);
        let nested_quant_map = device.upload(&self.nested_quant_map);
        let nested_absmax = device.upload(&self.nested_absmax);
        let statistics = match nested {
            false => Absmax::Plain(device.operand(&absmax)),
            true => Absmax::Nested {
                absmax: device.operand(&absmax_codes),
                nested_quant_map: device.operand(&nested_quant_map),
                nested_absmax: device.operand(&nested_absmax),
                offset: self.offset,
            },
        };
        let mut out = device.output::<T>(self.elements);
        dequantize(
            &device.kernels,
            device.operand(&packed),
            statistics,
            self.block_size,
            device.operand_mut(&mut out),
        )?;
        Ok(device.download(&out))
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// The product in f32, then one rounding: the same bits in every type, the ragged tail and
    /// nested statistics included.
    #[test]
    fn is_exact(
        elements in 1usize..20_000,
        log2_block_size in 5u32..=12,
        nested: bool,
        seed: u64,
    ) {
        let weight = Weight::random(elements, 1 << log2_block_size, seed);
        let expected = weight.values(nested);

        let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        prop_assert_eq!(bits(&weight.on_device::<f32>(nested, seed)?), bits(&expected));

        let halves: Vec<u16> = expected.iter().map(|&x| f16::from_f32(x).to_bits()).collect();
        let found = weight.on_device::<f16>(nested, seed)?;
        prop_assert_eq!(found.iter().map(|x| x.to_bits()).collect::<Vec<_>>(), halves);

        let brains: Vec<u16> = expected.iter().map(|&x| bf16::from_f32(x).to_bits()).collect();
        let found = weight.on_device::<bf16>(nested, seed)?;
        prop_assert_eq!(found.iter().map(|x| x.to_bits()).collect::<Vec<_>>(), brains);
    }
}

#[test]
fn names_what_does_not_fit() {
    let message = |change: fn(&mut Weight)| {
        let mut weight = Weight::random(1000, 64, 1);
        change(&mut weight);
        weight.on_device::<f32>(false, 0).unwrap_err().to_string()
    };
    assert_eq!(
        message(|weight| weight.packed.truncate(499)),
        "packed holds 499 elements where 500 were expected"
    );
    assert_eq!(
        message(|weight| weight.absmax.truncate(15)),
        "absmax holds 15 elements where 16 were expected"
    );
    assert_eq!(
        message(|weight| weight.block_size = 48),
        "block_size is 48: it must be a power of two from 32 to 4096"
    );
}
