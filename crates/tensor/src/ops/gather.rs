//! Rows chosen by index: the embedding, and the target rows in front of the head.

use crate::{DType, Result, Tensor, Weight, check, parallel, simd};
use rayon::prelude::*;

/// The embedding: `y[i] = table[ids[i]]`, with `table [rows, width]` in any storage, `ids [n]` U32,
/// `y [n, width]` F32.
///
/// # Errors
/// When an id is not below `rows` (names position and id), and on shapes and data types that do not fit.
pub fn forward(table: &Weight, ids: &Tensor) -> Result<Tensor> {
    let (rows, width) = table.matrix("table")?;
    let n = ids.vector("ids", "[n]")?;
    let index = ids.u32("ids")?;
    check::indices("ids", index, rows)?;
    let mut y = Tensor::empty(ids.device(), [n, width], DType::F32)?;
    if width > 0 {
        let chunks = y
            .as_f32_mut()?
            .par_chunks_mut(width)
            .with_min_len(parallel::rows_per_task(width));
        parallel::for_each(chunks.zip(index), |(y, &id)| {
            let start = id as usize * width;
            table.decode(start..start + width, y);
        });
    }
    Ok(y)
}

/// `y[i] = x[ids[i]]`, with `x [m, width]` F32, `ids [n]` U32, `y [n, width]`.
///
/// # Errors
/// As [`forward`].
pub fn rows(x: &Tensor, ids: &Tensor) -> Result<Tensor> {
    let (m, width) = x.matrix("x", "[m, width]")?;
    let n = ids.vector("ids", "[n]")?;
    let index = ids.u32("ids")?;
    check::indices("ids", index, m)?;
    let source = x.f32("x")?;
    let mut y = Tensor::empty(x.device(), [n, width], DType::F32)?;
    if width > 0 {
        let chunks = y
            .as_f32_mut()?
            .par_chunks_mut(width)
            .with_min_len(parallel::rows_per_task(width));
        parallel::for_each(chunks.zip(index), |(y, &id)| {
            y.copy_from_slice(&source[id as usize * width..][..width]);
        });
    }
    Ok(y)
}

/// The backward pass of both, added to `dx`: `dx[ids[i]] += dy[i]`, with `dy [n, width]`,
/// `ids [n]`, `dx [m, width]`. An id may repeat.
///
/// # Errors
/// As [`forward`].
pub fn scatter_add_rows(dy: &Tensor, ids: &Tensor, dx: &mut Tensor) -> Result<()> {
    let (m, width) = dx.matrix("dx", "[m, width]")?;
    let n = ids.vector("ids", "[n]")?;
    dy.check_shape("dy", &[n, width])?;
    let index = ids.u32("ids")?;
    check::indices("ids", index, m)?;
    let (dy, dx) = (dy.f32("dy")?, dx.f32_mut("dx")?);
    simd::vectorize(
        #[inline(always)]
        || {
            for (i, &id) in index.iter().enumerate() {
                simd::axpy(
                    1.0,
                    &dy[i * width..][..width],
                    &mut dx[id as usize * width..][..width],
                );
            }
        },
    );
    Ok(())
}
