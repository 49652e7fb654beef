//! Fresh LoRA weights, by PEFT's rules (`reset_lora_parameters` in `tuners/lora/layer.py`).

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{InitLoraWeights, Target};

/// A `[rank, in_features]` and B `[out_features, rank]`.
pub(super) fn weights(init: InitLoraWeights, target: &Target, seed: u64) -> (Vec<f32>, Vec<f32>) {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    random.set_stream(fnv1a(&target.module));
    let a_len = target.rank * target.in_features;
    let b_len = target.out_features * target.rank;
    match init {
        InitLoraWeights::KaimingUniform => (
            kaiming_uniform(&mut random, a_len, target.in_features),
            vec![0.0; b_len],
        ),
        InitLoraWeights::Gaussian => (
            gaussian(&mut random, a_len, 1.0 / target.rank as f64),
            vec![0.0; b_len],
        ),
        InitLoraWeights::RandomBoth => (
            kaiming_uniform(&mut random, a_len, target.in_features),
            kaiming_uniform(&mut random, b_len, target.rank),
        ),
    }
}

/// PyTorch's `kaiming_uniform_` with `a = sqrt(5)`: uniform within `sqrt(6 / ((1 + a²) · fan_in)) = 1 / sqrt(fan_in)`.
fn kaiming_uniform(random: &mut impl Rng, len: usize, fan_in: usize) -> Vec<f32> {
    let bound = 1.0 / (fan_in as f64).sqrt();
    (0..len)
        .map(|_| ((2.0 * uniform(random) - 1.0) * bound) as f32)
        .collect()
}

/// Normal values by Box and Muller's transform.
fn gaussian(random: &mut impl Rng, len: usize, deviation: f64) -> Vec<f32> {
    (0..len)
        .map(|_| {
            let radius = (-2.0 * (1.0 - uniform(random)).ln()).sqrt();
            (radius * (std::f64::consts::TAU * uniform(random)).cos() * deviation) as f32
        })
        .collect()
}

/// Uniform in `[0, 1)`, with 53 bits.
fn uniform(random: &mut impl Rng) -> f64 {
    (random.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

/// A hash of the module's name that no library version changes.
fn fnv1a(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    })
}
