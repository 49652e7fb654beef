//! Tensor maps: the 128-byte objects behind `cp.async.bulk.tensor`, and the addresses of a box.
//!
//! The hardware's encoding is opaque, so a map is encoded here in a layout of our own; what
//! `cuTensorMapEncodeTiled` accepts and refuses, and where every byte of a box goes, is as documented.

use super::swizzle::Swizzle;

/// The most dimensions a tensor has.
pub const MAX_RANK: usize = 5;

/// Marks our own encoding.
const MAGIC: [u8; 8] = *b"ptxsimTM";

/// A tiled tensor in global memory and the box that one copy moves. Dimension 0 is contiguous.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorMap {
    /// Bytes of an element.
    pub element_bytes: u32,
    /// Number of dimensions, 1 to 5.
    pub rank: usize,
    /// Device address of element 0.
    pub address: u64,
    /// Elements along each dimension.
    pub dims: [u64; MAX_RANK],
    /// Bytes between neighbours along each dimension; `strides[0]` is `element_bytes`.
    pub strides: [u64; MAX_RANK],
    /// Extent of the box along each dimension, in elements of the tensor.
    pub box_dims: [u32; MAX_RANK],
    /// Every so manyth element is taken along each dimension (1 along dimension 0).
    pub element_strides: [u32; MAX_RANK],
    /// The arrangement in shared memory.
    pub swizzle: Swizzle,
    /// What elements outside of the tensor read as: NaN (of this type's width) instead of zero.
    pub nan_fill: bool,
}

/// A tensor map that the driver refuses, or bytes that are not a tensor map.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("invalid tensor map: {0}")]
pub struct TensorMapError(pub String);

/// A run of bytes of a box, at most one 16-byte chunk of shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Where in shared memory.
    pub shared: u32,
    /// Where in global memory; `None` outside of the tensor.
    pub global: Option<u64>,
    /// How many bytes.
    pub bytes: u32,
}

impl TensorMap {
    /// Checks the limits that `cuTensorMapEncodeTiled` documents (interleave none).
    pub fn validate(&self) -> Result<(), TensorMapError> {
        let check = |holds: bool, message: String| match holds {
            true => Ok(()),
            false => Err(TensorMapError(message)),
        };
        check(
            (1..=MAX_RANK).contains(&self.rank),
            format!("rank {} is not 1 to 5", self.rank),
        )?;
        check(
            matches!(self.element_bytes, 1 | 2 | 4 | 8),
            format!("elements of {} bytes", self.element_bytes),
        )?;
        check(
            self.address.is_multiple_of(16),
            format!("global address {:#x} is not a multiple of 16", self.address),
        )?;
        for d in 0..self.rank {
            let (dim, stride) = (self.dims[d], self.strides[d]);
            let (extent, step) = (self.box_dims[d], self.element_strides[d]);
            check(
                (1..=1 << 32).contains(&dim),
                format!("dimension {d} has {dim} elements"),
            )?;
            check(
                (1..=256).contains(&extent),
                format!("the box has {extent} along dimension {d}"),
            )?;
            check(
                (1..=8).contains(&step),
                format!("element stride {step} along dimension {d}"),
            )?;
            check(
                d == 0 || (stride.is_multiple_of(16) && stride < 1 << 40),
                format!("stride {stride} of dimension {d} is not a multiple of 16 below 2^40"),
            )?;
        }
        let row = self.box_dims[0] * self.element_bytes;
        check(
            row.is_multiple_of(16),
            format!("box rows of {row} bytes are no multiple of 16"),
        )?;
        check(
            self.swizzle == Swizzle::None || row <= self.swizzle.row_bytes(),
            format!(
                "box rows of {row} bytes exceed the swizzle's {}",
                self.swizzle.row_bytes()
            ),
        )
    }

    /// The map as 128 bytes.
    pub fn encode(&self) -> [u8; 128] {
        let mut bytes = [0; 128];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..16].copy_from_slice(&self.address.to_le_bytes());
        bytes[16] = self.element_bytes as u8;
        bytes[17] = self.rank as u8;
        bytes[18] = self.swizzle as u8;
        bytes[19] = self.nan_fill.into();
        for d in 0..MAX_RANK {
            bytes[20 + d] = self.element_strides[d] as u8;
            bytes[25 + 2 * d..][..2].copy_from_slice(&(self.box_dims[d] as u16).to_le_bytes());
            bytes[40 + 8 * d..][..8].copy_from_slice(&self.dims[d].to_le_bytes());
            bytes[80 + 8 * d..][..8].copy_from_slice(&self.strides[d].to_le_bytes());
        }
        bytes
    }

    /// The map that [`encode`](TensorMap::encode) wrote.
    pub fn decode(bytes: &[u8; 128]) -> Result<TensorMap, TensorMapError> {
        if bytes[..8] != MAGIC {
            return Err(TensorMapError(
                "these 128 bytes were not encoded by the driver".into(),
            ));
        }
        let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        let map = TensorMap {
            element_bytes: bytes[16].into(),
            rank: bytes[17].into(),
            address: word(8),
            dims: std::array::from_fn(|d| word(40 + 8 * d)),
            strides: std::array::from_fn(|d| word(80 + 8 * d)),
            box_dims: std::array::from_fn(|d| {
                u16::from_le_bytes([bytes[25 + 2 * d], bytes[26 + 2 * d]]).into()
            }),
            element_strides: std::array::from_fn(|d| bytes[20 + d].into()),
            swizzle: match bytes[18] {
                0 => Swizzle::None,
                1 => Swizzle::Bytes32,
                2 => Swizzle::Bytes64,
                _ => Swizzle::Bytes128,
            },
            nan_fill: bytes[19] != 0,
        };
        map.validate()?;
        Ok(map)
    }

    /// Elements that the box takes along dimension `d`.
    fn taken(&self, d: usize) -> u32 {
        match d {
            0 => self.box_dims[0],
            _ => self.box_dims[d].div_ceil(self.element_strides[d]),
        }
    }

    /// Bytes that a whole box occupies in shared memory, which is what a copy signals to its
    /// mbarrier, filled or not.
    pub fn box_bytes(&self) -> u32 {
        (0..self.rank).map(|d| self.taken(d)).product::<u32>() * self.element_bytes
    }

    /// Every byte of the box whose lowest corner is at `corner`, laid out from `shared` on.
    pub fn pieces(&self, corner: [i32; MAX_RANK], shared: u32) -> Vec<Piece> {
        let row_bytes = self.box_dims[0] * self.element_bytes;
        let rows: u32 = (1..self.rank).map(|d| self.taken(d)).product();
        let mut pieces = Vec::with_capacity((rows * row_bytes / 16) as usize);
        for row in 0..rows {
            let start = self.row_start(corner, row);
            for chunk in (0..row_bytes).step_by(16) {
                let first = i64::from(corner[0]) + i64::from(chunk / self.element_bytes);
                let to = self.swizzle.apply(shared + row * row_bytes + chunk);
                self.split_chunk(start, first, to, &mut pieces);
            }
        }
        pieces
    }

    /// Global address of element 0 of the `row`-th row of the box; `None` outside of the tensor.
    fn row_start(&self, corner: [i32; MAX_RANK], row: u32) -> Option<u64> {
        let mut rest = row;
        let mut address = self.address;
        for (d, start) in corner.into_iter().enumerate().take(self.rank).skip(1) {
            let step = rest % self.taken(d) * self.element_strides[d];
            rest /= self.taken(d);
            let at = u64::try_from(i64::from(start) + i64::from(step)).ok()?;
            if at >= self.dims[d] {
                return None;
            }
            address += at * self.strides[d];
        }
        Some(address)
    }

    /// The 16 bytes at `to`, which begin with element `first` of a row: parted where the tensor ends.
    fn split_chunk(&self, start: Option<u64>, first: i64, to: u32, pieces: &mut Vec<Piece>) {
        let size = i64::from(self.element_bytes);
        let elements = 16 / size;
        let (low, high) = match start {
            Some(_) => {
                let end = self.dims[0] as i64;
                (
                    (-first).clamp(0, elements),
                    (end - first).clamp(0, elements),
                )
            }
            None => (elements, elements),
        };
        for (from, until, inside) in [(0, low, false), (low, high, true), (high, elements, false)] {
            if from < until {
                let element = first + from;
                let global = start
                    .filter(|_| inside)
                    .map(|start| start + (element * size) as u64);
                let shared = to + (from * size) as u32;
                pieces.push(Piece {
                    shared,
                    global,
                    bytes: ((until - from) * size) as u32,
                });
            }
        }
    }

    /// The bytes that fill an element outside of the tensor, repeated over a chunk.
    pub fn fill(&self) -> [u8; 16] {
        match (self.nan_fill, self.element_bytes) {
            (false, _) => [0; 16],
            // All ones but the sign, in every floating-point width.
            (true, size) => std::array::from_fn(|i| {
                if (i as u32 + 1).is_multiple_of(size) {
                    0x7f
                } else {
                    0xff
                }
            }),
        }
    }
}
