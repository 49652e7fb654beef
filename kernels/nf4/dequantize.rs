//! Launches `dequantize.cu`.

use crate::abi::{NF4_DEQUANTIZE_STORES, NF4_DEQUANTIZE_THREADS, NF4_NESTED_BLOCK_SIZE, Nf4Shape};
use crate::launch::{GRID_X, blocks, check_alignment, check_length};
use crate::modules::{self, Kernel};
use crate::{Kernels, LaunchError};
use cudarc::driver::{CudaStream, CudaView, CudaViewMut, DeviceRepr, LaunchConfig, PushKernelArg};
use half::{bf16, f16};
use std::sync::Arc;

/// The scale of each block of a quantized weight.
#[derive(Debug, Clone, Copy)]
pub enum Absmax<'a, 'b> {
    /// `absmax [blocks]` f32.
    Plain(&'a CudaView<'b, f32>),
    /// Double quantization: absmax is itself held in 8 bits.
    Nested {
        /// `absmax [blocks]`, as codes.
        absmax: &'a CudaView<'b, u8>,
        /// `nested_quant_map [256]`: what each code stands for.
        nested_quant_map: &'a CudaView<'b, f32>,
        /// `nested_absmax [blocks / 256, rounded up]`.
        nested_absmax: &'a CudaView<'b, f32>,
        /// The mean that was subtracted from absmax before it was quantized.
        offset: f32,
    },
}

/// The element types that a weight can be dequantized to: f32, f16 and bf16.
pub trait Nf4Output: DeviceRepr + sealed::Sealed {
    /// The kernel for plain statistics.
    const PLAIN: &'static Kernel;
    /// The kernel for nested statistics.
    const NESTED: &'static Kernel;
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::f16 {}
    impl Sealed for half::bf16 {}
}

impl Nf4Output for f32 {
    const PLAIN: &'static Kernel = &modules::NF4_DEQUANTIZE_F32;
    const NESTED: &'static Kernel = &modules::NF4_DEQUANTIZE_NESTED_F32;
}

impl Nf4Output for f16 {
    const PLAIN: &'static Kernel = &modules::NF4_DEQUANTIZE_F16;
    const NESTED: &'static Kernel = &modules::NF4_DEQUANTIZE_NESTED_F16;
}

impl Nf4Output for bf16 {
    const PLAIN: &'static Kernel = &modules::NF4_DEQUANTIZE_BF16;
    const NESTED: &'static Kernel = &modules::NF4_DEQUANTIZE_NESTED_BF16;
}

/// `out[i] = quant_map[code[i]] * absmax[i / block_size]`, in f32 and rounded once to `T`.
///
/// `packed [(elements + 1) / 2]` holds two codes a byte, the first in the high nibble;
/// `out [elements]` says how many elements there are. `block_size` is a power of two from 32 to
/// 4096.
///
/// # Errors
/// When a length does not fit `out` and `block_size`, when `out` does not start at a multiple of
/// 16 bytes or `packed` at a multiple of 4, or when the driver refuses.
pub fn dequantize<T: Nf4Output>(
    kernels: &Kernels,
    stream: &Arc<CudaStream>,
    packed: &CudaView<'_, u8>,
    absmax: Absmax<'_, '_>,
    block_size: u32,
    out: &mut CudaViewMut<'_, T>,
) -> Result<(), LaunchError> {
    if !block_size.is_power_of_two() || !(32..=4096).contains(&block_size) {
        return Err(LaunchError::Parameter {
            parameter: "block_size",
            found: u64::from(block_size),
            expected: "it must be a power of two from 32 to 4096",
        });
    }
    let elements = out.len() as u64;
    let weight_blocks = elements.div_ceil(u64::from(block_size));
    check_length("packed", packed.len(), elements.div_ceil(2))?;
    match absmax {
        Absmax::Plain(absmax) => check_length("absmax", absmax.len(), weight_blocks)?,
        Absmax::Nested {
            absmax,
            nested_quant_map,
            nested_absmax,
            ..
        } => {
            let nested_blocks = weight_blocks.div_ceil(u64::from(NF4_NESTED_BLOCK_SIZE));
            check_length("absmax", absmax.len(), weight_blocks)?;
            check_length("nested_quant_map", nested_quant_map.len(), 256)?;
            check_length("nested_absmax", nested_absmax.len(), nested_blocks)?;
        }
    }
    if elements == 0 {
        return Ok(());
    }
    check_alignment("packed", packed, stream, 4)?;
    check_alignment("out", out, stream, 16)?;

    let per_store = 16 / size_of::<T>() as u64;
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
    match absmax {
        Absmax::Plain(absmax) => {
            let function = kernels.function(T::PLAIN)?;
            let mut launch = stream.launch_builder(&function);
            launch.arg(packed).arg(absmax).arg(out).arg(&shape);
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
            let function = kernels.function(T::NESTED)?;
            let mut launch = stream.launch_builder(&function);
            launch
                .arg(packed)
                .arg(absmax)
                .arg(nested_quant_map)
                .arg(nested_absmax);
            launch.arg(out).arg(&shape);
            // SAFETY: as above.
            unsafe { launch.launch(config) }?;
        }
    }
    Ok(())
}
