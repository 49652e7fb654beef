//! Operations on every element alone.

use crate::{Result, Tensor, parallel, simd};
use rayon::prelude::*;

const CHUNK: usize = 1 << 14;

/// `y += x`, of equal shapes, F32.
///
/// # Errors
/// When shapes differ or a tensor is not F32.
pub fn add_assign(y: &mut Tensor, x: &Tensor) -> Result<()> {
    add_scaled(y, 1.0, x)
}

/// `y -= x`, of equal shapes, F32.
///
/// # Errors
/// When shapes differ or a tensor is not F32.
pub fn subtract_assign(y: &mut Tensor, x: &Tensor) -> Result<()> {
    add_scaled(y, -1.0, x)
}

fn add_scaled(y: &mut Tensor, factor: f32, x: &Tensor) -> Result<()> {
    x.check_shape("x", y.shape())?;
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

/// `x *= factor`, F32.
///
/// # Errors
/// When the tensor is not F32.
pub fn scale(x: &mut Tensor, factor: f32) -> Result<()> {
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

/// The position of the first NaN or infinite element, F32.
///
/// # Errors
/// When the tensor is not F32.
pub fn find_nonfinite(x: &Tensor) -> Result<Option<usize>> {
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
