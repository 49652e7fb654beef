//! `ldmatrix`, `stmatrix` and `movmatrix`: 8 x 8 matrices of 16-bit elements, one shared-memory row
//! of 16 bytes per lane address.
//!
//! Lane `t` holds elements `(t / 4, 2 * (t % 4))` and its right neighbour; transposed, the element
//! `(r, c)` of memory is held as `(c, r)`.

use super::LaneRegister;

/// A matrix as its eight rows in shared memory.
pub type Rows = [[u8; 16]; 8];

/// `ldmatrix`, one matrix: the register that each lane receives.
#[inline]
pub fn load(rows: &Rows, transposed: bool) -> LaneRegister {
    std::array::from_fn(|lane| {
        let element = |i: usize| {
            let (row, column) = position(lane, i, transposed);
            u32::from(u16::from_le_bytes([
                rows[row][2 * column],
                rows[row][2 * column + 1],
            ]))
        };
        element(0) | element(1) << 16
    })
}

/// `stmatrix`, one matrix: the rows that the lanes' registers form.
#[inline]
pub fn store(register: &LaneRegister, transposed: bool) -> Rows {
    let mut rows = [[0; 16]; 8];
    for (lane, word) in register.iter().enumerate() {
        for i in 0..2 {
            let (row, column) = position(lane, i, transposed);
            let bytes = ((word >> (16 * i)) as u16).to_le_bytes();
            rows[row][2 * column..][..2].copy_from_slice(&bytes);
        }
    }
    rows
}

/// `movmatrix.sync.aligned.m8n8.trans.b16`: the transpose across lanes.
#[inline]
pub fn transpose(register: &LaneRegister) -> LaneRegister {
    load(&store(register, false), true)
}

/// Row and column in memory of element `i` (0 or 1) of `lane`.
#[inline(always)]
fn position(lane: usize, i: usize, transposed: bool) -> (usize, usize) {
    let (row, column) = (lane / 4, 2 * (lane % 4) + i);
    if transposed {
        (column, row)
    } else {
        (row, column)
    }
}
