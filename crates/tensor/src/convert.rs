//! Between f32 and the narrower float formats.

use crate::DType;
use half::{bf16, f16, slice::HalfFloatSliceExt};

/// Decodes the little-endian float elements in `bytes`, aligned to their type, into `out`.
pub(crate) fn decode(dtype: DType, bytes: &[u8], out: &mut [f32]) {
    match dtype {
        DType::F32 => out.copy_from_slice(bytemuck::cast_slice(bytes)),
        DType::F16 => bytemuck::cast_slice::<u8, f16>(bytes).convert_to_f32_slice(out),
        DType::BF16 => {
            for (out, &bits) in out.iter_mut().zip(bytemuck::cast_slice::<u8, u16>(bytes)) {
                *out = f32::from_bits(u32::from(bits) << 16);
            }
        }
        DType::U32 | DType::U8 => unreachable!("callers pass float types only"),
    }
}

/// Encodes `values` as elements of a float type, rounding to nearest even.
pub(crate) fn encode(values: &[f32], dtype: DType, out: &mut [u8]) {
    match dtype {
        DType::F32 => out.copy_from_slice(bytemuck::cast_slice(values)),
        DType::F16 => bytemuck::cast_slice_mut::<u8, f16>(out).convert_from_f32_slice(values),
        DType::BF16 => bytemuck::cast_slice_mut::<u8, bf16>(out).convert_from_f32_slice(values),
        DType::U32 | DType::U8 => unreachable!("callers pass float types only"),
    }
}
