//! Fresh LoRA weights, by PEFT's rules (`tuners/lora/layer.py`): `reset_lora_parameters` and `orthogonal_init`. Those
//! that are made of the frozen weight are in [`super::residual`].

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{InitLoraWeights, ModuleKind, Target};
use crate::low_rank::{gaussian_matrix, orthonormal, row_major};
use crate::random::{gaussian, uniform};

/// A `[rank, in_features]` and B `[out_features, rank]`.
pub(super) fn weights(init: InitLoraWeights, target: &Target, seed: u64) -> (Vec<f32>, Vec<f32>) {
    let random = &mut stream(&target.module, seed);
    let Target {
        rank,
        in_features,
        out_features,
        ..
    } = *target;
    let (a_len, b_len) = (rank * in_features, out_features * rank);
    if target.kind == ModuleKind::Embedding {
        let a = match init {
            InitLoraWeights::RandomBoth => normal(random, a_len, 1.0),
            _ => vec![0.0; a_len],
        };
        return (a, normal(random, b_len, 1.0));
    }
    match init {
        InitLoraWeights::Gaussian => (normal(random, a_len, 1.0 / rank as f64), vec![0.0; b_len]),
        InitLoraWeights::RandomBoth => (
            kaiming_uniform(random, a_len, in_features),
            kaiming_uniform(random, b_len, rank),
        ),
        InitLoraWeights::Orthogonal => {
            let q = orthonormal(gaussian_matrix(rank, rank, random));
            // Of the rows of one orthogonal matrix, A has every other one and B the rest.
            let rows =
                |first: usize| q.select_rows((first..rank).step_by(2).collect::<Vec<_>>().iter());
            let a = rows(0).tr_mul(&gaussian_matrix(rank / 2, in_features, random)) / 10.0;
            let b = gaussian_matrix(out_features, rank / 2, random) * rows(1) / 10.0;
            (row_major(&a), row_major(&b))
        }
        _ => (
            kaiming_uniform(random, a_len, in_features),
            vec![0.0; b_len],
        ),
    }
}

/// A module's own random numbers.
pub(super) fn stream(module: &str, seed: u64) -> ChaCha8Rng {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    random.set_stream(fnv1a(module));
    random
}

/// PyTorch's `kaiming_uniform_` with `a = sqrt(5)`: uniform within `sqrt(6 / ((1 + a²) · fan_in)) = 1 / sqrt(fan_in)`.
fn kaiming_uniform(random: &mut impl Rng, len: usize, fan_in: usize) -> Vec<f32> {
    let bound = 1.0 / (fan_in as f64).sqrt();
    (0..len)
        .map(|_| ((2.0 * uniform(random) - 1.0) * bound) as f32)
        .collect()
}

fn normal(random: &mut impl Rng, len: usize, deviation: f64) -> Vec<f32> {
    (0..len)
        .map(|_| (gaussian(random) * deviation) as f32)
        .collect()
}

/// A hash of the module's name that no library version changes.
fn fnv1a(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    })
}
