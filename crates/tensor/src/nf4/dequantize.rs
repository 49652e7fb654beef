use super::{Absmax, NESTED_BLOCK_SIZE, Nf4Weight, QUANT_MAP};
use crate::{DType, Result, Tensor, convert, simd};
#[cfg(feature = "cuda")]
use fuselora_kernels::nf4 as kernel;
use rayon::prelude::*;
use std::ops::Range;

/// Elements that make one task.
const TASK: usize = 1 << 14;

/// What the two codes of each byte stand for: a lookup gives two elements.
static PAIRS: [[f32; 2]; 256] = {
    let mut pairs = [[0.0; 2]; 256];
    let mut byte = 0;
    while byte < 256 {
        pairs[byte] = [QUANT_MAP[byte >> 4], QUANT_MAP[byte & 15]];
        byte += 1;
    }
    pairs
};

impl Nf4Weight {
    /// All elements as a float type, `[out_features, in_features]`, on the weight's device: computed in f32 and
    /// rounded once.
    ///
    /// # Errors
    /// When the type is not a float, or there is no room.
    pub fn dequantize(&self, dtype: DType) -> Result<Tensor> {
        let mut out = Tensor::empty(self.device(), &self.shape, dtype)?;
        out.check_float("dequantized weight")?;
        #[cfg(feature = "cuda")]
        if !self.device().is_cpu() {
            self.device().launch(|kernels| {
                kernel::dequantize(kernels, &self.operand(), 0, out.operand_mut())
            })?;
            return Ok(out);
        }
        let size = dtype.size_in_bytes();
        let tasks = out
            .bytes_mut("dequantized weight")?
            .par_chunks_mut(TASK * size);
        tasks.enumerate().for_each(|(task, out)| {
            let first = task * TASK;
            let mut values = vec![0.0; out.len() / size];
            self.decode(first..first + values.len(), &mut values);
            convert::encode(&values, dtype, out);
        });
        Ok(out)
    }

    /// Some rows as F32 on the CUDA device that holds the weight, `[rows, in_features]`; the first is a multiple of 8.
    #[cfg(feature = "cuda")]
    pub(crate) fn dequantize_rows(&self, rows: Range<usize>) -> Result<Tensor> {
        let in_features = self.shape[1];
        let mut out = Tensor::empty(self.device(), [rows.len(), in_features], DType::F32)?;
        let first = (rows.start * in_features) as u64;
        self.device().launch(|kernels| {
            kernel::dequantize(kernels, &self.operand(), first, out.operand_mut())
        })?;
        Ok(out)
    }

    /// Decodes the elements in `range` (of the row-major order) into `out`. The caller has checked both, and that the
    /// weight is on the CPU.
    pub(crate) fn decode(&self, range: Range<usize>, out: &mut [f32]) {
        let (Ok(packed), Some(scales)) = (self.packed.bytes("packed"), Scales::of(&self.absmax))
        else {
            unreachable!("callers decode weights on the CPU only")
        };
        let mut rest = out;
        let mut start = range.start;
        simd::vectorize(
            #[inline(always)]
            || {
                while start < range.end {
                    let block = start / self.block_size;
                    let end = range.end.min((block + 1) * self.block_size);
                    let (values, others) = std::mem::take(&mut rest).split_at_mut(end - start);
                    unpack(packed, start, values);
                    let scale = scales.absmax(block);
                    values.iter_mut().for_each(|value| *value *= scale);
                    (rest, start) = (others, end);
                }
            },
        );
    }
}

/// What the codes from element `start` on stand for.
#[inline(always)]
fn unpack(packed: &[u8], start: usize, values: &mut [f32]) {
    let odd = values.len().min(start % 2);
    let (first, values) = values.split_at_mut(odd);
    if let [first] = first {
        *first = PAIRS[usize::from(packed[start / 2])][1];
    }
    let packed = &packed[(start + odd) / 2..];
    let (pairs, last) = values.as_chunks_mut::<2>();
    for (pair, &byte) in pairs.iter_mut().zip(packed) {
        *pair = PAIRS[usize::from(byte)];
    }
    if let [last] = last {
        *last = PAIRS[usize::from(packed[pairs.len()])][0];
    }
}

/// The statistics of a weight on the CPU.
enum Scales<'a> {
    Plain(&'a [f32]),
    Nested {
        absmax: &'a [u8],
        quant_map: &'a [f32],
        nested_absmax: &'a [f32],
        offset: f32,
    },
}

impl Scales<'_> {
    fn of(absmax: &Absmax) -> Option<Scales<'_>> {
        Some(match absmax {
            Absmax::Plain(absmax) => Scales::Plain(absmax.as_f32().ok()?),
            Absmax::Nested(nested) => Scales::Nested {
                absmax: nested.absmax.bytes("absmax").ok()?,
                quant_map: nested.quant_map.as_f32().ok()?,
                nested_absmax: nested.nested_absmax.as_f32().ok()?,
                offset: nested.offset,
            },
        })
    }

    /// The product and the sum are rounded each, as two operations of torch are.
    #[inline(always)]
    fn absmax(&self, block: usize) -> f32 {
        match *self {
            Scales::Plain(absmax) => absmax[block],
            Scales::Nested {
                absmax,
                quant_map,
                nested_absmax,
                offset,
            } => {
                let value = quant_map[usize::from(absmax[block])];
                value * nested_absmax[block / NESTED_BLOCK_SIZE] + offset
            }
        }
    }
}
