//! The fragment layouts against the ISA's formulas, the products against f64 and i64.

mod mma;
mod rows;
