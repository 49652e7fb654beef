//! CUDA's half-precision intrinsics, compiled by nvcc, against the `half` crate.

mod support;

use half::{bf16, f16};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use ptxsim::{Gpu, LaunchConfig, Profile};
use support::{download, kernel, upload};

const HALF: &str = include_str!("ptx/half.ptx");

/// A 16-bit type of the `half` crate.
trait Half: Copy {
    fn of(bits: u16) -> Self;
    fn bits(self) -> u16;
    fn wide(self) -> f64;
    fn narrow(x: f64) -> Self;
}

/// The f32 next to `x` whose last bit is odd, unless `x` is one: rounding that to a half is rounding `x`
/// once. (`from_f64` of the crate looks at the upper half of the bits only.)
fn to_odd(x: f64) -> f32 {
    let nearest = x as f32;
    let exact = f64::from(nearest) == x || !nearest.is_finite();
    match nearest.to_bits() {
        bits if exact || bits & 1 == 1 => f32::from_bits(bits),
        bits if f64::from(nearest).abs() < x.abs() => f32::from_bits(bits + 1),
        bits => f32::from_bits(bits - 1),
    }
}

macro_rules! half {
    ($type:ty) => {
        impl Half for $type {
            fn of(bits: u16) -> Self {
                <$type>::from_bits(bits)
            }
            fn bits(self) -> u16 {
                self.to_bits()
            }
            fn wide(self) -> f64 {
                self.to_f64()
            }
            fn narrow(x: f64) -> Self {
                <$type>::from_f32(to_odd(x))
            }
        }
    };
}

half!(f16);
half!(bf16);

fn run(name: &str, inputs: &[&[u32]], n: usize) -> Vec<u32> {
    let gpu = Gpu::new(Profile::h100());
    let kernel = kernel(&gpu, HALF, name);
    let out = upload(&gpu, &vec![0u32; n]);
    let mut args: Vec<u8> = Vec::new();
    for input in inputs {
        args.extend(upload(&gpu, input).0.to_le_bytes());
    }
    args.extend(out.0.to_le_bytes());
    args.extend((n as u32).to_le_bytes());
    let grid = [n.div_ceil(64) as u32, 1, 1];
    let config = LaunchConfig {
        grid,
        block: [64, 1, 1],
        ..LaunchConfig::default()
    };
    gpu.launch(&kernel, &config, &args)
        .unwrap_or_else(|fault| panic!("{fault}"));
    download(&gpu, out, n)
}

fn random<S: Strategy>(element: S, count: usize) -> Vec<S::Value> {
    let mut runner = proptest::test_runner::TestRunner::default();
    let strategy = proptest::collection::vec(element, count);
    strategy.new_tree(&mut runner).expect("values").current()
}

/// Random pairs, half of them close in size.
fn pairs(count: usize) -> Vec<u32> {
    let near = any::<u32>().prop_map(|bits| (bits & 0x87ff_87ff) | 0x3800_3800);
    random(prop_oneof![any::<u32>(), near], count)
}

/// Compares both halves of every pair; NaN matches any NaN.
fn check<H: Half>(prefix: &str, operation: &str, expected: impl Fn(H, H) -> H) {
    let (x, y) = (pairs(2000), pairs(2000));
    let out = run(&format!("{prefix}_{operation}"), &[&x, &y], x.len());
    for (i, got) in out.iter().enumerate() {
        for shift in [0, 16] {
            let half = |word: u32| H::of((word >> shift) as u16);
            let (a, b, got) = (half(x[i]), half(y[i]), half(*got));
            let want = expected(a, b);
            let same = got.bits() == want.bits() || (got.wide().is_nan() && want.wide().is_nan());
            assert!(
                same,
                "{prefix}_{operation}({:e}, {:e}) = {:e}, not {:e}",
                a.wide(),
                b.wide(),
                got.wide(),
                want.wide()
            );
        }
    }
}

/// `a * b + c` rounded once: f64 holds the product; where the sum is inexact it is rounded to odd first.
fn fma<H: Half>(a: H, b: H, c: H) -> H {
    let (product, c) = (a.wide() * b.wide(), c.wide());
    let sum = product + c;
    let (big, small) = if product.abs() > c.abs() {
        (product, c)
    } else {
        (c, product)
    };
    let error = small - (sum - big);
    if !sum.is_finite() || error == 0.0 || sum.to_bits() & 1 == 1 {
        return H::narrow(sum);
    }
    let outwards = (error > 0.0) == (sum > 0.0);
    H::narrow(f64::from_bits(if outwards {
        sum.to_bits() + 1
    } else {
        sum.to_bits() - 1
    }))
}

fn check_both<H: Half>(prefix: &str) {
    check::<H>(prefix, "add", |a, b| H::narrow(a.wide() + b.wide()));
    check::<H>(prefix, "sub", |a, b| H::narrow(a.wide() - b.wide()));
    check::<H>(prefix, "mul", |a, b| H::narrow(a.wide() * b.wide()));
    check::<H>(prefix, "fma", |a, b| fma(a, b, a));
    check::<H>(prefix, "fma_relu", |a, b| {
        let sum = fma(a, b, a);
        if sum.wide() <= 0.0 { H::of(0) } else { sum }
    });
    check::<H>(prefix, "min", |a, b| match () {
        () if a.wide().is_nan() => b,
        () if b.wide().is_nan() || a.wide() < b.wide() => a,
        () if a.wide() == b.wide() && a.wide().is_sign_negative() => a,
        () => b,
    });
    check::<H>(prefix, "max_nan", |a, b| match () {
        () if a.wide().is_nan() || b.wide().is_nan() => H::narrow(f64::NAN),
        () if a.wide() > b.wide() => a,
        () if a.wide() == b.wide() && a.wide().is_sign_positive() => a,
        () => b,
    });
    check::<H>(prefix, "neg_abs", |a, _| H::of(a.bits() | 0x8000));
    check::<H>(prefix, "less", |a, b| {
        H::narrow(f64::from(u8::from(a.wide() < b.wide())))
    });
}

#[test]
fn f16_intrinsics() {
    check_both::<f16>("f16");
    check::<f16>("f16", "add_sat", |a, b| {
        let sum = a.wide() + b.wide();
        if sum.is_nan() {
            f16::ZERO
        } else {
            f16::from_f64(sum.clamp(0.0, 1.0))
        }
    });
    check::<f16>("f16", "rint", |a, _| {
        f16::narrow(a.wide().round_ties_even())
    });
}

#[test]
fn bf16_intrinsics() {
    check_both::<bf16>("bf16");
}

/// `ex2.approx` within a relative error of `2^-9.9` in f16 and `2^-7` in bf16, as the ISA states.
#[test]
fn half_exponentials() {
    for (name, bound, of) in [
        (
            "f16_exp2",
            2f64.powf(-9.9),
            (|bits| f16::from_bits(bits).to_f64()) as fn(u16) -> f64,
        ),
        ("bf16_exp2", 2f64.powi(-7), |bits| {
            bf16::from_bits(bits).to_f64()
        }),
    ] {
        let x = random(any::<u32>(), 2000);
        let out = run(name, &[&x, &x], x.len());
        for (x, got) in x.iter().zip(&out) {
            let (x, got) = (of(*x as u16), of(*got as u16));
            let exact = x.exp2();
            // Where the result is a normal number of either type.
            if (-14.0..15.0).contains(&x) {
                assert!(
                    (got - exact).abs() <= bound * exact,
                    "{name}({x}) = {got}, not {exact}"
                );
            }
        }
    }
}

#[test]
fn conversions_to_narrow_types() {
    let values = random(
        prop_oneof![
            any::<u32>().prop_map(f32::from_bits),
            -500f32..500.0,
            -1e-3f32..1e-3
        ],
        4000,
    );
    let words: Vec<u32> = values.iter().map(|x| x.to_bits()).collect();
    let n = values.len() / 2;
    let to_f16 = run("to_f16", &[&words], n);
    let to_bf16 = run("to_bf16", &[&words], n);
    let directed = run("to_f16_rz", &[&words], n);
    for (i, pair) in values.chunks_exact(2).enumerate() {
        let [x, y] = [pair[0], pair[1]];
        for (j, value) in [x, y].into_iter().enumerate() {
            let half = |word: u32| (word >> (16 * j)) as u16;
            let (f, b) = (f16::from_f32(value), bf16::from_f32(value));
            assert!(
                value.is_nan() || half(to_f16[i]) == f.to_bits(),
                "{value:e}"
            );
            assert!(
                value.is_nan() || half(to_bf16[i]) == b.to_bits(),
                "{value:e}"
            );
        }
        let (zero, down) = (
            f16::from_bits(directed[i] as u16),
            f16::from_bits((directed[i] >> 16) as u16),
        );
        assert!(x.is_nan() || zero.to_f32().abs() <= x.abs(), "{x:e}");
        assert!(y.is_nan() || down.to_f32() <= y, "{y:e}");
    }
}

#[test]
fn conversions_to_f8_and_integers() {
    let values = random(
        prop_oneof![-500f32..500.0, -1e-2f32..1e-2, -7e4f32..7e4],
        4000,
    );
    let words: Vec<u32> = values.iter().map(|x| x.to_bits()).collect();
    let n = values.len() / 2;
    for (name, fraction_bits, bias, largest) in
        [("to_e4m3", 3, 7, 448f32), ("to_e5m2", 2, 15, 57344f32)]
    {
        let out = run(name, &[&words], n);
        // The value of a byte by its fields; the largest magnitudes are NaN or infinite.
        let value = |byte: u32| {
            let (field, fraction) = (
                (byte & 0x7f) >> fraction_bits,
                byte & ((1 << fraction_bits) - 1),
            );
            let fraction = fraction as f32 / (1 << fraction_bits) as f32;
            let magnitude = match field {
                0 => fraction * 2f32.powi(1 - bias),
                _ => (1.0 + fraction) * 2f32.powi(field as i32 - bias),
            };
            if byte & 0x80 == 0 {
                magnitude
            } else {
                -magnitude
            }
        };
        for (i, x) in values.iter().enumerate() {
            let byte = (out[i / 2] >> (8 * (i % 2))) & 0xff;
            let x = x.clamp(-largest, largest);
            let error = (value(byte) - x).abs();
            for other in (0..256).filter(|other| value(*other).abs() <= largest) {
                assert!(
                    error <= (value(other) - x).abs(),
                    "{name}({x:e}) = {:e}",
                    value(byte)
                );
            }
        }
    }
    let out = run("to_int", &[&words], n);
    for (i, pair) in values.chunks_exact(2).enumerate() {
        let [x, y] = [
            f16::from_f32(pair[0]).to_f32(),
            f16::from_f32(pair[1]).to_f32(),
        ];
        assert_eq!(out[i] as u16 as i16, x.round_ties_even() as i16, "{x}");
        assert_eq!((out[i] >> 16) as u16, y as u16, "{y}");
    }
}
