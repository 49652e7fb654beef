//! How tensor copies and `wgmma` spread 16-byte chunks over the banks of shared memory.

/// A swizzle mode: within rows of so many bytes, chunks are exchanged by exclusive or with the row
/// number. It acts on absolute shared-memory addresses, so the pattern repeats every eight 128-byte lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Swizzle {
    /// Addresses as they are.
    #[default]
    None,
    /// 32-byte rows: address bit 4 ^= bit 7.
    Bytes32,
    /// 64-byte rows: bits 4 to 5 ^= bits 7 to 8.
    Bytes64,
    /// 128-byte rows: bits 4 to 6 ^= bits 7 to 9.
    Bytes128,
}

impl Swizzle {
    /// Bytes in a row of the pattern; 16 without swizzle.
    pub const fn row_bytes(self) -> u32 {
        match self {
            Swizzle::None => 16,
            Swizzle::Bytes32 => 32,
            Swizzle::Bytes64 => 64,
            Swizzle::Bytes128 => 128,
        }
    }

    /// Where the byte that an unswizzled layout puts at `address` really lies.
    #[inline(always)]
    pub const fn apply(self, address: u32) -> u32 {
        let chunks = self.row_bytes() / 16 - 1;
        address ^ (((address >> 7) & chunks) << 4)
    }
}
