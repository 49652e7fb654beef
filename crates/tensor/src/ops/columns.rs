//! Column blocks of a matrix: the parts of a fused projection, such as GPT-2's queries, keys and values.

use crate::{DType, Error, Result, Tensor, check, parallel};
use rayon::prelude::*;

/// `x [rows, Σ widths]` of a float type (F32 on the CPU) as one contiguous tensor `[rows, width]` per width.
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
    #[cfg(feature = "cuda")]
    if !x.device().is_cpu() {
        return on_cuda::split(x, widths);
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

/// Single columns of `x [rows, columns]` of a float type (F32 on the CPU): `y[i][j] = x[i][ids[j]]`, with `ids [n]` U32
/// and `y [rows, n]`.
///
/// # Errors
/// When an id is no column, and on data types and devices that do not fit.
pub fn take(x: &Tensor, ids: &Tensor) -> Result<Tensor> {
    let (rows, columns) = x.matrix("x", "[rows, columns]")?;
    let n = ids.vector("ids", "[n]")?;
    ids.check_device("ids", x.device())?;
    check::indices("ids", ids, columns)?;
    #[cfg(feature = "cuda")]
    if !x.device().is_cpu() {
        return on_cuda::take(x, ids);
    }
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

/// The inverse of [`split`]: `parts [rows, width]` side by side.
///
/// # Errors
/// When the rows or the devices differ, and on data types that do not fit.
pub fn join<const N: usize>(parts: [&Tensor; N]) -> Result<Tensor> {
    let Some(head) = parts.first() else {
        return Err(Error::Argument("parts: there is no block to join".into()));
    };
    let (rows, _) = head.matrix("part 0", "[rows, width]")?;
    let mut widths = Vec::with_capacity(N);
    for (index, part) in parts.iter().enumerate() {
        let name = format!("part {index}");
        let (_, width) = part.matrix(&name, "[rows, width]")?;
        part.check_shape(&name, &[rows, width])?;
        part.check_dtype(&name, head.dtype())?;
        part.check_device(&name, head.device())?;
        widths.push(width);
    }
    #[cfg(feature = "cuda")]
    if !head.device().is_cpu() {
        return on_cuda::join(&parts, rows, &widths);
    }
    let blocks = parts.iter().zip(widths).enumerate();
    let blocks = blocks
        .map(|(index, (part, width))| Ok((part.f32(&format!("part {index}"))?, width)))
        .collect::<Result<Vec<_>>>()?;
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

#[cfg(feature = "cuda")]
mod on_cuda {
    use super::{Error, Result, Tensor};
    use crate::cuda::extents;
    use fuselora_kernels::abi::ColumnBlock;
    use fuselora_kernels::columns;

    pub fn split<const N: usize>(x: &Tensor, widths: [usize; N]) -> Result<[Tensor; N]> {
        let (rows, columns) = x.matrix("x", "[rows, columns]")?;
        let [block_rows, from_columns] = extents("x", [rows, columns])?;
        let mut from_first = 0;
        let mut parts = Vec::with_capacity(N);
        for width in widths {
            let mut part = Tensor::empty(x.device(), [rows, width], x.dtype())?;
            let [width] = extents("x", [width])?;
            let block = ColumnBlock {
                rows: block_rows,
                width,
                from_columns,
                from_first,
                to_columns: width,
                to_first: 0,
            };
            x.device()
                .launch(|kernels| columns::copy(kernels, block, x.operand(), part.operand_mut()))?;
            from_first += width;
            parts.push(part);
        }
        parts
            .try_into()
            .map_err(|_| Error::Argument("x: a block is missing".into()))
    }

    /// Parts of one type and device that have been checked.
    pub fn join(parts: &[&Tensor], rows: usize, widths: &[usize]) -> Result<Tensor> {
        let (device, dtype) = (parts[0].device(), parts[0].dtype());
        let columns = widths.iter().sum::<usize>();
        let mut joined = Tensor::empty(device, [rows, columns], dtype)?;
        let [rows, to_columns] = extents("the parts", [rows, columns])?;
        let mut to_first = 0;
        for (part, &width) in parts.iter().zip(widths) {
            let [width] = extents("the parts", [width])?;
            let block = ColumnBlock {
                rows,
                width,
                from_columns: width,
                from_first: 0,
                to_columns,
                to_first,
            };
            device.launch(|kernels| {
                columns::copy(kernels, block, part.operand(), joined.operand_mut())
            })?;
            to_first += width;
        }
        Ok(joined)
    }

    /// For checked ids.
    pub fn take(x: &Tensor, ids: &Tensor) -> Result<Tensor> {
        let (rows, columns) = x.matrix("x", "[rows, columns]")?;
        let mut y = Tensor::empty(x.device(), [rows, ids.element_count()], x.dtype())?;
        let [rows, columns] = extents("x", [rows, columns])?;
        x.device().launch(|kernels| {
            let (x, ids) = (x.operand(), ids.operand());
            columns::take(kernels, rows, columns, x, ids, y.operand_mut())
        })?;
        Ok(y)
    }
}
