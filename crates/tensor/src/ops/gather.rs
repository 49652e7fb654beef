//! Rows chosen by index: the embedding, and the target rows in front of the head.

use crate::{DType, Result, Tensor, Weight, check, parallel, simd, tensor::Largest};
#[cfg(feature = "cuda")]
use fuselora_kernels::embedding;
use rayon::prelude::*;

/// The embedding: `y[i] = table[ids[i]]`, with `table [rows, width]`, `ids [n]` U32, `y [n, width]`. On the CPU the
/// table is in any storage and y is F32; on a CUDA device both have the activations' type.
///
/// # Errors
/// When an id is not below `rows` (names position and id), and on shapes and data types that do not fit.
pub fn forward(table: &Weight, ids: &Tensor) -> Result<Tensor> {
    let (rows, width) = table.matrix("table")?;
    let n = ids.vector("ids", "[n]")?;
    table.check_device("table", ids.device())?;
    check::indices("ids", ids, rows)?;
    #[cfg(feature = "cuda")]
    if !ids.device().is_cpu() {
        return on_cuda::gather(table.expect_dense("table")?, ids);
    }
    let index = ids.u32("ids")?;
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

/// `y[i] = x[ids[i]]`, with `x [m, width]` of a float type, `ids [n]` U32, `y [n, width]`.
///
/// # Errors
/// As [`forward`].
pub fn rows(x: &Tensor, ids: &Tensor) -> Result<Tensor> {
    let (m, width) = x.matrix("x", "[m, width]")?;
    let n = ids.vector("ids", "[n]")?;
    ids.check_device("ids", x.device())?;
    check::indices("ids", ids, m)?;
    #[cfg(feature = "cuda")]
    if !x.device().is_cpu() {
        return on_cuda::gather(x, ids);
    }
    let index = ids.u32("ids")?;
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

/// Puts other rows in place of some: `table[ids[i]] = rows[i]`, with `table [m, width]` and `rows [n, width]` of one float
/// type. A copy for each row: meant for few.
///
/// # Errors
/// As [`forward`].
pub fn set_rows(table: &mut Tensor, ids: &[u32], rows: &Tensor) -> Result<()> {
    let (m, width) = table.matrix("table", "[m, width]")?;
    rows.check_shape("rows", &[ids.len(), width])?;
    rows.check_dtype("rows", table.dtype())?;
    rows.check_device("rows", table.device())?;
    check::largest("ids", Largest::of(ids), m)?;
    let row_bytes = width * table.dtype().size_in_bytes();
    for (i, &id) in ids.iter().enumerate() {
        let range = i * row_bytes..(i + 1) * row_bytes;
        table.copy_bytes(id as usize * row_bytes, rows, range)?;
    }
    Ok(())
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
    check::devices(dx.device(), [("dy", dy), ("ids", ids)])?;
    check::indices("ids", ids, m)?;
    #[cfg(feature = "cuda")]
    if !dy.device().is_cpu() {
        let shape = on_cuda::shape(m, width)?;
        return dy.device().launch(|kernels| {
            embedding::scatter_add(
                kernels,
                shape,
                dy.operand(),
                ids.operand(),
                dx.operand_mut(),
            )
        });
    }
    let index = ids.u32("ids")?;
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

#[cfg(feature = "cuda")]
mod on_cuda {
    use super::{Result, Tensor, embedding};
    use crate::cuda::extents;
    use fuselora_kernels::abi::EmbeddingShape;

    pub fn shape(rows: usize, width: usize) -> Result<EmbeddingShape> {
        let [rows, width] = extents("table", [rows, width])?;
        Ok(EmbeddingShape { rows, width })
    }

    /// `y[i] = table[ids[i]]`, for checked ids.
    pub fn gather(table: &Tensor, ids: &Tensor) -> Result<Tensor> {
        let (rows, width) = table.matrix("table", "[rows, width]")?;
        let shape = shape(rows, width)?;
        let mut y = Tensor::empty(table.device(), [ids.element_count(), width], table.dtype())?;
        table.device().launch(|kernels| {
            embedding::gather(
                kernels,
                shape,
                table.operand(),
                ids.operand(),
                y.operand_mut(),
            )
        })?;
        Ok(y)
    }
}
