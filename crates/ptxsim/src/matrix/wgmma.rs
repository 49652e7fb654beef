//! `wgmma.mma_async`: shared-memory matrix descriptors, fragments over the four warps of a
//! warpgroup, and the product.

use std::ops::Range;

use half::{bf16, f16};

use super::LaneRegister;
use super::mma::{Accumulator, Input, Mma};
use super::swizzle::Swizzle;
use crate::arith::Format;
use crate::arith::convert::from_f8;

/// Warps in a warpgroup; each holds 16 of the 64 rows.
pub const WARPS: usize = 4;

/// Rows of A and D.
pub const M: usize = 64;

/// One `wgmma.mma_async`: `D[64, n] = A[64, k] * B[k, n] (+ D)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Wgmma {
    /// Columns of B: a multiple of 8 up to 256.
    pub n: usize,
    /// Type of A.
    pub a: Input,
    /// Type of B.
    pub b: Input,
    /// Type of D.
    pub d: Accumulator,
    /// `imm-scale-a` is -1.
    pub negate_a: bool,
    /// `imm-scale-b` is -1.
    pub negate_b: bool,
}

impl Wgmma {
    /// Columns of A: 32 bytes' worth.
    pub const fn k(&self) -> usize {
        256 / self.a.bits()
    }

    /// Whether the ISA has this combination of types and shape (floating point, dense).
    pub fn is_supported(&self) -> bool {
        use Input::{Bf16, E4m3, E5m2, F16, Tf32};
        let types = match (self.a, self.b) {
            (F16, F16) | (E4m3 | E5m2, E4m3 | E5m2) => {
                matches!(self.d, Accumulator::F16 | Accumulator::F32)
            }
            (Bf16, Bf16) | (Tf32, Tf32) => self.d == Accumulator::F32,
            _ => false,
        };
        types && self.n.is_multiple_of(8) && (8..=256).contains(&self.n)
    }

    /// Registers of D in each lane.
    pub const fn d_registers(&self) -> usize {
        match self.d {
            Accumulator::F16 => self.n / 4,
            _ => self.n / 2,
        }
    }

    /// Multiply-adds, for counting.
    pub const fn multiply_adds(&self) -> usize {
        M * self.n * self.k()
    }

    /// Row and column of element `i` of D in `lane` of warp `warp` (modulo 4) of the warpgroup.
    #[inline(always)]
    pub const fn d_position(warp: usize, lane: usize, i: usize) -> (usize, usize) {
        (
            16 * warp + lane / 4 + 8 * (i / 2 % 2),
            8 * (i / 4) + 2 * (lane % 4) + i % 2,
        )
    }

    /// A's 16 rows of one warp, `[16, k]` row by row, from the warp's four registers.
    pub fn a_from_registers(&self, registers: &[LaneRegister]) -> Vec<f32> {
        let k = self.k();
        let (a, b, c, d) = (self.a, self.b, self.d, self.d);
        let tile = Mma {
            m: 16,
            n: 8,
            k,
            a,
            b,
            c,
            d,
            satfinite: false,
        };
        let mut matrix = vec![0.0; 16 * k];
        let bytes = self.a.bits() / 8;
        for i in 0..16 / bytes {
            for (lane, word) in registers[i * bytes / 4].iter().enumerate() {
                let (row, column) = tile.a_position(lane, i);
                matrix[row * k + column] = value(self.a, word >> (8 * (i * bytes % 4)));
            }
        }
        matrix
    }

    /// The 16-byte chunks of some rows of A `[64, k]` or of B as `[n, k]`: the shared address of
    /// each, and row and column of its first element.
    pub fn chunks(
        &self,
        operand: Operand,
        rows: Range<usize>,
        descriptor: Descriptor,
        transposed: bool,
    ) -> impl Iterator<Item = (u32, usize, usize)> + use<> {
        let bytes = self.input(operand).bits() / 8;
        let per_chunk = 16 / bytes;
        let columns = 0..self.k();
        let (outer, inner) = if transposed {
            (columns, rows)
        } else {
            (rows, columns)
        };
        outer.flat_map(move |o| {
            inner
                .clone()
                .step_by(per_chunk)
                .map(move |i| match transposed {
                    true => (descriptor.mn_major_address(i * bytes, o), i, o),
                    false => (descriptor.k_major_address(o, i * bytes), o, i),
                })
        })
    }

    /// Some rows of A or of B as `[n, k]`, row by row, from shared memory: `read` gives the 16
    /// bytes at a shared address.
    pub fn from_shared<E>(
        &self,
        operand: Operand,
        rows: Range<usize>,
        descriptor: Descriptor,
        transposed: bool,
        mut read: impl FnMut(u32) -> Result<[u8; 16], E>,
    ) -> Result<Vec<f32>, E> {
        let (k, input, first) = (self.k(), self.input(operand), rows.start);
        let mut matrix = vec![0.0; rows.len() * k];
        for (address, row, column) in self.chunks(operand, rows, descriptor, transposed) {
            let chunk = read(address)?;
            for (j, element) in chunk.chunks_exact(input.bits() / 8).enumerate() {
                let word = element
                    .iter()
                    .rev()
                    .fold(0, |word, byte| word << 8 | u32::from(*byte));
                let (row, column) = if transposed {
                    (row + j, column)
                } else {
                    (row, column + j)
                };
                matrix[(row - first) * k + column] = value(input, word);
            }
        }
        Ok(matrix)
    }

    fn input(&self, operand: Operand) -> Input {
        match operand {
            Operand::A => self.a,
            Operand::B => self.b,
        }
    }

    /// One warp's part of the product, under the same model as [`mma`](super::mma): exact products added in
    /// the order of `k` in f32, starting from `d` where `accumulate` (`scale-d`), else from zero.
    /// `a` is the warp's `[16, k]`, `b` is `[n, k]`, `d` its accumulator registers.
    pub fn multiply(&self, a: &[f32], b: &[f32], accumulate: bool, d: &mut [LaneRegister]) {
        let k = self.k();
        let sign = if self.negate_a != self.negate_b {
            -1.0
        } else {
            1.0
        };
        // B by rows of k, so that the inner loop runs over neighbours.
        let mut columns = vec![0.0; k * self.n];
        for (n, row) in b.chunks_exact(k).enumerate() {
            for (k, x) in row.iter().enumerate() {
                columns[k * self.n + n] = sign * x;
            }
        }
        let mut sums = vec![0.0f32; 16 * self.n];
        if accumulate {
            self.each_element(|lane, i, at| sums[at] = self.element(d, lane, i));
        }
        for (a, sums) in a.chunks_exact(k).zip(sums.chunks_exact_mut(self.n)) {
            for (a, b) in a.iter().zip(columns.chunks_exact(self.n)) {
                for (sum, b) in sums.iter_mut().zip(b) {
                    *sum += a * b;
                }
            }
        }
        self.each_element(|lane, i, at| {
            let sum = sums[at];
            match self.d {
                Accumulator::F16 => {
                    let bits = match sum.is_nan() {
                        true => Format::F16.nan as u32,
                        false => f16::from_f32(sum).to_bits().into(),
                    };
                    let shift = 16 * (i % 2);
                    let word = &mut d[i / 2][lane];
                    *word = (*word & !(0xffff << shift)) | bits << shift;
                }
                _ => {
                    let nan = Format::F32.nan as u32;
                    d[i][lane] = if sum.is_nan() { nan } else { sum.to_bits() };
                }
            }
        });
    }

    /// Every element of a warp's part of D: its lane, its number there, its place in `[16, n]`.
    fn each_element(&self, mut visit: impl FnMut(usize, usize, usize)) {
        for i in 0..self.n / 2 {
            for lane in 0..32 {
                let (row, column) = Wgmma::d_position(0, lane, i);
                visit(lane, i, row * self.n + column);
            }
        }
    }

    fn element(&self, d: &[LaneRegister], lane: usize, i: usize) -> f32 {
        match self.d {
            Accumulator::F16 => f16::from_bits((d[i / 2][lane] >> (16 * (i % 2))) as u16).to_f32(),
            _ => f32::from_bits(d[i][lane]),
        }
    }
}

/// The value of an element in the low bits of `word`.
#[inline(always)]
fn value(input: Input, word: u32) -> f32 {
    match input {
        Input::F16 => f16::from_bits(word as u16).to_f32(),
        Input::Bf16 => bf16::from_bits(word as u16).to_f32(),
        Input::Tf32 => f32::from_bits(word & !0x1fff),
        Input::E4m3 => from_f8(word as u8, Format::E4M3, false),
        Input::E5m2 => from_f8(word as u8, Format::E5M2, false),
        Input::F64 | Input::S8 | Input::U8 | Input::S4 | Input::U4 => {
            unreachable!("not a floating-point input of wgmma")
        }
    }
}

/// Which matrix a descriptor describes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operand {
    /// `[64, k]`
    A,
    /// `[k, n]`, handled as `[n, k]`
    B,
}

/// A matrix descriptor: where an operand lies in shared memory.
///
/// The matrix consists of *core matrices* of eight 16-byte rows. With a swizzle of `w` bytes, `w / 16`
/// of them stand side by side and their rows are interleaved, `w` bytes apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// Shared address of the first element.
    pub start: u32,
    /// Leading-dimension byte offset.
    pub leading: u32,
    /// Stride-dimension byte offset.
    pub stride: u32,
    /// Phase of the swizzle pattern where the matrix does not begin on its period.
    pub base_offset: u32,
    /// The swizzle.
    pub swizzle: Swizzle,
}

impl Descriptor {
    /// The fields of the 64-bit descriptor: bits 0 to 13 start, 16 to 29 leading, 32 to 45 stride (all in
    /// units of 16 bytes), 49 to 51 base offset, 62 to 63 swizzle (0 none, 1 of 128 bytes, 2 of 64, 3
    /// of 32).
    pub const fn decode(bits: u64) -> Descriptor {
        Descriptor {
            start: ((bits & 0x3fff) << 4) as u32,
            leading: ((bits >> 16 & 0x3fff) << 4) as u32,
            stride: ((bits >> 32 & 0x3fff) << 4) as u32,
            base_offset: (bits >> 49 & 7) as u32,
            swizzle: match bits >> 62 {
                0 => Swizzle::None,
                1 => Swizzle::Bytes128,
                2 => Swizzle::Bytes64,
                _ => Swizzle::Bytes32,
            },
        }
    }

    /// K-major (not transposed): the address of the 16 bytes from byte `k_byte` (0 or 16) of row `row`.
    /// Groups of eight rows are `stride` apart; without swizzle the second half of k is
    /// `leading` away, with swizzle it follows at once.
    pub const fn k_major_address(&self, row: usize, k_byte: usize) -> u32 {
        let (row, chunk) = (row as u32, k_byte as u32 / 16);
        let within = row % 8 * self.swizzle.row_bytes();
        let along = match self.swizzle {
            Swizzle::None => chunk * self.leading,
            _ => chunk * 16,
        };
        self.at(within + row / 8 * self.stride + along)
    }

    /// MN-major (transposed): the address of the 16 bytes from byte `mn_byte` of row `k`. A swizzle
    /// row of M or N is contiguous, the next one is `leading` away and the next eight k are
    /// `stride` away; without swizzle the two change places.
    pub const fn mn_major_address(&self, mn_byte: usize, k: usize) -> u32 {
        let (mn_byte, k) = (mn_byte as u32, k as u32);
        let width = self.swizzle.row_bytes();
        let (block, group) = match self.swizzle {
            Swizzle::None => (self.stride, self.leading),
            _ => (self.leading, self.stride),
        };
        self.at(mn_byte % width + mn_byte / width * block + k % 8 * width + k / 8 * group)
    }

    const fn at(&self, offset: u32) -> u32 {
        let address = self.start + offset;
        // The swizzle's phase counts 128-byte lines from the start of the pattern.
        let phase = self.base_offset << 7;
        self.swizzle
            .apply(address.wrapping_sub(phase))
            .wrapping_add(phase)
    }
}
