//! Weights in 4-bit NormalFloat, bit for bit as bitsandbytes 0.50.2 stores them on the CPU (Dettmers et al., "QLoRA",
//! 2023). `docs/quantization.md` has the format in full.
//!
//! The elements of a weight, in row-major order, are cut into blocks without regard to rows. A block is stored as its
//! largest magnitude, `absmax`, and four bits per element: the nearest of the 16 values of [`QUANT_MAP`] to
//! `x / absmax`. With double quantization the absmax are stored in 8 bits themselves.

mod dequantize;
mod nested;
mod quantize;

use crate::{DType, Device, Error, Result, Shape, Tensor, dynamic_8bit};
#[cfg(feature = "cuda")]
use fuselora_kernels::nf4 as kernel;

/// What each 4-bit code stands for, in ascending order (QLoRA, appendix E).
pub const QUANT_MAP: [f32; 16] = [
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

/// Blocks of a weight that make one block of its nested statistics.
pub const NESTED_BLOCK_SIZE: usize = dynamic_8bit::BLOCK_SIZE;

/// A matrix in 4-bit NormalFloat, `[out_features, in_features]`.
#[derive(Debug)]
pub struct Nf4Weight {
    shape: Shape,
    block_size: usize,
    packed: Tensor,
    absmax: Absmax,
}

/// The largest magnitude of each block.
#[derive(Debug)]
pub enum Absmax {
    /// As it is, `[blocks]` F32.
    Plain(Tensor),
    /// In 8 bits.
    Nested(Box<NestedAbsmax>),
}

/// Double quantization: `absmax = quant_map[code] * nested_absmax[block / 256] + offset`.
#[derive(Debug)]
pub struct NestedAbsmax {
    /// The codes, `[blocks]` U8.
    pub absmax: Tensor,
    /// What each code stands for, `[256]` F32.
    pub quant_map: Tensor,
    /// The largest magnitude of each 256 blocks, `[⌈blocks / 256⌉]` F32.
    pub nested_absmax: Tensor,
    /// The mean that was subtracted.
    pub offset: f32,
}

impl Absmax {
    /// The tensors, each with its name.
    fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        match self {
            Absmax::Plain(absmax) => vec![("absmax", absmax)],
            Absmax::Nested(nested) => vec![
                ("absmax", &nested.absmax),
                ("nested_quant_map", &nested.quant_map),
                ("nested_absmax", &nested.nested_absmax),
            ],
        }
    }

    fn to_device(&self, device: &Device) -> Result<Absmax> {
        Ok(match self {
            Absmax::Plain(absmax) => Absmax::Plain(absmax.to_device(device)?),
            Absmax::Nested(nested) => Absmax::Nested(Box::new(NestedAbsmax {
                absmax: nested.absmax.to_device(device)?,
                quant_map: nested.quant_map.to_device(device)?,
                nested_absmax: nested.nested_absmax.to_device(device)?,
                offset: nested.offset,
            })),
        })
    }

    /// The statistics for a kernel.
    #[cfg(feature = "cuda")]
    fn operands(&self) -> kernel::Absmax<'_> {
        match self {
            Absmax::Plain(absmax) => kernel::Absmax::Plain(absmax.operand()),
            Absmax::Nested(nested) => kernel::Absmax::Nested {
                absmax: nested.absmax.operand(),
                nested_quant_map: nested.quant_map.operand(),
                nested_absmax: nested.nested_absmax.operand(),
                offset: nested.offset,
            },
        }
    }
}

impl Nf4Weight {
    /// A weight `[out_features, in_features]` from its stored parts, with `packed [⌈elements / 2⌉]` U8: two codes a
    /// byte, the first in the high nibble. All parts are on one device.
    ///
    /// # Errors
    /// When the block size is not a power of two from 32 to 4096, or a part has another length, data type or device:
    /// the error names the part.
    pub fn new(
        shape: [usize; 2],
        block_size: usize,
        packed: Tensor,
        absmax: Absmax,
    ) -> Result<Nf4Weight> {
        check_block_size(block_size)?;
        let shape = Shape::from(shape);
        let elements = shape
            .element_count()
            .ok_or_else(|| Error::TooLarge(shape.clone()))?;
        let blocks = elements.div_ceil(block_size);
        packed.check_dtype("packed", DType::U8)?;
        packed.check_shape("packed", &[elements.div_ceil(2)])?;
        let expected = match &absmax {
            Absmax::Plain(_) => vec![(DType::F32, blocks)],
            Absmax::Nested(_) => vec![
                (DType::U8, blocks),
                (DType::F32, 256),
                (DType::F32, blocks.div_ceil(NESTED_BLOCK_SIZE)),
            ],
        };
        for ((name, tensor), (dtype, len)) in absmax.tensors().into_iter().zip(expected) {
            tensor.check_dtype(name, dtype)?;
            tensor.check_shape(name, &[len])?;
            tensor.check_device(name, packed.device())?;
        }
        Ok(Nf4Weight {
            shape,
            block_size,
            packed,
            absmax,
        })
    }

    /// The extents, `[out_features, in_features]`.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// Elements of a block: a power of two from 32 to 4096.
    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// The codes, `[⌈elements / 2⌉]` U8: two a byte, the first in the high nibble.
    pub fn packed(&self) -> &Tensor {
        &self.packed
    }

    /// The largest magnitude of each block.
    pub fn absmax(&self) -> &Absmax {
        &self.absmax
    }

    /// The device that holds the parts.
    pub fn device(&self) -> &Device {
        self.packed.device()
    }

    /// Bytes that all parts take.
    pub fn size_in_bytes(&self) -> usize {
        let statistics = self.absmax.tensors().into_iter();
        self.packed.size_in_bytes()
            + statistics
                .map(|(_, tensor)| tensor.size_in_bytes())
                .sum::<usize>()
    }

    /// A copy on `device`.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn to_device(&self, device: &Device) -> Result<Nf4Weight> {
        Ok(Nf4Weight {
            shape: self.shape.clone(),
            block_size: self.block_size,
            packed: self.packed.to_device(device)?,
            absmax: self.absmax.to_device(device)?,
        })
    }

    /// The weight for a kernel.
    #[cfg(feature = "cuda")]
    pub(crate) fn operand(&self) -> kernel::Weight<'_> {
        kernel::Weight {
            elements: self.shape.iter().product::<usize>() as u64,
            block_size: self.block_size as u32,
            packed: self.packed.operand(),
            absmax: self.absmax.operands(),
        }
    }
}

/// Whether a block size is a power of two from 32 to 4096.
///
/// # Errors
/// When it is not.
pub fn check_block_size(block_size: usize) -> Result<()> {
    if block_size.is_power_of_two() && (32..=4096).contains(&block_size) {
        return Ok(());
    }
    Err(Error::Argument(format!(
        "block_size: {block_size} is not a power of two from 32 to 4096"
    )))
}
