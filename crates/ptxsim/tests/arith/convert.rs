//! Conversions against the host's casts, the `half` crate, and searches over all narrow values.

use half::{bf16, f16};
use proptest::prelude::*;
use ptxsim::arith::convert::*;
use ptxsim::arith::float::{Clamp, Float, Mode};
use ptxsim::arith::{Format, Rounding};

fn mode(rounding: Rounding) -> Mode {
    Mode {
        rounding,
        ..Mode::RN
    }
}

const PLAIN: Narrowing = Narrowing {
    rounding: Rounding::NearestEven,
    relu: false,
    satfinite: false,
};

fn same<F: Float>(a: F, b: F) -> bool {
    a.bits() == b.bits() || (a.is_nan() && b.is_nan())
}

#[test]
fn every_half_widens_exactly() {
    for bits in 0..=u16::MAX {
        let x = f16::from_bits(bits);
        assert!(same(float_to_float::<f16, f32>(x, Mode::RN), x.to_f32()));
        assert!(same(float_to_float::<f16, f64>(x, Mode::RN), x.to_f64()));
        let x = bf16::from_bits(bits);
        assert!(same(float_to_float::<bf16, f32>(x, Mode::RN), x.to_f32()));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn narrowing_is_the_half_crates(bits: u32, wide: u64) {
        let x = f32::from_bits(bits);
        prop_assert!(same(float_to_float::<f32, f16>(x, Mode::RN), f16::from_f32(x)));
        prop_assert!(same(float_to_float::<f32, bf16>(x, Mode::RN), bf16::from_f32(x)));
        prop_assert!(same(f32_to_half::<f16>(x, PLAIN), f16::from_f32(x)));
        let x = f64::from_bits(wide);
        prop_assert!(same(float_to_float::<f64, f32>(x, Mode::RN), x as f32));
        let x = f64::from(f32::from_bits(bits)) * 1.000_000_01;
        prop_assert!(same(float_to_float::<f64, f32>(x, Mode::RN), x as f32));
        let down: f32 = float_to_float(x, mode(Rounding::Down));
        let up: f32 = float_to_float(x, mode(Rounding::Up));
        prop_assert!(x.is_nan() || (f64::from(down) <= x && x <= f64::from(up)));
        prop_assert!(x.is_nan() || down == up || down.next_up() == up);
    }

    /// Rust's `as` truncates and saturates; only the NaN rule differs where 64 bits are involved.
    #[test]
    fn floats_to_integers(bits: u32, wide: u64, near in -3e10f64..3e10) {
        let rz = mode(Rounding::Zero);
        for x in [f32::from_bits(bits), near as f32, (near / 1e8) as f32] {
            prop_assert_eq!(float_to_int::<f32, i32>(x, rz), x as i32);
            prop_assert_eq!(float_to_int::<f32, u32>(x, rz), x as u32);
            prop_assert_eq!(float_to_int::<f32, u8>(x, rz), x as u8);
            prop_assert_eq!(float_to_int::<f32, i16>(x, rz), x as i16);
            let rounded = |r| float_to_int::<f32, i32>(x, mode(r));
            prop_assert_eq!(rounded(Rounding::NearestEven), x.round_ties_even() as i32);
            prop_assert_eq!(rounded(Rounding::Down), x.floor() as i32);
            prop_assert_eq!(rounded(Rounding::Up), x.ceil() as i32);
            prop_assert!(same(float_to_integral(x, mode(Rounding::NearestEven)), x.round_ties_even()));
            prop_assert!(same(float_to_integral(x, mode(Rounding::Down)), x.floor()));
            prop_assert!(same(float_to_integral(x, rz), x.trunc()));
        }
        for x in [f64::from_bits(wide), near, near / 1e9] {
            if !x.is_nan() {
                prop_assert_eq!(float_to_int::<f64, i64>(x, rz), x as i64);
                prop_assert_eq!(float_to_int::<f64, u64>(x, rz), x as u64);
                prop_assert_eq!(float_to_int::<f64, i32>(x, rz), x as i32);
            }
        }
    }

    #[test]
    fn integers_to_floats(x: u64) {
        let rn = Mode::RN;
        prop_assert_eq!(int_to_float::<u64, f32>(x, rn), x as f32);
        prop_assert_eq!(int_to_float::<i64, f32>(x as i64, rn), x as i64 as f32);
        prop_assert_eq!(int_to_float::<i64, f64>(x as i64, rn), x as i64 as f64);
        prop_assert_eq!(int_to_float::<u32, f32>(x as u32, rn), x as u32 as f32);
        prop_assert_eq!(int_to_float::<i8, f32>(x as i8, rn), f32::from(x as i8));
        prop_assert_eq!(int_to_float::<i16, f16>(x as i16, rn), f16::from_f32(f32::from(x as i16)));
    }

    #[test]
    fn integers_to_integers(x: i64) {
        prop_assert_eq!(int_to_int::<i64, u8>(x, false), x as u8);
        prop_assert_eq!(int_to_int::<i8, u64>(x as i8, false), x as i8 as u64);
        prop_assert_eq!(int_to_int::<i64, u32>(x, true), x.clamp(0, u32::MAX.into()) as u32);
        prop_assert_eq!(int_to_int::<i32, i8>(x as i32, true), (x as i32).clamp(-128, 127) as i8);
    }

    #[test]
    fn tf32_rounds_at_the_thirteenth_bit(bits: u32) {
        let x = f32::from_bits(bits);
        prop_assume!(!x.is_nan());
        let rounded = |rounding| f32_to_tf32(x, Narrowing { rounding, ..PLAIN });
        // A carry out of the fraction raises the exponent, up to infinity; infinity's own stays.
        let away = if x.is_infinite() { bits } else { (bits + 0x1000) & !0x1fff };
        prop_assert_eq!(rounded(Rounding::NearestAway), away);
        prop_assert_eq!(rounded(Rounding::Zero), bits & !0x1fff);
    }

    #[test]
    fn f8_is_the_nearest_of_all(x in prop_oneof![-500f32..500.0, -0.1f32..0.1, -1e5f32..1e5]) {
        for (format, largest) in [(Format::E4M3, 448.0f32), (Format::E5M2, 57344.0)] {
            let got = to_f8(x, format, false);
            let distance = |bits: u8| (value(bits, format) - x.clamp(-largest, largest)).abs();
            let best = (0..=255)
                .filter(|&bits| value(bits, format).is_finite())
                .min_by(|&a, &b| {
                    // Of two at the same distance the even one; of two zeros the one of x's sign.
                    let sign = |bits: u8| (bits >> 7 == 1) != x.is_sign_negative();
                    let key = |bits: u8| (distance(bits), bits & 1, sign(bits));
                    key(a).partial_cmp(&key(b)).expect("finite distances")
                });
            prop_assert_eq!(Some(got), best, "{} in {:?}", x, format);
        }
    }
}

/// The value of an f8, by the definition of its fields.
fn value(bits: u8, format: Format) -> f32 {
    let (fraction_bits, bias) = if format == Format::E4M3 {
        (3, 7)
    } else {
        (2, 15)
    };
    let sign = if bits & 0x80 == 0 { 1.0 } else { -1.0 };
    let field = i32::from((bits & 0x7f) >> fraction_bits);
    let fraction = f32::from(bits & ((1 << fraction_bits) - 1)) / (1 << fraction_bits) as f32;
    match (format == Format::E4M3, field, bits & 0x7f) {
        (true, _, 0x7f) => f32::NAN,
        (false, 31, 0x7c) => sign * f32::INFINITY,
        (false, 31, _) => f32::NAN,
        (_, 0, _) => sign * fraction * 2f32.powi(1 - bias),
        _ => sign * (1.0 + fraction) * 2f32.powi(field - bias),
    }
}

#[test]
fn every_f8_widens_exactly() {
    for bits in 0..=255 {
        for format in [Format::E4M3, Format::E5M2] {
            let expected = value(bits, format);
            assert!(
                same(from_f8::<f16>(bits, format, false), f16::from_f32(expected)),
                "{bits:#x}"
            );
            let relu = from_f8::<f16>(bits, format, true);
            let negative = expected.is_sign_negative() && !expected.is_nan();
            let expected = if negative { 0.0 } else { expected };
            assert!(same(relu, f16::from_f32(expected)), "{bits:#x}");
        }
    }
}

#[test]
fn nan_becomes_zero_or_the_top_bit() {
    let rz = mode(Rounding::Zero);
    assert_eq!(float_to_int::<f32, i32>(f32::NAN, rz), 0);
    assert_eq!(float_to_int::<f16, u16>(f16::NAN, rz), 0);
    assert_eq!(float_to_int::<f64, i32>(f64::NAN, rz), i32::MIN);
    assert_eq!(float_to_int::<f32, u64>(f32::NAN, rz), 1 << 63);
    assert_eq!(f32_to_tf32(f32::NAN, PLAIN), 0x7fff_ffff);
    assert_eq!(f32_to_half::<bf16>(f32::NAN, PLAIN).to_bits(), 0x7fff);
    assert_eq!(to_f8(f32::NAN, Format::E4M3, false), 0x7f);
    assert_eq!(to_f8(f32::NAN, Format::E5M2, true), 0x7f);
}

#[test]
fn satfinite_and_relu() {
    let satfinite = Narrowing {
        satfinite: true,
        ..PLAIN
    };
    assert_eq!(f32_to_half::<f16>(1e6, satfinite), f16::MAX);
    assert_eq!(f32_to_half::<f16>(f32::NEG_INFINITY, satfinite), f16::MIN);
    assert_eq!(f32_to_half::<f16>(1e6, PLAIN), f16::INFINITY);
    assert_eq!(to_f8(f32::INFINITY, Format::E4M3, false), 0x7e);
    let relu = Narrowing {
        relu: true,
        ..PLAIN
    };
    assert_eq!(f32_to_half::<bf16>(-1.0, relu).to_bits(), 0);
    assert_eq!(to_f8(-1.0f32, Format::E5M2, true), 0);
}

#[test]
fn ftz_touches_only_single_precision() {
    let ftz = Mode {
        ftz: true,
        ..Mode::RN
    };
    let tiny = f32::from_bits(0x8000_0001);
    assert_eq!(
        float_to_float::<f32, f64>(tiny, ftz).to_bits(),
        (-0.0f64).to_bits()
    );
    assert_eq!(float_to_float::<f64, f32>(1e-40, ftz), 0.0);
    let half = f16::from_bits(1);
    assert_eq!(float_to_float::<f16, f32>(half, ftz), 2f32.powi(-24));
    assert_eq!(float_to_float::<f32, f16>(2f32.powi(-24), ftz), half);
    assert_eq!(
        float_to_int::<f32, i32>(
            f32::from_bits(1),
            Mode {
                rounding: Rounding::Up,
                ..ftz
            }
        ),
        0
    );
    let saturate = Mode {
        clamp: Clamp::Saturate,
        ..Mode::RN
    };
    assert_eq!(float_to_float::<f64, f32>(3.0, saturate), 1.0);
}
