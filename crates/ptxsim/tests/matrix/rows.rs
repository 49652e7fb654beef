//! `ldmatrix`, `stmatrix`, `movmatrix` on matrices whose elements name their place.

use proptest::prelude::*;
use ptxsim::matrix::rows::{Rows, load, store, transpose};

/// Element `(r, c)` is `8 r + c`.
fn numbered() -> Rows {
    std::array::from_fn(|r| {
        std::array::from_fn(|i| if i % 2 == 0 { (8 * r + i / 2) as u8 } else { 0 })
    })
}

#[test]
fn lanes_hold_what_the_isa_draws() {
    // The ISA's figure: row 0 is in lanes 0 to 3, row 7 in lanes 28 to 31.
    let lanes = load(&numbered(), false);
    assert_eq!(lanes[0], 0x0001_0000);
    assert_eq!(lanes[3], 0x0007_0006);
    assert_eq!(lanes[4], 0x0009_0008);
    assert_eq!(lanes[31], 0x003f_003e);
    // Transposed: lane 0 holds (0, 0) and (1, 0), lane 1 (2, 0) and (3, 0), lane 4 (0, 1) and (1, 1).
    let lanes = load(&numbered(), true);
    assert_eq!(lanes[0], 0x0008_0000);
    assert_eq!(lanes[1], 0x0018_0010);
    assert_eq!(lanes[4], 0x0009_0001);
    assert_eq!(lanes[31], 0x003f_0037);
}

proptest! {
    #[test]
    fn stores_invert_loads(rows: [[u8; 16]; 8]) {
        for transposed in [false, true] {
            prop_assert_eq!(store(&load(&rows, transposed), transposed), rows);
        }
        prop_assert_eq!(transpose(&load(&rows, false)), load(&rows, true));
    }
}
