//! Values of random distributions, whatever version of a library draws the bits.

use rand::Rng;

/// Standard normal, by Box and Muller's transform.
pub(crate) fn gaussian(random: &mut impl Rng) -> f64 {
    let radius = (-2.0 * (1.0 - uniform(random)).ln()).sqrt();
    radius * (std::f64::consts::TAU * uniform(random)).cos()
}

/// Uniform in `[0, 1)`, with 53 bits.
pub(crate) fn uniform(random: &mut impl Rng) -> f64 {
    (random.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}
