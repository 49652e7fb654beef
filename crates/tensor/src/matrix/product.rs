//! Sums of matrix products on one thread: `out = Σ scale · lhs·rhs`, or `out += …`.
//!
//! The right-hand sides are cut into panels of columns, two vector registers wide and packed row by row, so
//! that one panel of a block of rows stays in the first-level cache. A tile of `out`, six rows by one panel,
//! is added up in registers while the elements of the left-hand sides, read where they are, are broadcast.
//! Every term of the sum goes through the same registers: a low-rank update costs no second pass over `out`.
//!
//! The order in which an element's products are added depends on its position in the terms alone, not on the
//! tile or thread that computes it.

use super::prefetch::Prefetch;
use super::{Matrix, MatrixMut, Write};
use crate::{Device, Result};
use pulp::{Simd, WithSimd};
use std::ops::Range;

/// Rows of a tile. Twelve accumulators, two registers of a panel and a broadcast fill AVX2's sixteen; with
/// AVX-512's thirty-two, taller tiles were slower.
const TILE_ROWS: usize = 6;
/// Rows of a tile where the panel is one register wide: as many accumulators.
const NARROW_TILE_ROWS: usize = 12;
/// Rows of a panel at most: 20 KiB with AVX2, which leaves room in the first-level cache for a strip of rows.
/// AVX-512 takes its twice as wide panels from the second level as fast.
const DEPTH: usize = 320;
/// A multiple of every machine's panel width.
pub(crate) const PANEL: usize = 32;
/// A last part of a sum up to this deep joins the block before it.
const REST: usize = 32;
/// Rows of the left-hand side that stay in the second-level cache while every panel is multiplied with them.
const ROW_BLOCK: usize = 20 * TILE_ROWS;

/// Rows of a tile of output for one task, when the output is cut into so many columns of tiles: as many as
/// leave every thread some tiles to take from a slower one, because every task packs its right-hand side.
pub(crate) fn rows_per_task(rows: usize, column_tiles: usize) -> usize {
    let pieces = (3 * rayon::current_num_threads()).div_ceil(column_tiles.max(1));
    rows.div_ceil(pieces)
        .next_multiple_of(TILE_ROWS)
        .clamp(8 * TILE_ROWS, 1024)
}

/// One term of a sum of products.
#[derive(Clone, Copy)]
pub(crate) struct Term<'a> {
    pub lhs: Matrix<'a>,
    pub rhs: Matrix<'a>,
    pub scale: f32,
}

impl<'a> Term<'a> {
    /// `lhs·rhs` as it is.
    pub fn new(lhs: Matrix<'a>, rhs: Matrix<'a>) -> Term<'a> {
        Term {
            lhs,
            rhs,
            scale: 1.0,
        }
    }
}

/// `out = Σ scale · lhs·rhs` over the terms, or `out += …`, on this thread.
pub(crate) fn multiply(
    out: &mut MatrixMut,
    write: Write,
    terms: &[Term],
    device: &Device,
) -> Result<()> {
    let mut groups: Vec<Vec<(&Term, Range<usize>)>> = Vec::new();
    let mut depth = DEPTH + REST;
    for term in terms {
        let whole = term.lhs.columns;
        let part = whole.div_ceil(whole.div_ceil(DEPTH).max(1)).max(1);
        for start in (0..whole).step_by(part) {
            let range = start..whole.min(start + part);
            if depth + range.len() > DEPTH + REST {
                groups.push(Vec::new());
                depth = 0;
            }
            depth += range.len();
            if let Some(group) = groups.last_mut() {
                group.push((term, range));
            }
        }
    }
    if groups.is_empty() {
        multiply_panels(out, write, &[]);
        return Ok(());
    }
    let len = |group: &[(&Term, Range<usize>)]| {
        let depth = group.iter().map(|(_, range)| range.len()).sum();
        Panels::len(depth, out.columns)
    };
    let most = groups.iter().map(|group| len(group)).max();
    let mut scratch = device.scratch(most.unwrap_or(0))?;
    let mut groups = groups.into_iter().peekable();
    let mut write = write;
    while let Some(group) = groups.next() {
        let mut rest = scratch.f32_mut();
        let mut packed = Vec::with_capacity(group.len());
        for (term, range) in group {
            let rhs = term.rhs.row_block(range.clone());
            let (buffer, others) = rest.split_at_mut(Panels::len(range.len(), out.columns));
            rest = others;
            packed.push((
                term.lhs.column_block(range),
                Panels::pack(rhs, term.scale, buffer),
            ));
        }
        let next = groups.peek().into_iter().flatten();
        let next = next.map(|(term, range)| term.rhs.row_block(range.clone()));
        multiply_panels_and_fetch(out, write, &packed, Prefetch::new(next.collect()));
        write = Write::Add;
    }
    Ok(())
}

/// A right-hand side in panels of columns; the last panel is filled up with zeros.
#[derive(Clone, Copy)]
pub(crate) struct Panels<'a> {
    data: &'a [f32],
    rows: usize,
    columns: usize,
    /// Columns of a panel.
    width: usize,
    /// Elements from a row of a panel to the next.
    stride: usize,
    /// Elements from a panel to the next.
    panel_stride: usize,
}

impl<'a> Panels<'a> {
    /// Elements that the panels of a matrix take.
    pub fn len(rows: usize, columns: usize) -> usize {
        rows * columns.next_multiple_of(panel_width(columns))
    }

    /// `scale · rhs` as panels in `buffer`, which has exactly [`Panels::len`] elements.
    pub fn pack(rhs: Matrix, scale: f32, buffer: &'a mut [f32]) -> Panels<'a> {
        assert_eq!(buffer.len(), Panels::len(rhs.rows, rhs.columns));
        let width = panel_width(rhs.columns);
        let panel_stride = rhs.rows * width;
        if panel_stride > 0 {
            crate::simd::vectorize(
                #[inline(always)]
                || {
                    for (panel, target) in buffer.chunks_exact_mut(panel_stride).enumerate() {
                        let first = panel * width;
                        let count = width.min(rhs.columns - first);
                        pack_panel(rhs, first, count, scale, target, width);
                    }
                },
            );
        }
        Panels {
            data: buffer,
            rows: rhs.rows,
            columns: rhs.columns,
            width,
            stride: width,
            panel_stride,
        }
    }

    /// `rhs` read where it is, in panels of one register, when its rows can be cut into whole ones: for
    /// products with so few rows that packing would cost more than it saves.
    pub fn in_place(rhs: Matrix<'a>) -> Option<Panels<'a>> {
        let width = lanes();
        let whole = rhs.column_stride == 1 && rhs.columns.is_multiple_of(width);
        whole.then_some(Panels {
            data: rhs.data,
            rows: rhs.rows,
            columns: rhs.columns,
            width,
            stride: rhs.row_stride,
            panel_stride: width,
        })
    }

    /// The given rows.
    pub fn row_block(self, rows: Range<usize>) -> Panels<'a> {
        assert!(rows.start <= rows.end && rows.end <= self.rows);
        Panels {
            data: self
                .data
                .get(rows.start * self.stride..)
                .unwrap_or_default(),
            rows: rows.len(),
            ..self
        }
    }

    /// The given columns, which begin where a panel begins: at a multiple of [`PANEL`] in any case.
    pub fn column_block(self, columns: Range<usize>) -> Panels<'a> {
        assert!(columns.start <= columns.end && columns.end <= self.columns);
        assert!(columns.start.is_multiple_of(self.width));
        let first = columns.start / self.width * self.panel_stride;
        Panels {
            data: self.data.get(first..).unwrap_or_default(),
            columns: columns.len(),
            ..self
        }
    }

    /// Panics unless every panel lies inside the data.
    fn check(&self) {
        if self.rows > 0 && self.columns > 0 {
            let last = (self.columns.div_ceil(self.width) - 1) * self.panel_stride
                + (self.rows - 1) * self.stride
                + self.width;
            assert!(last <= self.data.len());
        }
    }
}

#[inline(always)]
fn pack_panel(
    rhs: Matrix,
    first: usize,
    count: usize,
    scale: f32,
    target: &mut [f32],
    width: usize,
) {
    if rhs.column_stride == 1 {
        for (row, target) in target.chunks_exact_mut(width).enumerate() {
            let source = &rhs.data[row * rhs.row_stride + first..][..count];
            for (target, &x) in target.iter_mut().zip(source) {
                *target = scale * x;
            }
            target[count..].fill(0.0);
        }
        return;
    }
    if count < width {
        target.fill(0.0);
    }
    // Squares of eight by eight, whose rows and columns are vectors.
    const SIDE: usize = 8;
    for column in (0..count).step_by(SIDE) {
        let columns = SIDE.min(count - column);
        let source = |column: usize| &rhs.data[(first + column) * rhs.column_stride..][..rhs.rows];
        for row in (0..rhs.rows).step_by(SIDE) {
            let rows = SIDE.min(rhs.rows - row);
            if columns == SIDE && rows == SIDE {
                let mut square = [[0.0; SIDE]; SIDE];
                for (j, values) in square.iter_mut().enumerate() {
                    values.copy_from_slice(&source(column + j)[row..row + SIDE]);
                }
                for i in 0..SIDE {
                    let target = &mut target[(row + i) * width + column..][..SIDE];
                    for j in 0..SIDE {
                        target[j] = scale * square[j][i];
                    }
                }
            } else {
                for j in column..column + columns {
                    for i in row..row + rows {
                        target[i * width + j] = scale * source(j)[i];
                    }
                }
            }
        }
    }
}

/// Columns of the panels of a matrix with so many columns on this machine.
fn panel_width(columns: usize) -> usize {
    let lanes = lanes();
    if columns <= lanes { lanes } else { 2 * lanes }
}

/// Elements of a vector register.
fn lanes() -> usize {
    struct Lanes;
    impl WithSimd for Lanes {
        type Output = usize;

        fn with_simd<S: Simd>(self, _: S) -> usize {
            S::F32_LANES
        }
    }
    pulp::Arch::new().dispatch(Lanes)
}

/// `out = Σ lhs·rhs` over the terms, or `out += …`. The left-hand sides are all row-major or all transposed.
pub(crate) fn multiply_panels(out: &mut MatrixMut, write: Write, terms: &[(Matrix, Panels)]) {
    multiply_panels_and_fetch(out, write, terms, Prefetch::none());
}

/// [`multiply_panels`], between whose tiles `next` is fetched.
fn multiply_panels_and_fetch(
    out: &mut MatrixMut,
    write: Write,
    terms: &[(Matrix, Panels)],
    next: Prefetch,
) {
    if terms.is_empty() && write == Write::Replace {
        (0..out.rows).for_each(|row| out.row_mut(row).fill(0.0));
    }
    if out.rows == 0 || out.columns == 0 || terms.is_empty() {
        return;
    }
    let by_rows = terms.iter().all(|(lhs, _)| lhs.column_stride == 1);
    for (lhs, rhs) in terms {
        assert_eq!(
            (out.rows, out.columns, lhs.columns),
            (lhs.rows, rhs.columns, rhs.rows)
        );
        assert!(by_rows || lhs.row_stride == 1);
        if lhs.columns > 0 {
            let last = (lhs.rows - 1) * lhs.row_stride + (lhs.columns - 1) * lhs.column_stride;
            assert!(last < lhs.data.len());
        }
        rhs.check();
    }
    let product = Product {
        out,
        write,
        terms,
        by_rows,
        next,
    };
    pulp::Arch::new().dispatch(product);
}

struct Product<'a, 'b> {
    out: &'a mut MatrixMut<'b>,
    write: Write,
    terms: &'a [(Matrix<'a>, Panels<'a>)],
    by_rows: bool,
    next: Prefetch<'a>,
}

impl WithSimd for Product<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let narrow = self.terms[0].1.width == S::F32_LANES;
        match (narrow, self.by_rows) {
            (true, true) => self.run::<S, 1, true>(simd),
            (true, false) => self.run::<S, 1, false>(simd),
            (false, true) => self.run::<S, 2, true>(simd),
            (false, false) => self.run::<S, 2, false>(simd),
        }
    }
}

impl Product<'_, '_> {
    #[inline(always)]
    fn run<S: Simd, const VECTORS: usize, const BY_ROWS: bool>(self, simd: S) {
        let width = VECTORS * S::F32_LANES;
        assert!(self.terms.iter().all(|(_, rhs)| rhs.width == width));
        let tile_rows = if VECTORS == 1 {
            NARROW_TILE_ROWS
        } else {
            TILE_ROWS
        };
        let (out, mut next) = (self.out, self.next);
        let tiles = out.rows.div_ceil(tile_rows) * out.columns.div_ceil(width);
        let lines_per_tile = next.lines().div_ceil(tiles);
        for block in (0..out.rows).step_by(ROW_BLOCK) {
            let block = block..out.rows.min(block + ROW_BLOCK);
            for panel in 0..out.columns.div_ceil(width) {
                for row in block.clone().step_by(tile_rows) {
                    next.fetch(lines_per_tile);
                    let tile = Tile {
                        terms: self.terms,
                        row,
                        panel,
                        columns: width.min(out.columns - panel * width),
                        // Inside `out`, as row and panel are.
                        out: out.data.wrapping_add(row * out.row_stride + panel * width),
                        stride: out.row_stride,
                        write: self.write,
                    };
                    // SAFETY: the caller has checked that the terms reach every row and panel of `out`, and
                    // each branch computes no more rows than the block has left.
                    unsafe {
                        match block.end - row {
                            1 => tile.run::<S, 1, VECTORS, BY_ROWS>(simd),
                            2 => tile.run::<S, 2, VECTORS, BY_ROWS>(simd),
                            3 => tile.run::<S, 3, VECTORS, BY_ROWS>(simd),
                            4 => tile.run::<S, 4, VECTORS, BY_ROWS>(simd),
                            5 => tile.run::<S, 5, VECTORS, BY_ROWS>(simd),
                            rows if VECTORS > 1 || rows == 6 => {
                                tile.run::<S, 6, VECTORS, BY_ROWS>(simd)
                            }
                            7 => tile.run::<S, 7, VECTORS, BY_ROWS>(simd),
                            8 => tile.run::<S, 8, VECTORS, BY_ROWS>(simd),
                            9 => tile.run::<S, 9, VECTORS, BY_ROWS>(simd),
                            10 => tile.run::<S, 10, VECTORS, BY_ROWS>(simd),
                            11 => tile.run::<S, 11, VECTORS, BY_ROWS>(simd),
                            _ => tile.run::<S, 12, VECTORS, BY_ROWS>(simd),
                        }
                    }
                }
            }
        }
    }
}

/// Repeats a block for `$index` from 0 to `$count`, at most 12, both constants: a loop that the compiler
/// unrolls late, or not at all, would keep the sums in memory.
macro_rules! unrolled {
    ($count:expr, $index:ident => $body:block) => {
        unrolled!(@ $count, $index, $body, 0 1 2 3 4 5 6 7 8 9 10 11)
    };
    (@ $count:expr, $index:ident, $body:block, $($value:literal)*) => {
        $(if $value < $count {
            const $index: usize = $value;
            $body
        })*
    };
}

/// A tile of the output: some rows of one panel.
struct Tile<'a> {
    terms: &'a [(Matrix<'a>, Panels<'a>)],
    row: usize,
    panel: usize,
    columns: usize,
    out: *mut f32,
    stride: usize,
    write: Write,
}

impl Tile<'_> {
    /// # Safety
    /// `row + ROWS` rows and `panel` lie inside every term and inside the output.
    #[inline(always)]
    unsafe fn run<S: Simd, const ROWS: usize, const VECTORS: usize, const BY_ROWS: bool>(
        self,
        simd: S,
    ) {
        let mut sums = [[simd.splat_f32s(0.0); VECTORS]; ROWS];
        for (lhs, rhs) in self.terms {
            // SAFETY: the pointers stay inside the terms' data, as the caller promises; in-place panels and
            // rows of left-hand sides have the strides that were checked against that data.
            unsafe {
                let mut b = rhs.data.as_ptr().add(self.panel * rhs.panel_stride);
                let a = lhs.data.as_ptr().add(self.row * lhs.row_stride);
                for k in 0..rhs.rows {
                    let mut vectors = [simd.splat_f32s(0.0); VECTORS];
                    unrolled!(VECTORS, V => {
                        vectors[V] = b.add(V * S::F32_LANES).cast::<S::f32s>().read_unaligned();
                    });
                    unrolled!(ROWS, ROW => {
                        let x = simd.splat_f32s(if BY_ROWS {
                            *a.add(ROW * lhs.row_stride + k)
                        } else {
                            *a.add(k * lhs.column_stride + ROW)
                        });
                        unrolled!(VECTORS, V => {
                            sums[ROW][V] = simd.mul_add_f32s(x, vectors[V], sums[ROW][V]);
                        });
                    });
                    b = b.add(rhs.stride);
                }
            }
        }
        if self.columns == VECTORS * S::F32_LANES {
            unrolled!(ROWS, ROW => {
                unrolled!(VECTORS, V => {
                    // SAFETY: the tile is whole, and the output holds its rows.
                    unsafe {
                        let out = self.out.add(ROW * self.stride + V * S::F32_LANES);
                        let out = out.cast::<S::f32s>();
                        out.write_unaligned(match self.write {
                            Write::Replace => sums[ROW][V],
                            Write::Add => simd.add_f32s(out.read_unaligned(), sums[ROW][V]),
                        });
                    }
                });
            });
            return;
        }
        let sums = sums;
        for (row, sums) in sums.iter().enumerate() {
            // SAFETY: the output holds `columns` elements of the tile's rows.
            let out = unsafe {
                std::slice::from_raw_parts_mut(self.out.add(row * self.stride), self.columns)
            };
            let sums: &[f32] = bytemuck::cast_slice(sums);
            for (out, &sum) in out.iter_mut().zip(sums) {
                match self.write {
                    Write::Replace => *out = sum,
                    Write::Add => *out += sum,
                }
            }
        }
    }
}
