//! `add`, `sub`, `mul`, `fma`, `div`, `rcp`, `sqrt`, `min`, `max`, `neg`, `abs`, `copysign` on
//! `.f16`, `.bf16`, `.f32` and `.f64`.
//!
//! Round-to-nearest on f32 and f64 is the host's own IEEE arithmetic; every other case goes
//! through [`soft`](super::soft), exact and rounded once.

use half::{bf16, f16};

use super::soft::{Exact, Format, Number, Rounding};

/// What happens to a result after rounding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Clamp {
    /// Nothing.
    None,
    /// `.sat`: clamped to `[0, 1]`, NaN becomes `+0`.
    Saturate,
    /// `.relu`: negative results become `+0`, NaN becomes the canonical NaN.
    Relu,
}

/// The modifiers of a floating-point instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Mode {
    /// `.rn`, `.rz`, `.rm`, `.rp`.
    pub rounding: Rounding,
    /// `.ftz`: subnormal inputs and results become zeros of the same sign.
    pub ftz: bool,
    /// `.sat`, `.relu`.
    pub clamp: Clamp,
}

impl Mode {
    /// `.rn` and nothing else: PTX's default.
    pub const RN: Mode = Mode {
        rounding: Rounding::NearestEven,
        ftz: false,
        clamp: Clamp::None,
    };
}

/// A floating-point register type.
pub trait Float: Copy {
    /// Its encoding.
    const FORMAT: Format;
    /// Its bits, in the low end.
    fn bits(self) -> u64;
    /// From its bits, in the low end.
    fn of_bits(bits: u64) -> Self;

    /// The host's correctly rounded `.rn` sum, where the host has this type.
    #[inline(always)]
    fn native_add(self, _other: Self) -> Option<Self> {
        None
    }
    /// As [`native_add`](Float::native_add), the product.
    #[inline(always)]
    fn native_mul(self, _other: Self) -> Option<Self> {
        None
    }
    /// As [`native_add`](Float::native_add), `self * b + c` rounded once.
    #[inline(always)]
    fn native_fma(self, _b: Self, _c: Self) -> Option<Self> {
        None
    }
    /// As [`native_add`](Float::native_add), the quotient.
    #[inline(always)]
    fn native_div(self, _other: Self) -> Option<Self> {
        None
    }
    /// As [`native_add`](Float::native_add), the square root.
    #[inline(always)]
    fn native_sqrt(self) -> Option<Self> {
        None
    }

    /// The exact value.
    fn number(self) -> Number {
        Self::FORMAT.unpack(self.bits())
    }
    /// `number` rounded to this type.
    fn rounded(number: Number, rounding: Rounding) -> Self {
        Self::of_bits(Self::FORMAT.pack(number, rounding))
    }
    /// The canonical NaN.
    #[inline(always)]
    fn canonical_nan() -> Self {
        Self::of_bits(Self::FORMAT.nan)
    }
    /// Whether this is a NaN.
    #[inline(always)]
    fn is_nan(self) -> bool {
        self.magnitude() > Self::FORMAT.infinity()
    }
    /// Whether the sign bit is set.
    #[inline(always)]
    fn is_negative(self) -> bool {
        self.bits() & Self::FORMAT.sign_bit() != 0
    }
    /// The bits without the sign.
    #[inline(always)]
    fn magnitude(self) -> u64 {
        self.bits() & (Self::FORMAT.sign_bit() - 1)
    }
    /// A zero of this sign.
    #[inline(always)]
    fn zero(negative: bool) -> Self {
        Self::of_bits(if negative { Self::FORMAT.sign_bit() } else { 0 })
    }
    /// A subnormal becomes a zero of the same sign.
    #[inline(always)]
    fn flushed(self) -> Self {
        let lowest_normal = 1 << Self::FORMAT.fraction_bits;
        if self.magnitude() < lowest_normal {
            Self::zero(self.is_negative())
        } else {
            self
        }
    }
}

macro_rules! native_float {
    ($type:ty, $bits:ty, $format:expr) => {
        impl Float for $type {
            const FORMAT: Format = $format;
            #[inline(always)]
            fn bits(self) -> u64 {
                self.to_bits().into()
            }
            #[inline(always)]
            fn of_bits(bits: u64) -> Self {
                <$type>::from_bits(bits as $bits)
            }
            #[inline(always)]
            fn native_add(self, other: Self) -> Option<Self> {
                Some(self + other)
            }
            #[inline(always)]
            fn native_mul(self, other: Self) -> Option<Self> {
                Some(self * other)
            }
            #[inline(always)]
            fn native_fma(self, b: Self, c: Self) -> Option<Self> {
                Some(self.mul_add(b, c))
            }
            #[inline(always)]
            fn native_div(self, other: Self) -> Option<Self> {
                Some(self / other)
            }
            #[inline(always)]
            fn native_sqrt(self) -> Option<Self> {
                Some(self.sqrt())
            }
            #[inline(always)]
            fn is_nan(self) -> bool {
                <$type>::is_nan(self)
            }
        }
    };
}

native_float!(f32, u32, Format::F32);
native_float!(f64, u64, Format::F64);

macro_rules! soft_float {
    ($type:ty, $format:expr) => {
        impl Float for $type {
            const FORMAT: Format = $format;
            #[inline(always)]
            fn bits(self) -> u64 {
                self.to_bits().into()
            }
            #[inline(always)]
            fn of_bits(bits: u64) -> Self {
                <$type>::from_bits(bits as u16)
            }
        }
    };
}

soft_float!(f16, Format::F16);
soft_float!(bf16, Format::BF16);

/// `.ftz` on an input.
#[inline(always)]
fn input<F: Float>(x: F, mode: Mode) -> F {
    if mode.ftz { x.flushed() } else { x }
}

/// Canonical NaN, `.ftz`, `.sat` and `.relu` on a rounded result.
#[inline(always)]
pub(super) fn output<F: Float>(x: F, mode: Mode) -> F {
    let x = if mode.ftz { x.flushed() } else { x };
    match mode.clamp {
        Clamp::None if x.is_nan() => F::canonical_nan(),
        Clamp::None => x,
        Clamp::Saturate => saturated(x),
        Clamp::Relu if x.is_nan() => F::canonical_nan(),
        Clamp::Relu if x.is_negative() => F::zero(false),
        Clamp::Relu => x,
    }
}

/// Clamped to `[0, 1]`; NaN becomes `+0`.
fn saturated<F: Float>(x: F) -> F {
    let bias = (1u64 << (F::FORMAT.exponent_bits - 1)) - 1;
    let one = bias << F::FORMAT.fraction_bits;
    if x.is_nan() || x.is_negative() {
        F::zero(false)
    } else {
        F::of_bits(x.magnitude().min(one))
    }
}

/// The host's result if it has one for this rounding, else the exact one rounded.
#[inline(always)]
fn resolve<F: Float>(native: Option<F>, mode: Mode, exact: impl FnOnce() -> Number) -> F {
    let rounded = match native {
        Some(value) if mode.rounding == Rounding::NearestEven => value,
        _ => F::rounded(exact(), mode.rounding),
    };
    output(rounded, mode)
}

/// `add`
#[inline(always)]
pub fn add<F: Float>(a: F, b: F, mode: Mode) -> F {
    let (a, b) = (input(a, mode), input(b, mode));
    resolve(a.native_add(b), mode, || {
        a.number().plus(b.number(), mode.rounding)
    })
}

/// `sub`
#[inline(always)]
pub fn sub<F: Float>(a: F, b: F, mode: Mode) -> F {
    add(a, neg(b), mode)
}

/// `mul`
#[inline(always)]
pub fn mul<F: Float>(a: F, b: F, mode: Mode) -> F {
    let (a, b) = (input(a, mode), input(b, mode));
    resolve(a.native_mul(b), mode, || a.number().times(b.number()))
}

/// `fma` (and `mad`, which is the same on every target with f32 fused multiply-add)
#[inline(always)]
pub fn fma<F: Float>(a: F, b: F, c: F, mode: Mode) -> F {
    let (a, b, c) = (input(a, mode), input(b, mode), input(c, mode));
    let exact = || a.number().times(b.number()).plus(c.number(), mode.rounding);
    resolve(a.native_fma(b, c), mode, exact)
}

/// `div` with an IEEE rounding
#[inline(always)]
pub fn div<F: Float>(a: F, b: F, mode: Mode) -> F {
    let (a, b) = (input(a, mode), input(b, mode));
    resolve(a.native_div(b), mode, || a.number().divided_by(b.number()))
}

/// `rcp` with an IEEE rounding
#[inline(always)]
pub fn rcp<F: Float>(a: F, mode: Mode) -> F {
    div(
        F::rounded(Number::Finite(Exact::from_integer(1)), mode.rounding),
        a,
        mode,
    )
}

/// `sqrt` with an IEEE rounding
#[inline(always)]
pub fn sqrt<F: Float>(a: F, mode: Mode) -> F {
    let a = input(a, mode);
    resolve(a.native_sqrt(), mode, || a.number().sqrt())
}

/// `neg`: flips the sign, of a NaN too.
#[inline(always)]
pub fn neg<F: Float>(a: F) -> F {
    F::of_bits(a.bits() ^ F::FORMAT.sign_bit())
}

/// `abs`: clears the sign, of a NaN too.
#[inline(always)]
pub fn abs<F: Float>(a: F) -> F {
    F::of_bits(a.magnitude())
}

/// `neg.ftz`, `abs.ftz`: the input flushed.
#[inline(always)]
pub fn flush<F: Float>(a: F) -> F {
    a.flushed()
}

/// `copysign d, a, b`: the sign of `a` on the magnitude of `b`.
#[inline(always)]
pub fn copysign<F: Float>(a: F, b: F) -> F {
    F::of_bits((a.bits() & F::FORMAT.sign_bit()) | b.magnitude())
}

/// The modifiers of `min` and `max`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Extremum {
    /// `.ftz`
    pub ftz: bool,
    /// `.NaN`: any NaN input gives NaN; without it the other input wins.
    pub nan: bool,
    /// `.xorsign.abs`: compare magnitudes; the result's sign is the exclusive or of the signs.
    pub xorsign_abs: bool,
}

/// `min`; `-0` is below `+0`.
#[inline(always)]
pub fn min<F: Float>(a: F, b: F, modifiers: Extremum) -> F {
    extremum(a, b, modifiers, |a, b| a < b)
}

/// `max`; `-0` is below `+0`.
#[inline(always)]
pub fn max<F: Float>(a: F, b: F, modifiers: Extremum) -> F {
    extremum(a, b, modifiers, |a, b| a > b)
}

#[inline(always)]
fn extremum<F: Float>(
    a: F,
    b: F,
    modifiers: Extremum,
    prefer_first: impl Fn(i64, i64) -> bool,
) -> F {
    let (a, b) = if modifiers.ftz {
        (a.flushed(), b.flushed())
    } else {
        (a, b)
    };
    let sign = modifiers.xorsign_abs && (a.is_negative() != b.is_negative());
    let (a, b) = if modifiers.xorsign_abs {
        (abs(a), abs(b))
    } else {
        (a, b)
    };
    let chosen = match (a.is_nan(), b.is_nan()) {
        (true, true) => return F::canonical_nan(),
        (true, false) | (false, true) if modifiers.nan => return F::canonical_nan(),
        (true, false) => b,
        (false, true) => a,
        (false, false) if prefer_first(order(a), order(b)) => a,
        (false, false) => b,
    };
    if sign { neg(chosen) } else { chosen }
}

/// A key that sorts numbers as PTX's `min` does: `-0` just below `+0`.
#[inline(always)]
fn order<F: Float>(x: F) -> i64 {
    if x.is_negative() {
        !(x.magnitude() as i64)
    } else {
        x.magnitude() as i64
    }
}
