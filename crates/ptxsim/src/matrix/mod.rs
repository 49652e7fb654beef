//! The matrix instructions as pure functions over lane registers: which lane holds which element,
//! and what the tensor core computes.

pub mod mma;
pub mod rows;
pub mod swizzle;
pub mod tensor_map;
pub mod wgmma;

/// One 32-bit register of all 32 lanes.
pub type LaneRegister = [u32; 32];
