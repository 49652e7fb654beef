//! Launches `dequantize.cu`.

use crate::abi::{NF4_DEQUANTIZE_STORES, NF4_DEQUANTIZE_THREADS, NF4_NESTED_BLOCK_SIZE, Nf4Shape};
use crate::launch::{GRID_X, blocks, launch};
use crate::modules;
use crate::{Element, Kernels, LaunchError, Operand, OperandMut};

/// The scale of each block of a quantized weight.
#[derive(Debug, Clone, Copy)]
pub enum Absmax<'a> {
    /// `absmax [blocks]` f32.
    Plain(Operand<'a>),
    /// Double quantization: absmax is itself held in 8 bits.
    Nested {
        /// `absmax [blocks]`, as codes.
        absmax: Operand<'a>,
        /// `nested_quant_map [256]`: what each code stands for.
        nested_quant_map: Operand<'a>,
        /// `nested_absmax [blocks / 256, rounded up]`.
        nested_absmax: Operand<'a>,
        /// The mean that was subtracted from absmax before it was quantized.
        offset: f32,
    },
}

/// `out[i] = quant_map[code[i]] * absmax[i / block_size]`, in f32 and rounded once to the type of `out`: f32,
/// f16 or bf16.
///
/// `packed [(elements + 1) / 2]` holds two codes a byte, the first in the high nibble;
/// `out [elements]` says how many elements there are. `block_size` is a power of two from 32 to
/// 4096.
///
/// # Errors
/// When a length or type does not fit `out` and `block_size`, when `out` does not start at a multiple of
/// 16 bytes or `packed` at a multiple of 4, or when the driver refuses.
pub fn dequantize(
    kernels: &Kernels,
    packed: Operand,
    absmax: Absmax,
    block_size: u32,
    out: OperandMut,
) -> Result<(), LaunchError> {
    if !block_size.is_power_of_two() || !(32..=4096).contains(&block_size) {
        return Err(LaunchError::Parameter {
            parameter: "block_size",
            found: u64::from(block_size),
            expected: "it must be a power of two from 32 to 4096",
        });
    }
    let by_storage = match absmax {
        Absmax::Plain(_) => modules::NF4_DEQUANTIZE,
        Absmax::Nested { .. } => modules::NF4_DEQUANTIZE_NESTED,
    };
    let kernel = by_storage.of("out", out.element())?;
    let elements = out.len();
    let weight_blocks = elements.div_ceil(u64::from(block_size));
    packed.check("packed", Element::U8, elements.div_ceil(2))?;
    match absmax {
        Absmax::Plain(absmax) => absmax.check("absmax", Element::F32, weight_blocks)?,
        Absmax::Nested {
            absmax,
            nested_quant_map,
            nested_absmax,
            ..
        } => {
            let nested_blocks = weight_blocks.div_ceil(u64::from(NF4_NESTED_BLOCK_SIZE));
            absmax.check("absmax", Element::U8, weight_blocks)?;
            nested_quant_map.check("nested_quant_map", Element::F32, 256)?;
            nested_absmax.check("nested_absmax", Element::F32, nested_blocks)?;
        }
    }
    if elements == 0 {
        return Ok(());
    }
    packed.check_aligned("packed", 4)?;
    out.check_aligned("out", 16)?;

    let per_store = 16 / out.element().size_in_bytes();
    let per_block = u64::from(NF4_DEQUANTIZE_THREADS * NF4_DEQUANTIZE_STORES) * per_store;
    let grid = (blocks("out", elements, per_block, GRID_X)?, 1, 1);
    let block = (NF4_DEQUANTIZE_THREADS, 1, 1);
    let shape = |offset| Nf4Shape {
        elements,
        log2_block_size: block_size.ilog2(),
        offset,
    };
    match absmax {
        // SAFETY: the kernel's parameters in order, and every length was checked against what the kernel
        // reads and writes.
        Absmax::Plain(absmax) => unsafe {
            launch!(
                kernels,
                kernel,
                grid,
                block,
                packed.address(),
                absmax.address(),
                out.address(),
                shape(0.0),
            );
        },
        Absmax::Nested {
            absmax,
            nested_quant_map,
            nested_absmax,
            offset,
            // SAFETY: as above.
        } => unsafe {
            launch!(
                kernels,
                kernel,
                grid,
                block,
                packed.address(),
                absmax.address(),
                nested_quant_map.address(),
                nested_absmax.address(),
                out.address(),
                shape(offset),
            );
        },
    }
    Ok(())
}
