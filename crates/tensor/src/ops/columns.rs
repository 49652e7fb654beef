//! Column blocks of a matrix: the parts of a fused projection, such as GPT-2's queries, keys and values.

use crate::{DType, Error, Result, Tensor, check, parallel};
use rayon::prelude::*;

/// `x [rows, Σ widths]` F32 as one contiguous tensor `[rows, width]` per width.
///
/// # Errors
/// When the widths do not sum to the columns, and on data types that do not fit.
pub fn split<const N: usize>(x: &Tensor, widths: [usize; N]) -> Result<[Tensor; N]> {
    let (rows, columns) = x.matrix("x", "[rows, columns]")?;
    if widths.iter().sum::<usize>() != columns {
        return Err(Error::Argument(format!(
            "x: {columns} columns are not blocks of {widths:?}"
        )));
    }
    let source = x.f32("x")?;
    let mut first = 0;
    let mut parts = Vec::with_capacity(N);
    for width in widths {
        let mut part = Tensor::empty(x.device(), [rows, width], DType::F32)?;
        if width > 0 {
            let per_task = parallel::rows_per_task(width);
            let chunks = part
                .as_f32_mut()?
                .par_chunks_mut(width * per_task)
                .zip(source.par_chunks(columns * per_task));
            parallel::for_each(chunks, |(part, source)| {
                let rows = part
                    .chunks_exact_mut(width)
                    .zip(source.chunks_exact(columns));
                rows.for_each(|(part, row)| part.copy_from_slice(&row[first..first + width]));
            });
        }
        first += width;
        parts.push(part);
    }
    parts
        .try_into()
        .map_err(|_| Error::Argument("x: a block is missing".into()))
}

/// Single columns of `x [rows, columns]` F32: `y[i][j] = x[i][ids[j]]`, with `ids [n]` U32, `y [rows, n]`.
///
/// # Errors
/// When an id is no column, and on data types and devices that do not fit.
pub fn take(x: &Tensor, ids: &Tensor) -> Result<Tensor> {
    let (rows, columns) = x.matrix("x", "[rows, columns]")?;
    let n = ids.vector("ids", "[n]")?;
    ids.check_device("ids", x.device())?;
    check::indices("ids", ids, columns)?;
    let (source, ids) = (x.f32("x")?, ids.u32("ids")?);
    let mut y = Tensor::empty(x.device(), [rows, n], DType::F32)?;
    let rows = y
        .as_f32_mut()?
        .chunks_exact_mut(n.max(1))
        .zip(source.chunks_exact(columns.max(1)));
    for (y, row) in rows {
        for (y, &id) in y.iter_mut().zip(ids) {
            *y = row[id as usize];
        }
    }
    Ok(y)
}

/// The inverse of [`split`]: `parts [rows, width]` F32 side by side.
///
/// # Errors
/// When the rows differ, and on data types that do not fit.
pub fn join<const N: usize>(parts: [&Tensor; N]) -> Result<Tensor> {
    let Some(head) = parts.first() else {
        return Err(Error::Argument("parts: there is no block to join".into()));
    };
    let (rows, _) = head.matrix("part 0", "[rows, width]")?;
    let mut blocks = Vec::with_capacity(N);
    for (index, part) in parts.iter().enumerate() {
        let name = format!("part {index}");
        let (_, width) = part.matrix(&name, "[rows, width]")?;
        part.check_shape(&name, &[rows, width])?;
        blocks.push((part.f32(&name)?, width));
    }
    let columns = blocks.iter().map(|(_, width)| width).sum::<usize>();
    let mut joined = Tensor::empty(head.device(), [rows, columns], DType::F32)?;
    if columns > 0 {
        let per_task = parallel::rows_per_task(columns);
        let chunks = joined
            .as_f32_mut()?
            .par_chunks_mut(columns * per_task)
            .enumerate();
        parallel::for_each(chunks, |(task, chunk)| {
            for (row, target) in (task * per_task..).zip(chunk.chunks_exact_mut(columns)) {
                let mut first = 0;
                for &(block, width) in &blocks {
                    target[first..first + width]
                        .copy_from_slice(&block[row * width..(row + 1) * width]);
                    first += width;
                }
            }
        });
    }
    Ok(joined)
}
