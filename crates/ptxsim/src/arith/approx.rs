//! The `.approx` and `.full` functions.
//!
//! The ISA bounds their error and leaves the bits to the hardware. Here each is computed in f64 and
//! rounded to nearest, so it lies within half a unit in the last place of the true value and
//! within every bound that the ISA states: 1 ulp for `rcp`, 2 ulp for `div`, `rsqrt` and `ex2`,
//! `2^-22` absolute for `lg2`, `2^-20.5` for `sin` and `cos`, `2^-11` relative for `tanh`.

use super::float::{Clamp, Float, Mode, output};
use super::soft::{Number, Rounding};

/// `function` in f64 on a (flushed) input, rounded to `F`.
#[inline(always)]
fn rounded<F: Float + Into<f64>>(x: F, ftz: bool, function: impl Fn(f64) -> f64) -> F {
    let mode = Mode {
        rounding: Rounding::NearestEven,
        ftz,
        clamp: Clamp::None,
    };
    let x = if ftz { x.flushed() } else { x };
    output(
        F::rounded(function(x.into()).number(), Rounding::NearestEven),
        mode,
    )
}

/// `rcp.approx.f32`
pub fn rcp(x: f32, ftz: bool) -> f32 {
    rounded(x, ftz, f64::recip)
}

/// `sqrt.approx.f32`
pub fn sqrt(x: f32, ftz: bool) -> f32 {
    rounded(x, ftz, f64::sqrt)
}

/// `rsqrt.approx.f32`: minus zero gives minus infinity.
pub fn rsqrt(x: f32, ftz: bool) -> f32 {
    rounded(x, ftz, |x| x.sqrt().recip())
}

/// `ex2.approx`: two to the power of `x`
pub fn ex2<F: Float + Into<f64>>(x: F, ftz: bool) -> F {
    rounded(x, ftz, f64::exp2)
}

/// `lg2.approx.f32`
pub fn lg2(x: f32, ftz: bool) -> f32 {
    rounded(x, ftz, f64::log2)
}

/// `sin.approx.f32`, in radians
pub fn sin(x: f32, ftz: bool) -> f32 {
    rounded(x, ftz, f64::sin)
}

/// `cos.approx.f32`, in radians
pub fn cos(x: f32, ftz: bool) -> f32 {
    rounded(x, ftz, f64::cos)
}

/// `tanh.approx`
pub fn tanh<F: Float + Into<f64>>(x: F) -> F {
    rounded(x, false, f64::tanh)
}

/// `div.full.f32`
pub fn div_full(a: f32, b: f32, ftz: bool) -> f32 {
    let mode = Mode { ftz, ..Mode::RN };
    super::float::div(a, b, mode)
}

/// `div.approx.f32`: as `a * (1 / b)`, whose reciprocal underflows for `|b|` above 2^126: the result
/// is then zero, or NaN for an infinite `a`.
pub fn div_approx(a: f32, b: f32, ftz: bool) -> f32 {
    let huge = b.is_finite() && b.abs() > 2f32.powi(126);
    match (huge, a.is_infinite()) {
        (false, _) => div_full(a, b, ftz),
        (true, true) => f32::canonical_nan(),
        (true, false) if a.is_nan() => f32::canonical_nan(),
        (true, false) => f32::zero(a.is_sign_negative() != b.is_sign_negative()),
    }
}

/// `rcp.approx.ftz.f64`: the upper 32 bits of the reciprocal, the lower 32 are zero.
pub fn rcp_f64(x: f64) -> f64 {
    upper_half(x.flushed().recip())
}

/// `rsqrt.approx.f64`, `rsqrt.approx.ftz.f64`: the upper 32 bits, the lower 32 are zero.
pub fn rsqrt_f64(x: f64, ftz: bool) -> f64 {
    let x = if ftz { x.flushed() } else { x };
    upper_half(x.sqrt().recip())
}

fn upper_half(x: f64) -> f64 {
    if x.is_nan() {
        return f64::canonical_nan();
    }
    let upper = f64::of_bits(x.to_bits() & !0xffff_ffff);
    match upper.number() {
        Number::Finite(_) => upper.flushed(),
        _ => upper,
    }
}
