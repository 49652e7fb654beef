//! The 4-bit NormalFloat format of QLoRA (Dettmers et al. 2023), laid out as bitsandbytes does.

mod dequantize;
mod gemv;
mod quantize;

pub use dequantize::dequantize;
pub(crate) use gemv::gemv;
pub use quantize::quantize;

use crate::abi::{NF4_NESTED_BLOCK_SIZE, Nf4Weight};
use crate::{Element, LaunchError, Operand};

/// A quantized weight on the device.
#[derive(Debug, Clone, Copy)]
pub struct Weight<'a> {
    /// The numbers that it stands for, in row-major order.
    pub elements: u64,
    /// How many share one absmax: a power of two from 32 to 4096.
    pub block_size: u32,
    /// `[(elements + 1) / 2]` u8, two codes a byte, the first in the high nibble. It starts at a multiple of
    /// 16 bytes.
    pub packed: Operand<'a>,
    /// The scales.
    pub absmax: Absmax<'a>,
}

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

impl Weight<'_> {
    /// The weight as kernels take it, every length and type checked.
    pub(crate) fn check(&self) -> Result<Nf4Weight, LaunchError> {
        check_block_size(self.block_size)?;
        let packed_len = self.elements.div_ceil(2);
        self.packed.check("packed", Element::U8, packed_len)?;
        if packed_len > 0 {
            self.packed.check_aligned("packed", 16)?;
        }
        let blocks = self.elements.div_ceil(u64::from(self.block_size));
        let weight = Nf4Weight {
            packed: self.packed.address(),
            elements: self.elements,
            log2_block_size: self.block_size.ilog2(),
            ..Nf4Weight::default()
        };
        match self.absmax {
            Absmax::Plain(absmax) => {
                absmax.check("absmax", Element::F32, blocks)?;
                Ok(Nf4Weight {
                    absmax: absmax.address(),
                    ..weight
                })
            }
            Absmax::Nested {
                absmax,
                nested_quant_map,
                nested_absmax,
                offset,
            } => {
                let nested_blocks = blocks.div_ceil(u64::from(NF4_NESTED_BLOCK_SIZE));
                absmax.check("absmax", Element::U8, blocks)?;
                nested_quant_map.check("nested_quant_map", Element::F32, 256)?;
                nested_absmax.check("nested_absmax", Element::F32, nested_blocks)?;
                Ok(Nf4Weight {
                    absmax: absmax.address(),
                    nested_quant_map: nested_quant_map.address(),
                    nested_absmax: nested_absmax.address(),
                    offset,
                    ..weight
                })
            }
        }
    }
}

fn check_block_size(block_size: u32) -> Result<(), LaunchError> {
    match block_size.is_power_of_two() && (32..=4096).contains(&block_size) {
        true => Ok(()),
        false => Err(LaunchError::Parameter {
            parameter: "block_size",
            found: u64::from(block_size),
            expected: "it must be a power of two from 32 to 4096",
        }),
    }
}
