//! Views of matrices inside tensors, and their product.

mod prefetch;
mod product;

pub(crate) use product::{PANEL, Panels, Term, multiply, multiply_panels, rows_per_task};

use std::{marker::PhantomData, ops::Range};

/// A read-only matrix whose elements lie at regular strides.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a> {
    data: &'a [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a> Matrix<'a> {
    /// All of `data` as a row-major matrix.
    pub fn new(data: &'a [f32], rows: usize, columns: usize) -> Matrix<'a> {
        assert_eq!(data.len(), rows * columns);
        Matrix {
            data,
            rows,
            columns,
            row_stride: columns,
            column_stride: 1,
        }
    }

    pub fn transposed(self) -> Matrix<'a> {
        Matrix {
            data: self.data,
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
        }
    }

    pub fn block(self, rows: Range<usize>, columns: Range<usize>) -> Matrix<'a> {
        assert!(
            rows.start <= rows.end && rows.end <= self.rows,
            "rows {rows:?} of {}",
            self.rows
        );
        assert!(
            columns.start <= columns.end && columns.end <= self.columns,
            "columns {columns:?} of {}",
            self.columns
        );
        let first = rows.start * self.row_stride + columns.start * self.column_stride;
        Matrix {
            // An empty block may start past the end.
            data: self.data.get(first..).unwrap_or_default(),
            rows: rows.len(),
            columns: columns.len(),
            ..self
        }
    }

    pub fn row_block(self, rows: Range<usize>) -> Matrix<'a> {
        self.block(rows, 0..self.columns)
    }

    pub fn column_block(self, columns: Range<usize>) -> Matrix<'a> {
        self.block(0..self.rows, columns)
    }

    /// A row of a matrix that was made row-major.
    pub fn row(&self, row: usize) -> &'a [f32] {
        assert!(self.column_stride == 1 && row < self.rows);
        &self.data[row * self.row_stride..][..self.columns]
    }

    pub fn columns(&self) -> usize {
        self.columns
    }

    pub fn rows(&self) -> usize {
        self.rows
    }
}

/// A row-major matrix to write, apart from everything else that is written at the same time.
pub(crate) struct MatrixMut<'a> {
    data: *mut f32,
    rows: usize,
    columns: usize,
    row_stride: usize,
    owner: PhantomData<&'a mut [f32]>,
}

// SAFETY: a `MatrixMut` stands for the exclusive borrow of its elements, as `&mut [f32]` does.
unsafe impl Send for MatrixMut<'_> {}

impl<'a> MatrixMut<'a> {
    /// All of `data` as a row-major matrix.
    pub fn new(data: &'a mut [f32], rows: usize, columns: usize) -> MatrixMut<'a> {
        assert_eq!(data.len(), rows * columns);
        MatrixMut {
            data: data.as_mut_ptr(),
            rows,
            columns,
            row_stride: columns,
            owner: PhantomData,
        }
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The first `rows` rows and the others.
    pub fn split_rows(self, rows: usize) -> (MatrixMut<'a>, MatrixMut<'a>) {
        assert!(rows <= self.rows);
        (
            self.sub(0, rows, 0, self.columns),
            self.sub(rows, self.rows - rows, 0, self.columns),
        )
    }

    /// Cuts the matrix into tiles of `height` by `width`, row of tiles by row of tiles; those at the edges
    /// may be smaller.
    pub fn tiles(self, height: usize, width: usize) -> Vec<Tile<'a>> {
        let (height, width) = (height.max(1), width.max(1));
        let mut tiles =
            Vec::with_capacity(self.rows.div_ceil(height) * self.columns.div_ceil(width));
        for row in (0..self.rows).step_by(height) {
            for column in (0..self.columns).step_by(width) {
                let (height, width) = (
                    height.min(self.rows - row),
                    width.min(self.columns - column),
                );
                tiles.push(Tile {
                    row,
                    column,
                    matrix: self.sub(row, height, column, width),
                });
            }
        }
        tiles
    }

    /// A view of the first `rows` rows.
    pub fn rows_mut(&mut self, rows: usize) -> MatrixMut<'_> {
        assert!(rows <= self.rows);
        self.sub(0, rows, 0, self.columns)
    }

    pub fn row_mut(&mut self, row: usize) -> &mut [f32] {
        assert!(row < self.rows);
        // SAFETY: the row lies inside the borrow that this view stands for, and the view is borrowed mutably.
        unsafe {
            std::slice::from_raw_parts_mut(self.data.add(row * self.row_stride), self.columns)
        }
    }

    /// A part of this view. Private: the callers above consume the view and hand out disjoint parts.
    fn sub(&self, row: usize, rows: usize, column: usize, columns: usize) -> MatrixMut<'a> {
        debug_assert!(row + rows <= self.rows && column + columns <= self.columns);
        // A part without elements may start past the end, hence the wrapping pointer arithmetic.
        MatrixMut {
            data: self.data.wrapping_add(row * self.row_stride + column),
            rows,
            columns,
            ..*self
        }
    }
}

/// A part of a matrix and where in it the part begins.
pub(crate) struct Tile<'a> {
    pub row: usize,
    pub column: usize,
    pub matrix: MatrixMut<'a>,
}

impl Tile<'_> {
    pub fn rows(&self) -> Range<usize> {
        self.row..self.row + self.matrix.rows
    }

    pub fn columns(&self) -> Range<usize> {
        self.column..self.column + self.matrix.columns
    }
}

/// What becomes of the values that a product's target holds.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Write {
    Replace,
    Add,
}
