//! The 8-bit dynamic data type of bitsandbytes 0.50.2 (Dettmers et al., "8-bit Optimizers via Block-wise Quantization",
//! 2022), as its `quantize_blockwise` computes it on the CPU: a block is stored as its largest magnitude, `absmax`,
//! and a code for each `x / absmax`.

use std::sync::LazyLock;

/// Elements of a block.
pub(crate) const BLOCK_SIZE: usize = 256;

/// Steps of the grid over -1..1 by which a code is looked up.
const GRID: usize = 1 << 16;

/// A map of 256 values, and what is needed to find the nearest.
pub(crate) struct Dynamic8bit {
    quant_map: [f32; 256],
    /// The code nearest to each point of the grid, the lower of two that are as near. bitsandbytes looks codes up here
    /// instead of comparing the value itself: so 0, which is no point of the grid, becomes the value nearest to
    /// 0.00002.
    code_of_point: Vec<u8>,
}

impl Dynamic8bit {
    /// For values of either sign: 127 of each, 0 and 1.
    pub(crate) fn signed() -> &'static Dynamic8bit {
        static SIGNED: LazyLock<Dynamic8bit> = LazyLock::new(|| Dynamic8bit::new(true));
        &SIGNED
    }

    /// For values that are not negative: 254 of them, 0 and 1.
    pub(crate) fn unsigned() -> &'static Dynamic8bit {
        static UNSIGNED: LazyLock<Dynamic8bit> = LazyLock::new(|| Dynamic8bit::new(false));
        &UNSIGNED
    }

    fn new(signed: bool) -> Dynamic8bit {
        let quant_map = quant_map(signed);
        let mut code = 0;
        let code_of_point = (0..GRID).map(|point| {
            let value = 2.0 * point as f32 / (GRID - 1) as f32 - 1.0;
            while code < 255 && value > (quant_map[code] + quant_map[code + 1]) * 0.5 {
                code += 1;
            }
            code as u8
        });
        Dynamic8bit {
            code_of_point: code_of_point.collect(),
            quant_map,
        }
    }

    /// What each code stands for, in ascending order.
    pub(crate) fn quant_map(&self) -> &[f32; 256] {
        &self.quant_map
    }

    /// Writes the code of each value of a block and returns its largest magnitude. A block of zeros has code 0
    /// throughout: it is multiplied by zero.
    pub(crate) fn quantize(&self, block: &[f32], codes: &mut [u8]) -> f32 {
        let absmax = block.iter().fold(0.0, |absmax: f32, x| absmax.max(x.abs()));
        if absmax > 0.0 {
            let inverse = 1.0 / absmax;
            for (code, &value) in codes.iter_mut().zip(block) {
                *code = self.code_of_point[nearest_point(value * inverse)];
            }
        } else {
            codes.fill(0);
        }
        absmax
    }

    /// Writes the values of a block's codes.
    pub(crate) fn dequantize(&self, codes: &[u8], absmax: f32, values: &mut [f32]) {
        for (value, &code) in values.iter_mut().zip(codes) {
            *value = self.quant_map[usize::from(code)] * absmax;
        }
    }
}

/// The point of the grid that is nearest to a value. The library's compiler fuses the last multiplication and addition.
fn nearest_point(value: f32) -> usize {
    ((value.clamp(-1.0, 1.0) + 1.0) * 0.5).mul_add((GRID - 1) as f32, 0.5) as usize
}

/// bitsandbytes' `create_dynamic_map`: seven decades, each cut into twice as many fractions as the one below, from 1
/// (or 2 where there is no sign), and the middle of each. The lowest of the signed is -0.993, not -1.
fn quant_map(signed: bool) -> [f32; 256] {
    let mut map = [0.0; 256];
    let mut rest = map.iter_mut();
    let mut push = |value: f32| {
        if let Some(place) = rest.next() {
            *place = value;
        }
    };
    push(1.0);
    // The remaining place keeps 0.
    for decade in 0..7 {
        let fractions = if signed { 1 << decade } else { 2 << decade };
        let scale = 10_f64.powi(decade - 6) as f32;
        for i in 0..fractions {
            let middle = (boundary(i, fractions) + boundary(i + 1, fractions)) / 2.0;
            push(scale * middle);
            if signed {
                push(-(scale * middle));
            }
        }
    }
    map.sort_by(f32::total_cmp);
    map
}

/// `torch.linspace(0.1, 1, fractions + 1)[i]`: from the nearer end, with one rounding.
fn boundary(i: usize, fractions: usize) -> f32 {
    let (start, end) = (0.1_f32, 1.0_f32);
    let step = (end - start) / fractions as f32;
    if i < fractions.div_ceil(2) {
        step.mul_add(i as f32, start)
    } else {
        (-step).mul_add((fractions - i) as f32, end)
    }
}

#[cfg(test)]
mod tests {
    use super::Dynamic8bit;

    /// The bits of a few values, and the sum of all bits, of what `create_dynamic_map` gives.
    #[test]
    fn maps_are_those_of_bitsandbytes() {
        let signed = [
            (0, 0xbf7e_3333),
            (126, 0xb513_a3b7),
            (127, 0),
            (129, 0x365a_1a94),
            (150, 0x3bab_020d),
            (200, 0x3e6f_3333),
            (255, 0x3f80_0000),
        ];
        let unsigned = [
            (0, 0),
            (1, 0x34ae_7baa),
            (127, 0x3dd4_0000),
            (150, 0x3e87_cccd),
            (200, 0x3f1d_e666),
            (254, 0x3f7f_199a),
            (255, 0x3f80_0000),
        ];
        for (map, values, sum) in [
            (Dynamic8bit::signed(), signed, 535_306_620_548),
            (Dynamic8bit::unsigned(), unsigned, 262_570_225_560),
        ] {
            let bits = map.quant_map().map(f32::to_bits);
            assert_eq!(values.map(|(code, _)| (code, bits[code])), values);
            assert_eq!(bits.iter().map(|&bits| u64::from(bits)).sum::<u64>(), sum);
        }
    }
}
