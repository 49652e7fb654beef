//! `cvt` between every pair of types.
//!
//! Widening is exact. Narrowing rounds the exact value once. Integers clamp where PTX clamps: always
//! from floats, with `.sat` from integers.

use super::float::{Clamp, Float, Mode, output};
use super::int::{Int, clamped};
use super::soft::{Exact, Format, Number, Rounding};

/// `.ftz` touches only single precision.
fn ftz<F: Float>(mode: Mode) -> bool {
    mode.ftz && F::FORMAT == Format::F32
}

/// `x`, flushed where `.ftz` applies to its type.
fn input<F: Float>(x: F, mode: Mode) -> F {
    if ftz::<F>(mode) { x.flushed() } else { x }
}

/// A float to another float type, `.sat` and `.relu` included.
#[inline]
pub fn float_to_float<S: Float, D: Float>(x: S, mode: Mode) -> D {
    let number = input(x, mode).number();
    output(
        D::rounded(number, mode.rounding),
        Mode {
            ftz: ftz::<D>(mode),
            ..mode
        },
    )
}

/// A float to an integral value of the same type (`cvt.rni.f32.f32` and its kin).
pub fn float_to_integral<F: Float>(x: F, mode: Mode) -> F {
    let integral = input(x, mode).number().to_integral(mode.rounding);
    output(
        F::rounded(integral, Rounding::Zero),
        Mode {
            ftz: ftz::<F>(mode),
            ..mode
        },
    )
}

/// A float to an integer: rounded, then clamped to its range. NaN gives zero, or the top bit alone
/// when either side has 64 bits.
pub fn float_to_int<F: Float, I: Int>(x: F, mode: Mode) -> I {
    match input(x, mode).number() {
        Number::Nan if F::FORMAT == Format::F64 || I::BITS == 64 => {
            I::truncated(1 << (I::BITS - 1))
        }
        Number::Nan => I::truncated(0),
        Number::Infinity { negative } => clamped(if negative { i128::MIN } else { i128::MAX }),
        // Beyond 2^100 every integer type is already at its limit.
        Number::Finite(x) if x.significand != 0 && x.exponent > 70 => {
            clamped(if x.negative { i128::MIN } else { i128::MAX })
        }
        Number::Finite(x) => {
            let magnitude = x.rounded_at(0, mode.rounding) as i128;
            clamped(if x.negative { -magnitude } else { magnitude })
        }
    }
}

/// An integer to a float.
pub fn int_to_float<I: Int, F: Float>(x: I, mode: Mode) -> F {
    let number = Number::Finite(Exact::from_integer(x.wide()));
    output(F::rounded(number, mode.rounding), mode)
}

/// An integer to another integer type: clamped with `.sat`, else truncated or extended.
#[inline(always)]
pub fn int_to_int<S: Int, D: Int>(x: S, saturate: bool) -> D {
    if saturate {
        clamped(x.wide())
    } else {
        D::truncated(x.wide())
    }
}

/// The modifiers of the conversions to narrow formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Narrowing {
    /// `.rn`, `.rna`, `.rz`
    pub rounding: Rounding,
    /// `.relu`: negative values become `+0`.
    pub relu: bool,
    /// `.satfinite`: what overflows becomes the largest finite value; NaN stays NaN.
    pub satfinite: bool,
}

/// `x` rounded to `format`.
#[inline]
fn narrow<F: Float>(x: F, format: Format, modifiers: Narrowing) -> u64 {
    let number = x.number();
    if number == Number::Nan {
        return format.nan;
    }
    if modifiers.relu && number.is_negative() {
        return 0;
    }
    let bits = format.pack(number, modifiers.rounding);
    let sign = bits & format.sign_bit();
    if modifiers.satfinite {
        sign | (bits ^ sign).min(format.max_finite())
    } else {
        bits
    }
}

/// `cvt.*.f16.f32`, `cvt.*.bf16.f32`, `cvt.*.f16x2.f32` (each half): with `.relu` and `.satfinite`.
#[inline]
pub fn f32_to_half<D: Float>(x: f32, modifiers: Narrowing) -> D {
    D::of_bits(narrow(x, D::FORMAT, modifiers))
}

/// `cvt.*.tf32.f32`: an f32 register whose lower 13 bits are zero; NaN is the canonical f32 NaN.
#[inline]
pub fn f32_to_tf32(x: f32, modifiers: Narrowing) -> u32 {
    if x.is_nan() {
        return Format::F32.nan as u32;
    }
    (narrow(x, Format::TF32, modifiers) << 13) as u32
}

/// `cvt.rn.satfinite.{e4m3x2,e5m2x2}.{f32,f16x2}`, one element.
#[inline]
pub fn to_f8<S: Float>(x: S, format: Format, relu: bool) -> u8 {
    narrow(
        x,
        format,
        Narrowing {
            rounding: Rounding::NearestEven,
            relu,
            satfinite: true,
        },
    ) as u8
}

/// `cvt.rn.f16x2.{e4m3x2,e5m2x2}`, one element: exact.
#[inline]
pub fn from_f8<D: Float>(bits: u8, format: Format, relu: bool) -> D {
    let clamp = if relu { Clamp::Relu } else { Clamp::None };
    let value = D::rounded(format.unpack(bits.into()), Rounding::NearestEven);
    output(value, Mode { clamp, ..Mode::RN })
}
