use super::{Absmax, Nf4Weight, QUANT_MAP, check_block_size, nested};
use crate::{DType, Error, Result, Tensor, convert, simd};
use rayon::prelude::*;

/// Bytes of codes that make one task: whole blocks of any size.
const TASK_BYTES: usize = 1 << 13;

/// bitsandbytes divides by no absmax smaller than this.
const SMALLEST_ABSMAX: f32 = 1e-38;

/// The code of 0.
const ZERO_CODE: u8 = 7;

impl Nf4Weight {
    /// Quantizes a matrix of floats, `[out_features, in_features]`, on the CPU (bitsandbytes, `quantize_4bit`).
    ///
    /// # Errors
    /// When the block size is not a power of two from 32 to 4096, an element is not finite, or the tensor is not a
    /// matrix of floats on the CPU.
    pub fn quantize(weight: &Tensor, block_size: usize, double_quant: bool) -> Result<Nf4Weight> {
        check_block_size(block_size)?;
        weight.check_float("weight")?;
        let (out_features, in_features) = weight.matrix("weight", "[out_features, in_features]")?;
        let (dtype, source) = (weight.dtype(), weight.bytes("weight")?);
        let device = weight.device();
        let elements = out_features * in_features;
        let mut packed = Tensor::empty(device, [elements.div_ceil(2)], DType::U8)?;
        let mut absmax = Tensor::empty(device, [elements.div_ceil(block_size)], DType::F32)?;

        let task = 2 * TASK_BYTES;
        let codes = packed.bytes_mut("packed")?.par_chunks_mut(task / 2);
        let scales = absmax.as_f32_mut()?.par_chunks_mut(task / block_size);
        let sources = source.par_chunks(task * dtype.size_in_bytes());
        let tasks = sources.zip(codes).zip(scales);
        tasks.for_each(|((source, packed), scales)| {
            let mut values = vec![0.0; source.len() / dtype.size_in_bytes()];
            convert::decode(dtype, source, &mut values);
            // An odd number of codes is filled up with that of 0.
            let mut codes = vec![ZERO_CODE; 2 * packed.len()];
            simd::vectorize(
                #[inline(always)]
                || {
                    let blocks = values.chunks_mut(block_size);
                    for (block, scale) in blocks.zip(scales) {
                        *scale = normalize(block, block_size);
                    }
                    for (code, &value) in codes.iter_mut().zip(&values) {
                        *code = nearest_code(value);
                    }
                    for (byte, pair) in packed.iter_mut().zip(codes.as_chunks::<2>().0) {
                        *byte = pair[0] << 4 | pair[1];
                    }
                },
            );
        });

        if let Some(block) = absmax.as_f32()?.iter().position(|scale| !scale.is_finite()) {
            return Err(Error::Argument(format!(
                "weight: an element in row {} is not finite, so that it cannot be quantized",
                block * block_size / in_features
            )));
        }
        let absmax = if double_quant {
            Absmax::Nested(Box::new(nested::quantize(device, absmax.as_f32()?)?))
        } else {
            Absmax::Plain(absmax)
        };
        Nf4Weight::new([out_features, in_features], block_size, packed, absmax)
    }
}

/// Scales a block to -1..1 and returns its absmax, which is not finite where an element is not.
#[inline(always)]
fn normalize(block: &mut [f32], block_size: usize) -> f32 {
    // As integers, magnitudes have the order that they have as floats, and what is not finite comes last.
    let largest = block
        .iter()
        .fold(0, |largest: u32, value| largest.max(value.abs().to_bits()));
    let absmax = f32::from_bits(largest);
    let bounded = absmax.max(SMALLEST_ABSMAX);
    if block.len() == block_size {
        let inverse = 1.0 / bounded;
        block.iter_mut().for_each(|value| *value *= inverse);
        absmax
    } else {
        // The last block, where it is shorter, is divided, and its absmax is stored as it was bounded.
        block.iter_mut().for_each(|value| *value /= bounded);
        bounded
    }
}

/// The code whose value is nearest to `value`, the lower of two that are as near: the number of midpoints below it.
#[inline(always)]
fn nearest_code(value: f32) -> u8 {
    const MIDPOINTS: [f32; 15] = {
        let mut midpoints = [0.0; 15];
        let mut index = 0;
        while index < 15 {
            midpoints[index] = (QUANT_MAP[index] + QUANT_MAP[index + 1]) / 2.0;
            index += 1;
        }
        midpoints
    };
    let mut code = 0;
    for midpoint in MIDPOINTS {
        code += u32::from(value > midpoint);
    }
    code as u8
}
