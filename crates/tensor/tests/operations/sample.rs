//! Random inputs, and the measure of agreement.

use fuselora_tensor::{DType, Device, Tensor, Weight, philox};

/// Reproducible values in -1..1 from a seed that proptest draws.
pub struct Sample {
    seed: u64,
    next: u32,
}

impl Sample {
    pub fn new(seed: u64) -> Sample {
        Sample { seed, next: 0 }
    }

    fn word(&mut self) -> u32 {
        self.next += 1;
        philox::philox4x32_10(
            [self.seed as u32, (self.seed >> 32) as u32],
            [self.next, 0, 0, 0],
        )[0]
    }

    pub fn values(&mut self, count: usize) -> Vec<f32> {
        (0..count)
            .map(|_| 2.0 * philox::uniform(self.word()) - 1.0)
            .collect()
    }

    pub fn below(&mut self, limit: usize) -> u32 {
        self.word() % limit as u32
    }

    pub fn indices(&mut self, count: usize, limit: usize) -> Vec<u32> {
        (0..count).map(|_| self.below(limit)).collect()
    }
}

pub fn tensor<const N: usize>(shape: [usize; N], values: &[f32]) -> Tensor {
    Tensor::from_f32(&Device::cpu(), shape, values).unwrap()
}

pub fn indices(values: &[u32]) -> Tensor {
    Tensor::from_u32(&Device::cpu(), [values.len()], values).unwrap()
}

/// A weight stored as `dtype`, and the values that it then has.
pub fn weight(shape: [usize; 2], values: &[f32], dtype: DType) -> (Weight, Vec<f64>) {
    let stored = tensor(shape, values).cast(dtype).unwrap();
    let exact = wide(&stored.to_f32_vec().unwrap());
    (Weight::Dense(stored), exact)
}

pub fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&x| f64::from(x)).collect()
}

/// The largest difference, relative to the largest expected magnitude (at least 1e-3, for expected zeros).
pub fn relative_error(found: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(1e-3f64, |m, x| m.max(x.abs()));
    let difference = found
        .iter()
        .zip(expected)
        .map(|(&f, e)| (f64::from(f) - e).abs());
    // NaN must not pass as "not larger".
    difference.fold(0.0, |m: f64, d| if d <= m { m } else { d }) / largest
}

/// f32 keeps 7 digits; sums of up to some thousand terms lose one or two.
pub const TOLERANCE: f64 = 2e-5;

#[track_caller]
pub fn assert_close(name: &str, found: &Tensor, expected: &[f64]) {
    let error = relative_error(found.as_f32().unwrap(), expected);
    assert!(error <= TOLERANCE, "{name}: relative error {error:e}");
}

/// Holds the gradient `found` of `loss` at `at` against a central difference along random directions.
#[track_caller]
pub fn assert_gradient(
    name: &str,
    found: &[f32],
    at: &[f32],
    sample: &mut Sample,
    loss: impl Fn(&[f64]) -> f64,
) {
    assert_gradient_of_terms(name, found, at, 0.0, sample, loss);
}

/// [`assert_gradient`] for a gradient whose terms may cancel: the error is relative to the gradient's norm or to
/// `terms`, the norm that its terms have at least, whichever is larger. With one key to see, for instance, the
/// gradient of a query is exactly zero, and what is found is the rounding error of two terms of order one.
#[track_caller]
pub fn assert_gradient_of_terms(
    name: &str,
    found: &[f32],
    at: &[f32],
    terms: f64,
    sample: &mut Sample,
    loss: impl Fn(&[f64]) -> f64,
) {
    assert_eq!(found.len(), at.len());
    let at = wide(at);
    for _ in 0..3 {
        let direction = wide(&sample.values(at.len()));
        let step = 1e-5;
        let moved = |sign: f64| -> Vec<f64> {
            at.iter()
                .zip(&direction)
                .map(|(x, d)| x + sign * step * d)
                .collect()
        };
        let expected = (loss(&moved(1.0)) - loss(&moved(-1.0))) / (2.0 * step);
        let found = wide(found);
        let slope: f64 = found.iter().zip(&direction).map(|(g, d)| g * d).sum();
        let error =
            (slope - expected).abs() / (norm(&found).max(terms) * norm(&direction)).max(1e-3);
        assert!(
            error <= TOLERANCE,
            "{name}: slope {slope}, expected {expected}, relative error {error:e}"
        );
    }
}

/// The Euclidean norm.
pub fn norm(x: &[f64]) -> f64 {
    x.iter().map(|x| x * x).sum::<f64>().sqrt()
}

/// Σ x·y, the loss whose gradient with respect to x is y.
pub fn inner(x: &[f64], y: &[f32]) -> f64 {
    x.iter().zip(y).map(|(x, &y)| x * f64::from(y)).sum()
}
