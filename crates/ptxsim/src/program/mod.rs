//! A kernel as the engine runs it: decoded once, to a dense list of instructions.

/// One kernel parameter's place in the argument buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Param {
    /// Offset in bytes.
    pub offset: u32,
    /// Size in bytes.
    pub size: u32,
    /// Alignment in bytes.
    pub align: u32,
}
