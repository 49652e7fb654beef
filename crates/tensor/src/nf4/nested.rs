//! Double quantization: absmax in 8 bits.

use super::{NESTED_BLOCK_SIZE, NestedAbsmax};
use crate::dynamic_8bit::Dynamic8bit;
use crate::{DType, Device, Result, Tensor};

/// Subtracts the mean of `absmax` and quantizes the rest in blocks of 256 to the 8-bit dynamic data type.
pub(super) fn quantize(device: &Device, absmax: &[f32]) -> Result<NestedAbsmax> {
    let data_type = Dynamic8bit::signed();
    let quant_map = data_type.quant_map();
    let offset = mean(absmax);
    let mut codes = vec![0; absmax.len()];
    let blocks = absmax.chunks(NESTED_BLOCK_SIZE);
    let nested_absmax: Vec<f32> = blocks
        .zip(codes.chunks_mut(NESTED_BLOCK_SIZE))
        .map(|(block, codes)| {
            let rest: Vec<f32> = block.iter().map(|value| value - offset).collect();
            data_type.quantize(&rest, codes)
        })
        .collect();
    Ok(NestedAbsmax {
        absmax: Tensor::from_bytes(device, [codes.len()], DType::U8, &codes)?,
        quant_map: Tensor::from_f32(device, [quant_map.len()], quant_map)?,
        nested_absmax: Tensor::from_f32(device, [nested_absmax.len()], &nested_absmax)?,
        offset,
    })
}

/// Eight lanes of a vector, and four vectors that are summed side by side.
const LANES: usize = 8;
const SIDE_BY_SIDE: usize = 4;

/// The mean as `torch.mean` rounds it on one thread: with vectors of eight lanes, in a cascade of four levels
/// (ATen/native/cpu/SumKernel.cpp). Above 32768 values torch's order depends on its number of threads.
fn mean(values: &[f32]) -> f32 {
    let sum = if values.len() < LANES {
        sum_rows(values.as_chunks::<1>().0)[0]
    } else {
        let (vectors, rest) = values.as_chunks::<LANES>();
        let tail = rest.iter().fold(0.0, |sum, value| sum + value);
        sum_rows(vectors).iter().fold(tail, |sum, lane| sum + lane)
    };
    sum / values.len() as f32
}

/// The sum of vectors, four of them side by side.
fn sum_rows<const N: usize>(vectors: &[[f32; N]]) -> [f32; N] {
    let (rows, rest) = vectors.as_chunks::<SIDE_BY_SIDE>();
    let mut sums = cascade(rows);
    for vector in rest {
        add(&mut sums[0], vector);
    }
    let [mut sum, others @ ..] = sums;
    others.iter().for_each(|other| add(&mut sum, other));
    sum
}

/// The sums of the columns. A level takes over from the one below after a power of two of additions, so that no sum
/// grows far beyond what is added to it.
fn cascade<const N: usize>(rows: &[[[f32; N]; SIDE_BY_SIDE]]) -> [[f32; N]; SIDE_BY_SIDE] {
    const LEVELS: usize = 4;
    let log2 = rows.len().max(1).next_power_of_two().ilog2() as usize;
    let power = (log2 / LEVELS).max(4);
    let step = 1 << power;
    let mut levels = [[[0.0; N]; SIDE_BY_SIDE]; LEVELS];
    let add_rows = |to: &mut [[f32; N]; SIDE_BY_SIDE], row: &[[f32; N]; SIDE_BY_SIDE]| {
        to.iter_mut().zip(row).for_each(|(to, from)| add(to, from));
    };
    let chunks = rows.chunks_exact(step);
    let rest = chunks.remainder();
    for (chunk, done) in chunks.zip(1usize..) {
        chunk.iter().for_each(|row| add_rows(&mut levels[0], row));
        for level in 1..LEVELS {
            let below = std::mem::replace(&mut levels[level - 1], [[0.0; N]; SIDE_BY_SIDE]);
            add_rows(&mut levels[level], &below);
            if (done * step) & ((step - 1) << (level * power)) != 0 {
                break;
            }
        }
    }
    rest.iter().for_each(|row| add_rows(&mut levels[0], row));
    let [mut sums, others @ ..] = levels;
    others.iter().for_each(|level| add_rows(&mut sums, level));
    sums
}

fn add<const N: usize>(to: &mut [f32; N], from: &[f32; N]) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to += from);
}
