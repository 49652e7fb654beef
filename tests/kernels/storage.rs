//! The types that activations are stored in, for tests that run once for each.

use crate::device::numbers;
use cudarc::driver::{DeviceRepr, ValidAsZeroBits};
use fuselora_kernels::Stored;
use half::{bf16, f16};
use proptest::prelude::*;
use proptest::test_runner::TestCaseError;

pub trait Storage: Stored + DeviceRepr + ValidAsZeroBits + Copy + Default + PartialEq {
    /// The largest relative error of rounding to it.
    const ROUNDING: f64;
    fn of(x: f32) -> Self;
    fn value(self) -> f64;
}

impl Storage for f32 {
    const ROUNDING: f64 = 1.0 / (1u64 << 24) as f64;
    fn of(x: f32) -> f32 {
        x
    }
    fn value(self) -> f64 {
        f64::from(self)
    }
}

impl Storage for f16 {
    const ROUNDING: f64 = 1.0 / (1u64 << 11) as f64;
    fn of(x: f32) -> f16 {
        f16::from_f32(x)
    }
    fn value(self) -> f64 {
        f64::from(self)
    }
}

impl Storage for bf16 {
    const ROUNDING: f64 = 1.0 / (1u64 << 8) as f64;
    fn of(x: f32) -> bf16 {
        bf16::from_f32(x)
    }
    fn value(self) -> f64 {
        f64::from(self)
    }
}

/// Numbers in [-1, 1) as they are stored.
pub fn stored<T: Storage>(seed: u64, count: usize) -> Vec<T> {
    numbers(seed, count).into_iter().map(T::of).collect()
}

/// The exact values of stored numbers.
pub fn exact<T: Storage>(values: &[T]) -> Vec<f64> {
    values.iter().map(|x| x.value()).collect()
}

/// Sums of up to some thousand f32 terms in another order than the reference's, and functions of CUDA's math
/// library, which are within a few units in the last place.
const ARITHMETIC: f64 = 3e-6;

/// Holds every element to one rounding of the storage type and the error of f32 arithmetic, both relative to
/// the element's own size or, where terms cancel, to `terms`, the size that they have.
pub fn check_close<T: Storage>(
    name: &str,
    found: &[T],
    expected: &[f64],
    terms: f64,
) -> Result<(), TestCaseError> {
    prop_assert_eq!(found.len(), expected.len());
    for (i, (found, &expected)) in found.iter().zip(expected).enumerate() {
        let bound = T::ROUNDING * expected.abs() * 1.01 + ARITHMETIC * expected.abs().max(terms);
        // f16 has no exponent left for small numbers.
        let bound = bound
            + if T::ELEMENT == f16::ELEMENT {
                3.1e-8
            } else {
                0.0
            };
        let error = (found.value() - expected).abs();
        prop_assert!(
            error <= bound,
            "{name}[{i}] = {}, not {expected}: off by {error:e}",
            found.value()
        );
    }
    Ok(())
}

/// Runs `$test::<T>($arguments)` for every storage type `T`.
macro_rules! for_every_storage {
    ($test:ident($($argument:expr),* $(,)?)) => {
        $test::<f32>($($argument),*)?;
        $test::<half::f16>($($argument),*)?;
        $test::<half::bf16>($($argument),*)?;
    };
}
pub(crate) use for_every_storage;
