//! Fetching into the cache what is packed next, while the processor multiplies.

use super::Matrix;

/// Elements of a cache line.
const LINE: usize = 64 / size_of::<f32>();

/// The cache lines of some matrices, still to be fetched.
///
/// A frozen weight is read from memory once per pass over the model. Packing it waits for every line; asked for
/// a block of products earlier, they are there.
pub(super) struct Prefetch<'a> {
    matrices: Vec<Matrix<'a>>,
    /// The next line, in the last of the matrices: of which stretch of consecutive elements, and where in it.
    stretch: usize,
    offset: usize,
}

impl<'a> Prefetch<'a> {
    /// Nothing to fetch.
    pub fn none() -> Prefetch<'a> {
        Prefetch::new(Vec::new())
    }

    pub fn new(matrices: Vec<Matrix<'a>>) -> Prefetch<'a> {
        Prefetch {
            matrices,
            stretch: 0,
            offset: 0,
        }
    }

    /// How many lines there are.
    pub fn lines(&self) -> usize {
        let lines = |matrix: &Matrix| {
            let Stretches { count, len, .. } = Stretches::of(matrix);
            count * len.div_ceil(LINE)
        };
        self.matrices.iter().map(lines).sum()
    }

    /// Asks for the next `lines` lines, or those that are left.
    #[inline(always)]
    pub fn fetch(&mut self, lines: usize) {
        for _ in 0..lines {
            let Some(matrix) = self.matrices.last() else {
                return;
            };
            let Stretches { count, len, stride } = Stretches::of(matrix);
            if let Some(element) = matrix.data.get(self.stretch * stride + self.offset) {
                fetch(element);
            }
            self.offset += LINE;
            if self.offset >= len {
                self.offset = 0;
                self.stretch += 1;
            }
            if self.stretch >= count {
                self.stretch = 0;
                self.matrices.pop();
            }
        }
    }
}

/// A matrix as memory has it: stretches of consecutive elements.
struct Stretches {
    count: usize,
    len: usize,
    stride: usize,
}

impl Stretches {
    #[inline(always)]
    fn of(matrix: &Matrix) -> Stretches {
        let (count, len, stride) = if matrix.column_stride == 1 {
            (matrix.rows, matrix.columns, matrix.row_stride)
        } else {
            (matrix.columns, matrix.rows, matrix.column_stride)
        };
        Stretches { count, len, stride }
    }
}

#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn fetch(element: &f32) {
    use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
    // SAFETY: a prefetch reads nothing that the program sees, and SSE is part of x86-64.
    unsafe { _mm_prefetch::<_MM_HINT_T1>(std::ptr::from_ref(element).cast()) };
}

#[cfg(not(target_arch = "x86_64"))]
#[inline(always)]
fn fetch(_: &f32) {}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every line of both matrices is asked for once, whatever the portions.
    #[test]
    fn ends_after_its_lines() {
        let data = vec![0.0; 7 * 40];
        let rows = Matrix::new(&data, 7, 40).column_block(3..35);
        let columns = Matrix::new(&data, 7, 40).transposed();
        for portion in [1, 4, 100] {
            let mut prefetch = Prefetch::new(vec![rows, columns, rows.block(0..0, 0..0)]);
            assert_eq!(prefetch.lines(), 7 * 2 + 7 * 3);
            let mut portions = 0;
            while !prefetch.matrices.is_empty() {
                prefetch.fetch(portion);
                portions += 1;
            }
            // The empty matrix takes a turn without a line.
            assert_eq!(portions, (7 * 2 + 7 * 3 + 1usize).div_ceil(portion));
        }
    }
}
