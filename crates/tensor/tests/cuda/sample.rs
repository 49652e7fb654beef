//! Random inputs, once as a CUDA device holds them and once as the CPU does, and the measure of agreement.

use crate::device;
use fuselora_tensor::{DType, Device, Tensor, philox};

/// Reproducible values in -1..1 from a seed that proptest draws.
pub struct Sample {
    seed: u64,
    next: u32,
    /// The type of activations on the CUDA device.
    pub dtype: DType,
}

/// A tensor on the CUDA device, and its values in F32 on the CPU.
pub struct Pair {
    pub cuda: Tensor,
    pub cpu: Tensor,
}

impl Sample {
    pub fn new(seed: u64, dtype: DType) -> Sample {
        Sample {
            seed,
            next: 0,
            dtype,
        }
    }

    fn word(&mut self) -> u32 {
        self.next += 1;
        let key = [self.seed as u32, (self.seed >> 32) as u32];
        philox::philox4x32_10(key, [self.next, 0, 0, 0])[0]
    }

    pub fn values(&mut self, count: usize) -> Vec<f32> {
        let mut value = || 2.0 * philox::uniform(self.word()) - 1.0;
        (0..count).map(|_| value()).collect()
    }

    /// Activations: of the sample's type.
    pub fn activations<const N: usize>(&mut self, shape: [usize; N]) -> Pair {
        let dtype = self.dtype;
        self.stored(shape, dtype)
    }

    /// Parameters and what belongs to them: F32 everywhere.
    pub fn parameters<const N: usize>(&mut self, shape: [usize; N]) -> Pair {
        self.stored(shape, DType::F32)
    }

    fn stored<const N: usize>(&mut self, shape: [usize; N], dtype: DType) -> Pair {
        let values = self.values(shape.iter().product());
        Pair::new(
            Tensor::from_f32(&Device::cpu(), shape, &values).unwrap(),
            dtype,
        )
    }

    /// Indices below `limit`.
    pub fn indices(&mut self, count: usize, limit: usize) -> Pair {
        let indices: Vec<u32> = (0..count).map(|_| self.word() % limit as u32).collect();
        let cpu = Tensor::from_u32(&Device::cpu(), [count], &indices).unwrap();
        Pair {
            cuda: cpu.to_device(&device()).unwrap(),
            cpu,
        }
    }
}

impl Pair {
    fn new(cpu: Tensor, dtype: DType) -> Pair {
        let stored = cpu.cast(dtype).unwrap();
        Pair {
            cuda: stored.to_device(&device()).unwrap(),
            cpu: stored.cast(DType::F32).unwrap(),
        }
    }

    /// The values in f64.
    pub fn wide(&self) -> Vec<f64> {
        wide(&self.cpu.to_f32_vec().unwrap())
    }
}

pub fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&x| f64::from(x)).collect()
}

/// What f32 arithmetic may lose, as for the CPU's operations, and what rounding a result, and what the result is
/// computed from, to 11 or 8 digits may cost.
fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => 2.0 / 1024.0,
        DType::BF16 => 2.0 / 128.0,
        _ => 2e-5,
    }
}

/// Holds a tensor on the CUDA device against what is expected, relative to the largest expected magnitude.
#[track_caller]
pub fn assert_close(name: &str, found: &Tensor, expected: &[f64], dtype: DType) {
    assert_close_of_terms(name, found, expected, 1e-3, dtype);
}

/// [`assert_close`] for sums whose terms, of the order of `terms`, may cancel.
#[track_caller]
fn assert_close_of_terms(name: &str, found: &Tensor, expected: &[f64], terms: f64, dtype: DType) {
    assert!(!found.device().is_cpu(), "{name} is on the CPU");
    let found = found.to_f32_vec().unwrap();
    assert_eq!(found.len(), expected.len(), "{name}");
    let largest = expected.iter().fold(terms, |m, x| m.max(x.abs()));
    let differences = found
        .iter()
        .zip(expected)
        .map(|(&f, e)| (f64::from(f) - e).abs());
    // NaN must not pass as "not larger".
    let error = differences.fold(0.0, |m: f64, d| if d <= m { m } else { d }) / largest;
    assert!(
        error <= tolerance(dtype),
        "{name} {dtype}: relative error {error:e}"
    );
}

/// Holds a tensor on the CUDA device against the CPU's.
#[track_caller]
pub fn assert_same(name: &str, found: &Tensor, expected: &Tensor, dtype: DType) {
    assert_eq!(found.shape(), expected.shape(), "{name}");
    assert_close(name, found, &wide(&expected.to_f32_vec().unwrap()), dtype);
}

/// [`assert_same`] for sums whose terms, of the order of `terms`, may cancel.
#[track_caller]
pub fn assert_same_of_terms(
    name: &str,
    found: &Tensor,
    expected: &Tensor,
    terms: f64,
    dtype: DType,
) {
    assert_eq!(found.shape(), expected.shape(), "{name}");
    let expected = wide(&expected.to_f32_vec().unwrap());
    assert_close_of_terms(name, found, &expected, terms, dtype);
}
