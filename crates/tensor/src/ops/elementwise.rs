//! Operations on every element alone.

use crate::{Result, Tensor, parallel, simd};
use rayon::prelude::*;

const CHUNK: usize = 1 << 14;

/// `y += x`, of equal shapes and one float type.
///
/// # Errors
/// On shapes, data types and devices that do not fit.
pub fn add_assign(y: &mut Tensor, x: &Tensor) -> Result<()> {
    check_alike(y, x)?;
    #[cfg(feature = "cuda")]
    if !x.device().is_cpu() {
        return x.device().launch(|kernels| {
            fuselora_kernels::elementwise::add_assign(kernels, x.operand(), y.operand_mut())
        });
    }
    add_scaled(y, 1.0, x)
}

/// `y -= x`, of equal shapes and one float type.
///
/// # Errors
/// On shapes, data types and devices that do not fit.
pub fn subtract_assign(y: &mut Tensor, x: &Tensor) -> Result<()> {
    check_alike(y, x)?;
    #[cfg(feature = "cuda")]
    if !x.device().is_cpu() {
        return x.device().launch(|kernels| {
            fuselora_kernels::elementwise::subtract_assign(kernels, x.operand(), y.operand_mut())
        });
    }
    add_scaled(y, -1.0, x)
}

fn check_alike(y: &Tensor, x: &Tensor) -> Result<()> {
    x.check_shape("x", y.shape())?;
    x.check_device("x", y.device())
}

fn add_scaled(y: &mut Tensor, factor: f32, x: &Tensor) -> Result<()> {
    let (x, y) = (x.f32("x")?, y.f32_mut("y")?);
    parallel::for_each(
        y.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)),
        |(y, x)| {
            simd::vectorize(
                #[inline(always)]
                || simd::axpy(factor, x, y),
            );
        },
    );
    Ok(())
}

/// `x *= factor`, of a float type.
///
/// # Errors
/// When the data type does not fit.
pub fn scale(x: &mut Tensor, factor: f32) -> Result<()> {
    #[cfg(feature = "cuda")]
    if !x.device().is_cpu() {
        return x.device().clone().launch(|kernels| {
            fuselora_kernels::elementwise::scale(kernels, x.operand_mut(), factor)
        });
    }
    parallel::for_each(x.f32_mut("x")?.par_chunks_mut(CHUNK), |x| {
        simd::vectorize(
            #[inline(always)]
            || {
                for x in x {
                    *x *= factor;
                }
            },
        );
    });
    Ok(())
}

/// The position of the first NaN or infinite element, of a float type. It waits for a CUDA device, and there stands
/// 2^32 - 2 for every later position too.
///
/// # Errors
/// When the data type does not fit.
pub fn find_nonfinite(x: &Tensor) -> Result<Option<usize>> {
    #[cfg(feature = "cuda")]
    if !x.device().is_cpu() {
        let mut first = Tensor::from_u32(x.device(), [1], &[u32::MAX])?;
        x.device().launch(|kernels| {
            fuselora_kernels::elementwise::find_nonfinite(kernels, x.operand(), first.operand_mut())
        })?;
        let position = first.to_u32_vec()?[0];
        return Ok((position != u32::MAX).then_some(position as usize));
    }
    let clean = |chunk: &[f32]| {
        simd::vectorize(
            #[inline(always)]
            || simd::sum_of_zeros(chunk),
        ) == 0.0
    };
    Ok(x.f32("x")?
        .par_chunks(CHUNK)
        .enumerate()
        .find_map_first(|(index, chunk)| {
            if clean(chunk) {
                return None;
            }
            chunk
                .iter()
                .position(|x| !x.is_finite())
                .map(|position| index * CHUNK + position)
        }))
}
