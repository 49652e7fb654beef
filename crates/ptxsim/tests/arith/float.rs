//! Rounded arithmetic. The host computes f32 and f64 round-to-nearest; for the other roundings an
//! exact sum in i128 fixed point must be bracketed by the result and its neighbour.

use half::{bf16, f16};
use proptest::prelude::*;
use ptxsim::arith::Rounding;
use ptxsim::arith::approx;
use ptxsim::arith::compare::{Comparison, Property, compare, compare_float, test};
use ptxsim::arith::float::*;
use ptxsim::arith::soft::Number;

const DIRECTED: [Rounding; 3] = [Rounding::Zero, Rounding::Down, Rounding::Up];

fn mode(rounding: Rounding) -> Mode {
    Mode {
        rounding,
        ..Mode::RN
    }
}

/// Equal bits, or both NaN.
fn same<F: Float>(a: F, b: F) -> bool {
    a.bits() == b.bits() || (a.is_nan() && b.is_nan())
}

/// Any bit pattern, with exponents close enough to meet in half of the cases.
fn any_f32() -> impl Strategy<Value = f32> {
    prop_oneof![
        any::<u32>().prop_map(f32::from_bits),
        (any::<u32>(), 120u32..136).prop_map(|(bits, exponent)| {
            f32::from_bits((bits & 0x807f_ffff) | (exponent << 23))
        }),
        (any::<u32>(), 0u32..3)
            .prop_map(|(bits, exponent)| f32::from_bits((bits & 0x807f_ffff) | (exponent << 23))),
    ]
}

fn any_f64() -> impl Strategy<Value = f64> {
    prop_oneof![
        any::<u64>().prop_map(f64::from_bits),
        (any::<u64>(), 1000u64..1060).prop_map(|(bits, exponent)| {
            f64::from_bits((bits & 0x800f_ffff_ffff_ffff) | (exponent << 52))
        }),
    ]
}

/// Fixed point with 100 fraction bits, exact for what the directed tests produce.
fn fixed<F: Float>(x: F) -> i128 {
    let Number::Finite(x) = x.number() else {
        panic!("not finite")
    };
    let shift = x.exponent + 100;
    let magnitude = if shift >= 0 {
        (x.significand << shift) as i128
    } else {
        assert!(x.significand.trailing_zeros() as i32 >= -shift);
        (x.significand >> -shift) as i128
    };
    if x.negative { -magnitude } else { magnitude }
}

/// `result` is `exact` rounded in this direction: on the right side, and its neighbour is not.
fn check_directed<F: Float + Copy>(
    exact: i128,
    result: F,
    rounding: Rounding,
) -> Result<(), TestCaseError> {
    let value = fixed(result);
    if exact == 0 {
        prop_assert_eq!(value, 0);
        return Ok(());
    }
    let away_from_exact = F::of_bits(result.bits() + 1);
    let ulp = (fixed(away_from_exact) - value).abs();
    let error = value - exact;
    prop_assert!(error.abs() < ulp || error == 0, "{error} of {ulp}");
    match rounding {
        Rounding::Zero => prop_assert!(value.abs() <= exact.abs()),
        Rounding::Down => prop_assert!(error <= 0),
        Rounding::Up => prop_assert!(error >= 0),
        _ => prop_assert!(2 * error.abs() <= ulp),
    }
    Ok(())
}

/// A value of `digits` significant bits at most, with a power of two near one.
fn small<F: Float + std::fmt::Debug>(digits: u32) -> impl Strategy<Value = F> {
    (1u64..1 << digits, -6i32..6, any::<bool>()).prop_map(move |(significand, shift, negative)| {
        let exact = ptxsim::arith::soft::Exact {
            negative,
            significand: significand.into(),
            exponent: shift - digits as i32,
        };
        F::rounded(Number::Finite(exact), Rounding::Zero)
    })
}

macro_rules! directed_rounding {
    ($name:ident, $type:ty, $digits:expr) => {
        proptest! {
            #[test]
            fn $name(
                a in small::<$type>($digits),
                b in small::<$type>($digits),
                c in small::<$type>($digits),
            ) {
                for rounding in DIRECTED {
                    let mode = mode(rounding);
                    check_directed(fixed(a) + fixed(b), add(a, b, mode), rounding)?;
                    check_directed(fixed(a) - fixed(b), sub(a, b, mode), rounding)?;
                    // A product of fixed-point values has 200 fraction bits; drop the zeros first.
                    let product = (fixed(a) >> 50) * (fixed(b) >> 50);
                    check_directed(product, mul(a, b, mode), rounding)?;
                    check_directed(product + fixed(c), fma(a, b, c, mode), rounding)?;
                }
            }
        }
    };
}

directed_rounding!(f32_rounds_in_the_direction_asked, f32, 24);
directed_rounding!(f16_rounds_in_the_direction_asked, f16, 11);
directed_rounding!(bf16_rounds_in_the_direction_asked, bf16, 8);

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn soft_f32_is_the_hosts(a in any_f32(), b in any_f32(), c in any_f32()) {
        let soft = |number| f32::rounded(number, Rounding::NearestEven);
        let rn = Rounding::NearestEven;
        prop_assert!(same(soft(a.number().plus(b.number(), rn)), a + b));
        prop_assert!(same(soft(a.number().times(b.number())), a * b));
        let product = a.number().times(b.number());
        prop_assert!(same(soft(product.plus(c.number(), rn)), a.mul_add(b, c)));
        prop_assert!(same(soft(a.number().divided_by(b.number())), a / b));
        prop_assert!(same(soft(a.number().sqrt()), a.sqrt()));
    }

    #[test]
    fn soft_f64_is_the_hosts(a in any_f64(), b in any_f64(), c in any_f64()) {
        let soft = |number| f64::rounded(number, Rounding::NearestEven);
        let rn = Rounding::NearestEven;
        prop_assert!(same(soft(a.number().plus(b.number(), rn)), a + b));
        prop_assert!(same(soft(a.number().times(b.number())), a * b));
        let product = a.number().times(b.number());
        prop_assert!(same(soft(product.plus(c.number(), rn)), a.mul_add(b, c)));
        prop_assert!(same(soft(a.number().divided_by(b.number())), a / b));
        prop_assert!(same(soft(a.number().sqrt()), a.sqrt()));
    }

    /// A quotient and a root in another direction: `q * b` against `a`, `r * r` against `a`.
    #[test]
    fn directed_quotients_and_roots(a in small::<f32>(24), b in small::<f32>(24)) {
        let [zero, down, up] = DIRECTED.map(|r| div(a, b, mode(r)));
        prop_assert!(f64::from(down) * f64::from(b) <= f64::from(a) || b < 0.0);
        prop_assert!(f64::from(up) * f64::from(b) >= f64::from(a) || b < 0.0);
        prop_assert!(down == up || down.next_up() == up);
        prop_assert_eq!(zero, if down > 0.0 { down } else { up });
        let a = a.abs();
        let [zero, down, up] = DIRECTED.map(|r| sqrt(a, mode(r)));
        prop_assert!(f64::from(down) * f64::from(down) <= f64::from(a));
        prop_assert!(f64::from(up) * f64::from(up) >= f64::from(a));
        prop_assert!(down == up || down.next_up() == up);
        prop_assert_eq!(zero, down);
        prop_assert_eq!(rcp(b, mode(Rounding::Up)), div(1.0, b, mode(Rounding::Up)));
    }

    /// `half` adds and multiplies through f32, which is wide enough to round innocuously.
    #[test]
    fn half_arithmetic_is_the_half_crates(a: u16, b: u16) {
        let (x, y) = (f16::from_bits(a), f16::from_bits(b));
        prop_assert!(same(add(x, y, Mode::RN), x + y));
        prop_assert!(same(sub(x, y, Mode::RN), x - y));
        prop_assert!(same(mul(x, y, Mode::RN), x * y));
        let (x, y) = (bf16::from_bits(a), bf16::from_bits(b));
        prop_assert!(same(add(x, y, Mode::RN), x + y));
        prop_assert!(same(mul(x, y, Mode::RN), x * y));
    }

    #[test]
    fn flush_to_zero_is_flushing_by_hand(a in any_f32(), b in any_f32(), c in any_f32()) {
        let flush = |x: f32| if x.is_subnormal() { 0f32.copysign(x) } else { x };
        let ftz = Mode { ftz: true, ..Mode::RN };
        let (fa, fb, fc) = (flush(a), flush(b), flush(c));
        prop_assert!(same(add(a, b, ftz), flush(fa + fb)));
        prop_assert!(same(mul(a, b, ftz), flush(fa * fb)));
        prop_assert!(same(fma(a, b, c, ftz), flush(fa.mul_add(fb, fc))));
        prop_assert!(same(div(a, b, ftz), flush(fa / fb)));
    }

    #[test]
    fn comparisons_are_the_hosts(a in any_f32(), b in any_f32()) {
        let unordered = a.is_nan() || b.is_nan();
        for (comparison, ordered) in [
            (Comparison::Eq, a == b),
            (Comparison::Lt, a < b),
            (Comparison::Le, a <= b),
            (Comparison::Gt, a > b),
            (Comparison::Ge, a >= b),
            (Comparison::Ne, a != b && !unordered),
            (Comparison::Num, !unordered),
        ] {
            prop_assert_eq!(compare_float(a, b, comparison, false), ordered);
        }
        for (comparison, ordered) in [
            (Comparison::Equ, a == b),
            (Comparison::Ltu, a < b),
            (Comparison::Leu, a <= b),
            (Comparison::Gtu, a > b),
            (Comparison::Geu, a >= b),
            (Comparison::Neu, a != b),
            (Comparison::Nan, false),
        ] {
            prop_assert_eq!(compare_float(a, b, comparison, false), ordered || unordered);
        }
    }

    #[test]
    fn classes_are_the_hosts(x in any_f32()) {
        for (property, holds) in [
            (Property::Finite, x.is_finite()),
            (Property::Infinite, x.is_infinite()),
            (Property::Number, !x.is_nan()),
            (Property::NotANumber, x.is_nan()),
            (Property::Normal, x.is_normal()),
            (Property::Subnormal, x.is_subnormal()),
        ] {
            prop_assert_eq!(test(x, property), holds);
        }
    }

    /// Half a unit in the last place of f64 evaluation is within all of the ISA's bounds; a wrong
    /// function is not. The identities are independent of how it is computed.
    #[test]
    fn approximate_functions_satisfy_their_identities(x in -20f32..20.0, y in 1e-3f32..1e3) {
        let close = |a: f32, b: f32| (a - b).abs() <= 4e-6 * b.abs().max(1.0);
        prop_assert!(close(approx::sin(x, false).powi(2) + approx::cos(x, false).powi(2), 1.0));
        prop_assert!(close(approx::sin(x, false), x.sin()));
        prop_assert!(close(approx::ex2(approx::lg2(y, false), false) / y, 1.0));
        prop_assert!(close(approx::ex2(x, false) * approx::ex2(-x, false), 1.0));
        prop_assert!(close(approx::rsqrt(y, false).powi(2) * y, 1.0));
        prop_assert!(close(approx::sqrt(y, false).powi(2) / y, 1.0));
        prop_assert!(close(approx::rcp(y, false) * y, 1.0));
        let e = approx::ex2(2.0 * x * std::f32::consts::LOG2_E, false);
        prop_assert!(close(approx::tanh(x), 1.0 - 2.0 / (e + 1.0)));
        prop_assert!((approx::rcp_f64(y.into()) * f64::from(y) - 1.0).abs() < 2f64.powi(-20));
        prop_assert!((approx::rsqrt_f64(y.into(), true).powi(2) * f64::from(y) - 1.0).abs() < 2f64.powi(-19));
    }
}

#[test]
fn saturation_clamps_to_the_unit_interval() {
    let saturate = Mode {
        clamp: Clamp::Saturate,
        ..Mode::RN
    };
    for (sum, expected) in [
        (-2.0, 0.0f32),
        (-0.0, 0.0),
        (0.25, 0.25),
        (1.0, 1.0),
        (7.0, 1.0),
        (f32::NAN, 0.0),
    ] {
        let clamped = add(sum, -0.0, saturate);
        assert_eq!(clamped.to_bits(), expected.to_bits(), "{sum}");
        let half = add(f16::from_f32(sum), f16::NEG_ZERO, saturate);
        assert_eq!(half.to_bits(), f16::from_f32(expected).to_bits(), "{sum}");
    }
}

#[test]
fn relu_keeps_nan_and_drops_the_negative() {
    let relu = Mode {
        clamp: Clamp::Relu,
        ..Mode::RN
    };
    let one = bf16::from_f32(1.0);
    let of = |x: f32| fma(bf16::from_f32(x), one, bf16::NEG_ZERO, relu).to_bits();
    assert_eq!(of(-3.0), 0);
    assert_eq!(of(-0.0), 0);
    assert_eq!(of(3.0), bf16::from_f32(3.0).to_bits());
    assert_eq!(of(f32::NAN), 0x7fff);
}

#[test]
fn nan_results_are_canonical() {
    let nan = f32::from_bits(0xffc0_1234);
    assert_eq!(add(nan, 1.0, Mode::RN).to_bits(), 0x7fff_ffff);
    assert_eq!(mul(f32::INFINITY, 0.0, Mode::RN).to_bits(), 0x7fff_ffff);
    assert_eq!(
        add(f32::INFINITY, f32::NEG_INFINITY, mode(Rounding::Up)).to_bits(),
        0x7fff_ffff
    );
    assert_eq!(mul(f16::INFINITY, f16::ZERO, Mode::RN).to_bits(), 0x7fff);
    assert_eq!(min(nan, nan, Extremum::default()).to_bits(), 0x7fff_ffff);
}

#[test]
fn exact_zeros_take_the_sign_of_the_rounding() {
    for rounding in DIRECTED {
        let expected = if rounding == Rounding::Down {
            -0.0f32
        } else {
            0.0
        };
        assert_eq!(
            sub(1.5f32, 1.5, mode(rounding)).to_bits(),
            expected.to_bits()
        );
        assert_eq!(
            fma(2.0f32, 3.0, -6.0, mode(rounding)).to_bits(),
            expected.to_bits()
        );
        assert_eq!(
            add(-0.0f32, -0.0, mode(rounding)).to_bits(),
            (-0.0f32).to_bits()
        );
    }
}

#[test]
fn overflow_goes_where_the_rounding_points() {
    for (rounding, positive, negative) in [
        (Rounding::Zero, f32::MAX, f32::MIN),
        (Rounding::Down, f32::MAX, f32::NEG_INFINITY),
        (Rounding::Up, f32::INFINITY, f32::MIN),
        (Rounding::NearestEven, f32::INFINITY, f32::NEG_INFINITY),
    ] {
        assert_eq!(mul(f32::MAX, 2.0, mode(rounding)), positive);
        assert_eq!(mul(f32::MAX, -2.0, mode(rounding)), negative);
    }
}

#[test]
fn min_and_max_follow_the_isa() {
    let plain = Extremum::default();
    let propagate = Extremum { nan: true, ..plain };
    let nan = f32::NAN;
    assert_eq!(min(-0.0f32, 0.0, plain).to_bits(), (-0.0f32).to_bits());
    assert_eq!(min(0.0f32, -0.0, plain).to_bits(), (-0.0f32).to_bits());
    assert_eq!(max(-0.0f32, 0.0, plain).to_bits(), 0);
    assert_eq!((min(nan, 2.0, plain), max(3.0, nan, plain)), (2.0, 3.0));
    assert!(min(nan, 2.0, propagate).is_nan() && max(3.0, nan, propagate).is_nan());
    assert_eq!(
        (min(-1.0f32, 2.0, plain), max(-1.0f32, 2.0, plain)),
        (-1.0, 2.0)
    );
    assert_eq!(
        (min(-1.0f32, -2.0, plain), max(-1.0f32, -2.0, plain)),
        (-2.0, -1.0)
    );
    let xorsign = Extremum {
        xorsign_abs: true,
        ..plain
    };
    assert_eq!(max(-3.0f32, 2.0, xorsign), -3.0);
    assert_eq!(max(-3.0f32, -5.0, xorsign), 5.0);
    assert_eq!(min(3.0f32, -2.0, xorsign), -2.0);
    let tiny = f32::from_bits(1);
    assert_eq!(max(tiny, 0.0, Extremum { ftz: true, ..plain }).to_bits(), 0);
}

#[test]
fn approximate_functions_at_their_edges() {
    assert_eq!(approx::rsqrt(-0.0, false), f32::NEG_INFINITY);
    assert!(approx::rsqrt(-1.0, false).is_nan());
    assert_eq!(approx::lg2(0.0, false), f32::NEG_INFINITY);
    assert_eq!(approx::lg2(f32::from_bits(1), true), f32::NEG_INFINITY);
    assert_eq!(approx::lg2(f32::from_bits(1), false), -149.0);
    assert_eq!(approx::ex2(f32::NEG_INFINITY, false), 0.0);
    assert_eq!(approx::ex2(-127.0f32, true), 0.0);
    assert_eq!(approx::ex2(-127.0f32, false), 2f32.powi(-127));
    assert!(approx::sin(f32::INFINITY, false).is_nan());
    assert_eq!(approx::rcp(-0.0, false), f32::NEG_INFINITY);
    assert_eq!(approx::div_approx(3.0, 2f32.powi(127), false), 0.0);
    assert!(approx::div_approx(f32::INFINITY, 2f32.powi(127), false).is_nan());
    assert_eq!(
        approx::div_full(3.0, 2f32.powi(127), false),
        3.0 / 2f32.powi(127)
    );
}

#[test]
fn integer_comparisons_are_plain() {
    assert!(compare(-1i32, 1, Comparison::Lt) && !compare(-1i32 as u32, 1, Comparison::Lt));
    assert!(compare(3u64, 3, Comparison::Ge) && compare(3u64, 4, Comparison::Ne));
}

#[test]
fn signs_move_without_rounding() {
    assert_eq!(copysign(-1.0f32, 3.0), -3.0);
    assert_eq!(neg(f16::from_f32(2.0)), f16::from_f32(-2.0));
    assert_eq!(abs(-2.5f64), 2.5);
}
