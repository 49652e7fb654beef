//! Launches `dequantize.cu`.

use crate::abi::{NF4_DEQUANTIZE_STORES, NF4_DEQUANTIZE_THREADS, NF4_NESTED_BLOCK_SIZE, Nf4Shape};
use crate::launch::{GRID_X, blocks};
use crate::modules;
use crate::{Element, Kernels, LaunchError, Operand, OperandMut};
use cudarc::driver::{LaunchConfig, PushKernelArg};

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
    let (plain, nested) = match out.element() {
        Element::F32 => (
            &modules::NF4_DEQUANTIZE_F32,
            &modules::NF4_DEQUANTIZE_NESTED_F32,
        ),
        Element::F16 => (
            &modules::NF4_DEQUANTIZE_F16,
            &modules::NF4_DEQUANTIZE_NESTED_F16,
        ),
        Element::Bf16 => (
            &modules::NF4_DEQUANTIZE_BF16,
            &modules::NF4_DEQUANTIZE_NESTED_BF16,
        ),
        found => {
            return Err(LaunchError::Element {
                tensor: "out",
                expected: Element::F32,
                found,
            });
        }
    };
    let elements = out.len();
    let weight_blocks = elements.div_ceil(u64::from(block_size));
    packed.expect("packed", Element::U8, elements.div_ceil(2))?;
    match absmax {
        Absmax::Plain(absmax) => absmax.expect("absmax", Element::F32, weight_blocks)?,
        Absmax::Nested {
            absmax,
            nested_quant_map,
            nested_absmax,
            ..
        } => {
            let nested_blocks = weight_blocks.div_ceil(u64::from(NF4_NESTED_BLOCK_SIZE));
            absmax.expect("absmax", Element::U8, weight_blocks)?;
            nested_quant_map.expect("nested_quant_map", Element::F32, 256)?;
            nested_absmax.expect("nested_absmax", Element::F32, nested_blocks)?;
        }
    }
    if elements == 0 {
        return Ok(());
    }
    packed.expect_aligned("packed", 4)?;
    out.expect_aligned("out", 16)?;

    let per_store = 16 / out.element().size_in_bytes();
    let per_block = u64::from(NF4_DEQUANTIZE_THREADS * NF4_DEQUANTIZE_STORES) * per_store;
    let config = LaunchConfig {
        grid_dim: (blocks("out", elements, per_block, GRID_X)?, 1, 1),
        block_dim: (NF4_DEQUANTIZE_THREADS, 1, 1),
        shared_mem_bytes: 0,
    };
    let mut shape = Nf4Shape {
        elements,
        log2_block_size: block_size.ilog2(),
        offset: 0.0,
    };
    let (packed, out) = (packed.address(), out.address());
    match absmax {
        Absmax::Plain(absmax) => {
            let function = kernels.function(plain)?;
            let absmax = absmax.address();
            let mut launch = kernels.stream().launch_builder(&function);
            launch.arg(&packed).arg(&absmax).arg(&out).arg(&shape);
            // SAFETY: the arguments are the kernel's parameters in order, and every length was
            // checked against what the kernel reads and writes.
            unsafe { launch.launch(config) }?;
        }
        Absmax::Nested {
            absmax,
            nested_quant_map,
            nested_absmax,
            offset,
        } => {
            shape.offset = offset;
            let function = kernels.function(nested)?;
            let addresses =
                [absmax, nested_quant_map, nested_absmax].map(|operand| operand.address());
            let mut launch = kernels.stream().launch_builder(&function);
            launch.arg(&packed);
            addresses.iter().for_each(|address| {
                launch.arg(address);
            });
            launch.arg(&out).arg(&shape);
            // SAFETY: as above.
            unsafe { launch.launch(config) }?;
        }
    }
    Ok(())
}
