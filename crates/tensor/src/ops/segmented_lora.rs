//! Low-rank updates that differ from row to row: many adapters in one batch over one frozen product, as in Punica
//! (Chen et al., 2023) and S-LoRA (Sheng et al., 2023).

#[cfg(feature = "cuda")]
mod cuda;

use super::lora_linear::Lora;
use crate::matrix::{Matrix, MatrixMut, Panels, Term, Tile, Write, multiply, multiply_panels};
use crate::{DType, Error, Result, Tensor, simd};
use rayon::prelude::*;
use std::ops::Range;

/// Rows of a batch that one update belongs to.
#[derive(Clone)]
pub struct Segment<'a> {
    /// Rows of `x` and `y`.
    pub rows: Range<usize>,
    /// Their update, without dropout.
    pub lora: Lora<'a>,
    /// Both factors transposed, for the CPU and up to [`FEW_ROWS`] rows.
    pub transposed: Option<Transposed<'a>>,
}

/// The factors of an update, transposed.
#[derive(Clone, Copy)]
pub struct Transposed<'a> {
    /// Aᵀ, `[in, rank]` F32.
    pub a: &'a Tensor,
    /// Bᵀ, `[rank, out]` F32.
    pub b: &'a Tensor,
}

/// Tasks for each thread, where segments are few; and output features of a task at least.
const TASKS_PER_THREAD: usize = 4;
const OUT_BLOCK: usize = 96;
/// Up to this many rows, packing A or B for a product would cost more than the product: such a segment is faster with
/// [`Segment::transposed`], and longer ones do not read it.
pub const FEW_ROWS: usize = 8;

/// `y[rows] += scaling·(x[rows]·Aᵀ)·Bᵀ` for each segment, with `x [tokens, in]` and `y [tokens, out]` of one float type,
/// F32 on the CPU. Segments are in ascending order and share no row; rows of none stay as they are.
///
/// # Errors
/// On segments that overlap or reach beyond the rows, on dropout, and on shapes and data types that do not fit.
pub fn add_assign(y: &mut Tensor, x: &Tensor, segments: &[Segment]) -> Result<()> {
    check(y, x, segments)?;
    #[cfg(feature = "cuda")]
    if !x.device().is_cpu() {
        return cuda::add_assign(y, x, segments);
    }
    run(y, x, segments)
}

fn check(y: &Tensor, x: &Tensor, segments: &[Segment]) -> Result<()> {
    let (tokens, in_features) = x.matrix("x", "[tokens, in_features]")?;
    let (_, out_features) = y.matrix("y", "[tokens, out_features]")?;
    y.check_shape("y", &[tokens, out_features])?;
    x.check_float("x")?;
    y.check_dtype("y", x.dtype())?;
    y.check_device("y", x.device())?;
    let mut end = 0;
    for (index, segment) in segments.iter().enumerate() {
        let Segment {
            rows,
            lora,
            transposed,
        } = segment;
        if rows.start < end || rows.end < rows.start || rows.end > tokens {
            return Err(Error::Argument(format!(
                "segment {index}: rows {rows:?} must follow row {end} and end by {tokens}"
            )));
        }
        end = rows.end;
        if lora.dropout.is_some() {
            return Err(Error::Argument(format!(
                "segment {index}: dropout, which only training has"
            )));
        }
        lora.check_shapes(
            |tensor| format!("segment {index}: {tensor}"),
            out_features,
            in_features,
        )?;
        lora.a
            .check_device(&format!("segment {index}: lora_a"), x.device())?;
        if let Some(Transposed { a, b }) = transposed {
            let rank = lora.rank();
            for (factor, tensor, shape) in [
                ("lora_a", a, [in_features, rank]),
                ("lora_b", b, [rank, out_features]),
            ] {
                let name = format!("segment {index}: the transposed {factor}");
                tensor.check_shape(&name, &shape)?;
                tensor.check_dtype(&name, DType::F32)?;
                tensor.check_device(&name, x.device())?;
            }
        }
    }
    Ok(())
}

/// The update of one tile of one segment's rows.
struct Task<'a> {
    /// `scaling·x·Aᵀ`.
    h: Matrix<'a>,
    b: Matrix<'a>,
    b_transposed: Option<Matrix<'a>>,
    y: Tile<'a>,
}

fn run(y: &mut Tensor, x: &Tensor, segments: &[Segment]) -> Result<()> {
    let (tokens, in_features) = x.matrix("x", "[tokens, in_features]")?;
    let out_features = y.shape()[1];
    let device = x.device();
    let x = Matrix::new(x.f32("x")?, tokens, in_features);

    let lens = segments
        .iter()
        .map(|segment| segment.rows.len() * segment.lora.rank());
    let mut scratch = device.scratch(lens.sum())?;
    let mut rest = scratch.f32_mut();
    let mut hs = Vec::with_capacity(segments.len());
    for segment in segments {
        let (h, after) = rest.split_at_mut(segment.rows.len() * segment.lora.rank());
        hs.push(h);
        rest = after;
    }
    let downs = segments.iter().zip(&mut hs).collect::<Vec<_>>();
    downs.into_par_iter().try_for_each(|(segment, h)| {
        let rank = segment.lora.rank();
        let a = Matrix::new(segment.lora.a.as_f32()?, rank, in_features);
        let x = x.row_block(segment.rows.clone());
        let scaling = segment.lora.scaling;
        if x.rows() > FEW_ROWS {
            let mut h = MatrixMut::new(h, x.rows(), rank);
            let product = Term {
                lhs: x,
                rhs: a.transposed(),
                scale: scaling,
            };
            return multiply(&mut h, Write::Replace, &[product], device);
        }
        let transposed = segment.transposed.map(|own| own.a.as_f32()).transpose()?;
        let transposed = transposed.map(|a| Matrix::new(a, in_features, rank));
        if let Some(a) = transposed.and_then(Panels::in_place) {
            let mut product = MatrixMut::new(h, x.rows(), rank);
            multiply_panels(&mut product, Write::Replace, &[(x, a)]);
            h.iter_mut().for_each(|value| *value *= scaling);
            return Ok(());
        }
        simd::vectorize(
            #[inline(always)]
            || {
                for (row, h) in h.chunks_exact_mut(rank).enumerate() {
                    for (r, h) in h.iter_mut().enumerate() {
                        *h = scaling * simd::dot(x.row(row), a.row(r));
                    }
                }
            },
        );
        Ok(())
    })?;

    let tasks = TASKS_PER_THREAD * rayon::current_num_threads();
    let blocks = tasks.div_ceil(segments.len().max(1));
    let out_block = out_features.div_ceil(blocks).max(OUT_BLOCK);
    let mut tasks = Vec::new();
    let mut rest = MatrixMut::new(y.as_f32_mut()?, tokens, out_features);
    let mut begin = 0;
    for (segment, h) in segments.iter().zip(&hs) {
        let Segment { rows, lora, .. } = segment;
        let transposed = segment.transposed.filter(|_| rows.len() <= FEW_ROWS);
        let b_transposed = transposed.map(|own| own.b.as_f32()).transpose()?;
        let b_transposed = b_transposed.map(|b| Matrix::new(b, lora.rank(), out_features));
        let (_, after) = rest.split_rows(rows.start - begin);
        let (own, after) = after.split_rows(rows.len());
        (rest, begin) = (after, rows.end);
        for y in own.tiles(rows.len(), out_block) {
            tasks.push(Task {
                h: Matrix::new(h, rows.len(), lora.rank()),
                b: Matrix::new(lora.b.as_f32()?, out_features, lora.rank()),
                b_transposed,
                y,
            });
        }
    }
    tasks.into_par_iter().try_for_each(|task| {
        let Task {
            h,
            b,
            b_transposed,
            y,
        } = task;
        let columns = y.columns();
        let mut y = y.matrix;
        let in_place = b_transposed.map(|b| b.column_block(columns.clone()));
        if let Some(b) = in_place.and_then(Panels::in_place) {
            multiply_panels(&mut y, Write::Add, &[(h, b)]);
            return Ok(());
        }
        let update = Term::new(h, b.row_block(columns).transposed());
        multiply(&mut y, Write::Add, &[update], device)
    })
}
