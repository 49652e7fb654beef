//! `mma.sync`: the fragment layouts of the ISA and the product itself.
//!
//! The layouts of all shapes with A by rows and B by columns follow one rule. With `group = lane / 4`,
//! `thread = lane % 4` and `e` elements in a register (one where an element takes 32 or 64 bits),
//! element `i` lies in register `r = i / e` and
//! - A holds row `group + 8 * (r % 2)`, column `thread * e + i % e + 4 * e * (r / 2)`
//!   (with 8 rows only: row `group`, column `thread * e + i % e + 4 * e * r`),
//! - B holds row `thread * e + i % e + 4 * e * r`, column `group`,
//! - C and D hold row `group + 8 * (i / 2)`, column `2 * thread + i % 2`.
//!
//! The order in which a tensor core adds is not specified. The model here: every product is exact
//! (it fits f32, save for bf16 products outside f32's range), the sum starts at C and adds the
//! products in the order of `k` in f32 round-to-nearest; an f16 result is rounded once at the end. f64
//! fuses each product into the sum; integers wrap, or clamp at the end with `.satfinite`.

use half::{bf16, f16};

use super::LaneRegister;
use crate::arith::convert::from_f8;
use crate::arith::{Format, int};

/// The element type of A or B.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Input {
    /// `.f16`
    F16,
    /// `.bf16`
    Bf16,
    /// `.tf32`: the lower 13 bits of the register are ignored.
    Tf32,
    /// `.e4m3`
    E4m3,
    /// `.e5m2`
    E5m2,
    /// `.f64`
    F64,
    /// `.s8`
    S8,
    /// `.u8`
    U8,
    /// `.s4`
    S4,
    /// `.u4`
    U4,
}

impl Input {
    /// Width of an element.
    pub const fn bits(self) -> usize {
        match self {
            Input::F64 => 64,
            Input::Tf32 => 32,
            Input::F16 | Input::Bf16 => 16,
            Input::E4m3 | Input::E5m2 | Input::S8 | Input::U8 => 8,
            Input::S4 | Input::U4 => 4,
        }
    }

    /// Elements in one 32-bit register.
    const fn per_register(self) -> usize {
        32 / self.bits()
    }
}

/// The element type of C or D.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Accumulator {
    /// `.f16`, two to a register
    F16,
    /// `.f32`
    F32,
    /// `.f64`, two registers each
    F64,
    /// `.s32`
    S32,
}

/// One `mma.sync` instruction: `D[m, n] = A[m, k] * B[k, n] + C[m, n]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Mma {
    /// Rows of A.
    pub m: usize,
    /// Columns of B.
    pub n: usize,
    /// Columns of A.
    pub k: usize,
    /// Type of A.
    pub a: Input,
    /// Type of B.
    pub b: Input,
    /// Type of C.
    pub c: Accumulator,
    /// Type of D.
    pub d: Accumulator,
    /// `.satfinite` on an integer sum
    pub satfinite: bool,
}

impl Mma {
    /// Whether the ISA has this combination (dense, `.row.col`).
    pub fn is_supported(&self) -> bool {
        use Accumulator as Acc;
        use Input::*;
        let shape = (self.m, self.n, self.k);
        let float_accumulators = |allowed: &[Acc]| {
            allowed.contains(&self.c) && allowed.contains(&self.d) && self.a == self.b
        };
        match (self.a, self.b) {
            (F16, F16) => {
                matches!(shape, (16, 8, 8 | 16)) && float_accumulators(&[Acc::F16, Acc::F32])
            }
            (Bf16, Bf16) => matches!(shape, (16, 8, 8 | 16)) && float_accumulators(&[Acc::F32]),
            (Tf32, Tf32) => matches!(shape, (16, 8, 4 | 8)) && float_accumulators(&[Acc::F32]),
            (E4m3 | E5m2, E4m3 | E5m2) => {
                matches!(shape, (16, 8, 16 | 32))
                    && self.c == self.d
                    && self.c != Acc::F64
                    && self.c != Acc::S32
            }
            (F64, F64) => {
                matches!(shape, (8, 8, 4) | (16, 8, 4 | 8 | 16)) && float_accumulators(&[Acc::F64])
            }
            (S8 | U8, S8 | U8) => {
                matches!(shape, (8, 8, 16) | (16, 8, 16 | 32))
                    && self.c == Acc::S32
                    && self.d == Acc::S32
            }
            (S4 | U4, S4 | U4) => {
                matches!(shape, (8, 8, 32) | (16, 8, 32 | 64))
                    && self.c == Acc::S32
                    && self.d == Acc::S32
            }
            _ => false,
        }
    }

    /// 32-bit registers that hold A in each lane (an f64 takes two).
    pub const fn a_registers(&self) -> usize {
        self.m * self.k * self.a.bits() / 32 / 32
    }

    /// 32-bit registers that hold B in each lane.
    pub const fn b_registers(&self) -> usize {
        self.k * self.n * self.b.bits() / 32 / 32
    }

    /// Elements of C or D in each lane.
    pub const fn accumulator_elements(&self) -> usize {
        self.m * self.n / 32
    }

    /// Multiply-adds, for counting.
    pub const fn multiply_adds(&self) -> usize {
        self.m * self.n * self.k
    }

    /// Row and column of element `i` of A in `lane`.
    #[inline(always)]
    pub const fn a_position(&self, lane: usize, i: usize) -> (usize, usize) {
        let (group, thread) = (lane / 4, lane % 4);
        let e = if self.a.bits() >= 32 {
            1
        } else {
            self.a.per_register()
        };
        let r = i / e;
        let column = thread * e + i % e;
        if self.m == 8 {
            (group, column + 4 * e * r)
        } else {
            (group + 8 * (r % 2), column + 4 * e * (r / 2))
        }
    }

    /// Row and column of element `i` of B in `lane`.
    #[inline(always)]
    pub const fn b_position(&self, lane: usize, i: usize) -> (usize, usize) {
        let e = if self.b.bits() >= 32 {
            1
        } else {
            self.b.per_register()
        };
        (lane % 4 * e + i % e + 4 * e * (i / e), lane / 4)
    }

    /// Row and column of element `i` of C or D in `lane`.
    #[inline(always)]
    pub const fn accumulator_position(lane: usize, i: usize) -> (usize, usize) {
        (lane / 4 + 8 * (i / 2), 2 * (lane % 4) + i % 2)
    }
}

/// Rows of A at most.
const M: usize = 16;
/// Columns of B.
const N: usize = 8;

/// A matrix put together from the `count` elements of every lane.
#[inline(always)]
fn gather<T: Copy + Default, const ROWS: usize, const COLUMNS: usize>(
    count: usize,
    position: impl Fn(usize, usize) -> (usize, usize),
    element: impl Fn(usize, usize) -> T,
) -> [[T; COLUMNS]; ROWS] {
    let mut matrix = [[T::default(); COLUMNS]; ROWS];
    for i in 0..count {
        for lane in 0..32 {
            let (row, column) = position(lane, i);
            matrix[row][column] = element(lane, i);
        }
    }
    matrix
}

/// [`gather`] for the inputs that multiply in f32: exact for all of them.
#[inline(always)]
fn gather_floats<const ROWS: usize, const COLUMNS: usize>(
    registers: &[LaneRegister],
    input: Input,
    count: usize,
    position: impl Fn(usize, usize) -> (usize, usize),
) -> [[f32; COLUMNS]; ROWS] {
    let half = |lane: usize, i: usize| (registers[i / 2][lane] >> (16 * (i % 2))) as u16;
    let byte = |lane: usize, i: usize| registers[i / 4][lane].to_le_bytes()[i % 4];
    match input {
        Input::F16 => gather(count, position, |l, i| f16::from_bits(half(l, i)).to_f32()),
        Input::Bf16 => gather(count, position, |l, i| bf16::from_bits(half(l, i)).to_f32()),
        Input::Tf32 => gather(count, position, |l, i| {
            f32::from_bits(registers[i][l] & !0x1fff)
        }),
        Input::E4m3 => gather(count, position, |l, i| {
            from_f8(byte(l, i), Format::E4M3, false)
        }),
        Input::E5m2 => gather(count, position, |l, i| {
            from_f8(byte(l, i), Format::E5M2, false)
        }),
        Input::F64 | Input::S8 | Input::U8 | Input::S4 | Input::U4 => {
            unreachable!("not a float of at most 32 bits")
        }
    }
}

/// The product of 16-bit or 8-bit floats or tf32: a register of `c` and `d` holds one f32 or two f16.
pub fn multiply_float(
    mma: &Mma,
    a: &[LaneRegister],
    b: &[LaneRegister],
    c: &[LaneRegister],
    d: &mut [LaneRegister],
) {
    let a: [[f32; 32]; M] =
        gather_floats(a, mma.a, mma.m * mma.k / 32, |l, i| mma.a_position(l, i));
    let b: [[f32; N]; 32] =
        gather_floats(b, mma.b, mma.k * mma.n / 32, |l, i| mma.b_position(l, i));
    let half = |lane: usize, i: usize| (c[i / 2][lane] >> (16 * (i % 2))) as u16;
    let elements = mma.accumulator_elements();
    let mut sums: [[f32; N]; M] = match mma.c {
        Accumulator::F16 => gather(elements, Mma::accumulator_position, |l, i| {
            f16::from_bits(half(l, i)).to_f32()
        }),
        _ => gather(elements, Mma::accumulator_position, |l, i| {
            f32::from_bits(c[i][l])
        }),
    };
    for (sums, a_row) in sums.iter_mut().zip(&a) {
        for (a, b_row) in a_row[..mma.k].iter().zip(&b) {
            for (sum, b) in sums.iter_mut().zip(b_row) {
                *sum += a * b;
            }
        }
    }
    let sum = |lane: usize, i: usize| {
        let (row, column) = Mma::accumulator_position(lane, i);
        sums[row][column]
    };
    for (register, d) in d.iter_mut().enumerate() {
        for (lane, d) in d.iter_mut().enumerate() {
            *d = match mma.d {
                Accumulator::F16 => {
                    let [low, high] = [0, 1].map(|i| canonical_f16(sum(lane, 2 * register + i)));
                    u32::from(low) | u32::from(high) << 16
                }
                _ => canonical_f32(sum(lane, register)),
            };
        }
    }
}

/// The bits of `x`, with PTX's canonical NaN.
#[inline(always)]
fn canonical_f32(x: f32) -> u32 {
    if x.is_nan() {
        Format::F32.nan as u32
    } else {
        x.to_bits()
    }
}

/// The bits of `x` rounded to f16, with PTX's canonical NaN.
#[inline(always)]
fn canonical_f16(x: f32) -> u16 {
    if x.is_nan() {
        Format::F16.nan as u16
    } else {
        f16::from_f32(x).to_bits()
    }
}

/// The product of 8-bit or 4-bit integers, summed in s32.
pub fn multiply_int(
    mma: &Mma,
    a: &[LaneRegister],
    b: &[LaneRegister],
    c: &[LaneRegister],
    d: &mut [LaneRegister],
) {
    let element = |registers: &[LaneRegister], input: Input, lane: usize, i: usize| -> i32 {
        let e = input.per_register();
        let word = registers[i / e][lane] >> (i % e * input.bits());
        match input {
            Input::S8 => (word as i8).into(),
            Input::U8 => (word as u8).into(),
            Input::S4 => (word as i32) << 28 >> 28,
            _ => (word & 0xf) as i32,
        }
    };
    let a: [[i32; 64]; M] = gather(
        mma.m * mma.k / 32,
        |l, i| mma.a_position(l, i),
        |l, i| element(a, mma.a, l, i),
    );
    let b: [[i32; N]; 64] = gather(
        mma.k * mma.n / 32,
        |l, i| mma.b_position(l, i),
        |l, i| element(b, mma.b, l, i),
    );
    for (i, (c, d)) in c.iter().zip(d).enumerate() {
        for (lane, (c, d)) in c.iter().zip(d).enumerate() {
            let (row, column) = Mma::accumulator_position(lane, i);
            let products = (0..mma.k).map(|k| i64::from(a[row][k] * b[k][column]));
            let sum = i64::from(*c as i32) + products.sum::<i64>();
            *d = if mma.satfinite {
                int::clamped::<i32>(sum.into())
            } else {
                sum as i32
            } as u32;
        }
    }
}

/// The product in f64: one 64-bit register per element.
pub fn multiply_f64(
    mma: &Mma,
    a: &[[u64; 32]],
    b: &[[u64; 32]],
    c: &[[u64; 32]],
    d: &mut [[u64; 32]],
) {
    let a: [[f64; 16]; M] = gather(
        mma.m * mma.k / 32,
        |l, i| mma.a_position(l, i),
        |l, i| f64::from_bits(a[i][l]),
    );
    let b: [[f64; N]; 16] = gather(
        mma.k * mma.n / 32,
        |l, i| mma.b_position(l, i),
        |l, i| f64::from_bits(b[i][l]),
    );
    for (i, (c, d)) in c.iter().zip(d).enumerate() {
        for (lane, (c, d)) in c.iter().zip(d).enumerate() {
            let (row, column) = Mma::accumulator_position(lane, i);
            let sum = (0..mma.k).fold(f64::from_bits(*c), |sum, k| {
                a[row][k].mul_add(b[k][column], sum)
            });
            *d = sum.to_bits();
        }
    }
}
