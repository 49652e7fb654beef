//! Loops that the compiler vectorises for the machine at hand.
//!
//! The functions here are `inline(always)`, so that inside [`vectorize`] they are compiled with the widest
//! instructions that the processor has. Sums run in [`LANES`] independent lanes: floating-point addition
//! may not be reordered by the compiler, so the order that vectorises is written out.

use pulp::{Simd, WithSimd};

/// Partial sums of a reduction: four registers of eight, enough to hide the latency of an addition.
const LANES: usize = 32;

/// Runs `body`, compiled for this machine's vector instructions. Mark the closure `#[inline(always)]`: one
/// that the compiler keeps as a function is compiled for the baseline processor, many times slower.
#[inline(always)]
pub(crate) fn vectorize<R>(body: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(body)
}

/// e^x within 2 units in the last place; 0 and infinity where the result leaves the range of f32.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits of the mantissa.
    const ROUND: f32 = 12_582_912.0;
    // ln 2 in two parts, the first with few enough bits that its multiples are exact.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Comparisons instead of `clamp`: a NaN passes through.
    let x = if x > 89.0 { 89.0 } else { x };
    let x = if x < -104.0 { -104.0 } else { x };
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let whole = shifted - ROUND;
    let r = whole.mul_add(-LN2_LOW, whole.mul_add(-LN2_HIGH, x));
    // The minimax polynomial of Cephes' expf.
    let p = 1.987_569_1e-4_f32
        .mul_add(r, 1.398_2e-3)
        .mul_add(r, 8.333_452e-3)
        .mul_add(r, 4.166_579_6e-2)
        .mul_add(r, 1.666_666_5e-1)
        .mul_add(r, 0.5);
    let p = p.mul_add(r * r, r) + 1.0;
    // Two factors, because 2^n alone leaves the range before the result does.
    let exponent = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    let half = exponent >> 1;
    p * power_of_two(half) * power_of_two(exponent.wrapping_sub(half))
}

#[inline(always)]
fn power_of_two(exponent: i32) -> f32 {
    f32::from_bits((exponent.wrapping_add(127) as u32) << 23)
}

/// 1 / (1 + e^-x).
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// Folds the elements of `x` into lanes that begin at `start`, and the lanes with `combine`.
#[inline(always)]
fn fold(
    x: &[f32],
    start: f32,
    step: impl Fn(f32, f32) -> f32,
    combine: impl Fn(f32, f32) -> f32,
) -> f32 {
    let mut lanes = [start; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            lanes[lane] = step(lanes[lane], chunk[lane]);
        }
    }
    for (lane, &x) in rest.iter().enumerate() {
        lanes[lane] = step(lanes[lane], x);
    }
    combine_lanes(lanes, combine)
}

/// Σ x·y. Written in vectors of this machine's, because in some callers the compiler kept the lanes of a loop in memory,
/// six times as slow.
#[inline(always)]
pub(crate) fn dot(x: &[f32], y: &[f32]) -> f32 {
    struct Dot<'a>(&'a [f32], &'a [f32]);

    impl WithSimd for Dot<'_> {
        type Output = f32;

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) -> f32 {
            let (x, x_rest) = S::as_simd_f32s(self.0);
            let (y, y_rest) = S::as_simd_f32s(self.1);
            let mut sums = [simd.splat_f32s(0.0); 4];
            let (x_fours, x_ones) = x.as_chunks::<4>();
            let (y_fours, y_ones) = y.as_chunks::<4>();
            for (x, y) in x_fours.iter().zip(y_fours) {
                sums[0] = simd.mul_add_f32s(x[0], y[0], sums[0]);
                sums[1] = simd.mul_add_f32s(x[1], y[1], sums[1]);
                sums[2] = simd.mul_add_f32s(x[2], y[2], sums[2]);
                sums[3] = simd.mul_add_f32s(x[3], y[3], sums[3]);
            }
            for (x, y) in x_ones.iter().zip(y_ones) {
                sums[0] = simd.mul_add_f32s(*x, *y, sums[0]);
            }
            let [a, b, c, d] = sums;
            let sum = simd.add_f32s(simd.add_f32s(a, b), simd.add_f32s(c, d));
            let rest = x_rest.iter().zip(y_rest);
            rest.fold(simd.reduce_sum_f32s(sum), |sum, (x, y)| x.mul_add(*y, sum))
        }
    }

    pulp::Arch::new().dispatch(Dot(x, &y[..x.len()]))
}

/// Σ x·y·z.
#[inline(always)]
pub(crate) fn dot3(x: &[f32], y: &[f32], z: &[f32]) -> f32 {
    let (y, z) = (&y[..x.len()], &z[..x.len()]);
    let mut lanes = [0.0f32; LANES];
    let (x_chunks, x_rest) = x.as_chunks::<LANES>();
    let (y_chunks, y_rest) = y.as_chunks::<LANES>();
    let (z_chunks, z_rest) = z.as_chunks::<LANES>();
    for ((x, y), z) in x_chunks.iter().zip(y_chunks).zip(z_chunks) {
        for lane in 0..LANES {
            lanes[lane] = (x[lane] * y[lane]).mul_add(z[lane], lanes[lane]);
        }
    }
    for (lane, ((x, y), z)) in x_rest.iter().zip(y_rest).zip(z_rest).enumerate() {
        lanes[lane] = (x * y).mul_add(*z, lanes[lane]);
    }
    sum_lanes(lanes)
}

/// Σ x.
#[inline(always)]
pub(crate) fn sum(x: &[f32]) -> f32 {
    fold(
        x,
        0.0,
        #[inline(always)]
        |sum, x| sum + x,
        #[inline(always)]
        |a, b| a + b,
    )
}

/// Σ (x - shift)².
#[inline(always)]
pub(crate) fn sum_of_squares(x: &[f32], shift: f32) -> f32 {
    fold(
        x,
        0.0,
        #[inline(always)]
        |sum, x| (x - shift).mul_add(x - shift, sum),
        #[inline(always)]
        |a, b| a + b,
    )
}

/// Σ e^(x - shift).
#[inline(always)]
pub(crate) fn sum_exp_shifted(x: &[f32], shift: f32) -> f32 {
    fold(
        x,
        0.0,
        #[inline(always)]
        |sum, x| sum + exp(x - shift),
        #[inline(always)]
        |a, b| a + b,
    )
}

#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if b > a { b } else { a }
}

/// Zero when every element is finite, NaN otherwise: infinity and NaN times zero are NaN.
#[inline(always)]
pub(crate) fn sum_of_zeros(x: &[f32]) -> f32 {
    fold(
        x,
        0.0,
        #[inline(always)]
        |sum, x| x.mul_add(0.0, sum),
        #[inline(always)]
        |a, b| a + b,
    )
}

/// The largest element; NaN elements are passed over, and without any other it is -infinity.
#[inline(always)]
pub(crate) fn max(x: &[f32]) -> f32 {
    fold(x, f32::NEG_INFINITY, larger, larger)
}

/// y += a·x.
#[inline(always)]
pub(crate) fn axpy(a: f32, x: &[f32], y: &mut [f32]) {
    for (y, &x) in y.iter_mut().zip(x) {
        *y = a.mul_add(x, *y);
    }
}

/// Replaces each x by e^(x - shift) and returns their sum.
#[inline(always)]
pub(crate) fn exp_shifted(x: &mut [f32], shift: f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (chunks, rest) = x.as_chunks_mut::<LANES>();
    for chunk in chunks {
        for (lane, value) in chunk.iter_mut().enumerate() {
            *value = exp(*value - shift);
            lanes[lane] += *value;
        }
    }
    for (lane, value) in rest.iter_mut().enumerate() {
        *value = exp(*value - shift);
        lanes[lane] += *value;
    }
    sum_lanes(lanes)
}

#[inline(always)]
fn sum_lanes(lanes: [f32; LANES]) -> f32 {
    combine_lanes(
        lanes,
        #[inline(always)]
        |a, b| a + b,
    )
}

#[inline(always)]
fn combine_lanes(mut lanes: [f32; LANES], combine: impl Fn(f32, f32) -> f32) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] = combine(lanes[lane], lanes[lane + width]);
        }
        width /= 2;
    }
    lanes[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_ulp() {
        let mut worst = 0.0f64;
        for bits in (0..=u32::MAX).step_by(4099) {
            let x = f32::from_bits(bits);
            if !(-87.0..88.7).contains(&x) {
                continue;
            }
            let exact = f64::from(x).exp();
            let ulp = f64::from(f32::from_bits((exact as f32).to_bits() + 1) - exact as f32);
            worst = worst.max((f64::from(exp(x)) - exact).abs() / ulp);
        }
        assert!(worst <= 2.0, "{worst} ulp");
    }

    #[test]
    fn exp_at_the_edges() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-200.0), 0.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert!(exp(f32::NAN).is_nan());
        let denormal = exp(-100.0);
        assert!(
            (f64::from(denormal) / (-100f64).exp() - 1.0).abs() < 0.05,
            "{denormal}"
        );
    }

    #[test]
    fn reductions_match_plain_sums() {
        for len in [0, 1, 7, 31, 32, 33, 100, 1000] {
            let x: Vec<f32> = (0..len)
                .map(|i| ((i * 37 % 101) as f32 - 50.0) / 7.0)
                .collect();
            let y: Vec<f32> = (0..len)
                .map(|i| ((i * 53 % 97) as f32 - 48.0) / 5.0)
                .collect();
            let expected: f64 = x
                .iter()
                .zip(&y)
                .map(|(&x, &y)| f64::from(x) * f64::from(y))
                .sum();
            assert!(
                (f64::from(vectorize(|| dot(&x, &y))) - expected).abs() <= 1e-3,
                "{len}"
            );
            let expected: f64 = x.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
            assert!(
                (f64::from(vectorize(|| sum_of_squares(&x, 0.0))) - expected).abs() <= 1e-2,
                "{len}"
            );
            assert_eq!(
                vectorize(|| max(&x)),
                x.iter().copied().fold(f32::NEG_INFINITY, f32::max)
            );
            let mut e = x.clone();
            let sum = vectorize(|| exp_shifted(&mut e, 2.0));
            let expected: f64 = x.iter().map(|&x| (f64::from(x) - 2.0).exp()).sum();
            assert!(
                (f64::from(sum) - expected).abs() <= 1e-5 * expected,
                "{len}"
            );
        }
    }
}
