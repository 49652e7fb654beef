//! The fragment layouts against the ISA's formulas and CUTLASS's layouts, the products against f64
//! and i64, the boxes of tensor maps against their definition.

mod mma;
mod rows;
mod tensor_map;
mod wgmma;
