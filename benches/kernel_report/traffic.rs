//! What one layer moves in a forward and a backward pass, in bytes of device memory: every launch reads each of
//! its inputs once and writes each of its results once, and nothing outlives a launch in a cache.
//!
//! With `x` and `dx` of `tx` elements, `y` and `dy` of `ty`, a weight of `w`, and an element of `e` bytes:
//!
//! ```text
//! PEFT's sequence   x·Wᵀ, x·Aᵀ, h·Bᵀ, scale, add     e (2 tx +   w + 7 ty)
//!   backward        dy·W, scale, dB, dh, dA, dh·A, add  e (6 tx + w + 5 ty)
//! fused             x·Aᵀ, y                          e (2 tx +   w +   ty)
//!   backward        dh and dB, dA, dx                e (2 tx +   w + 2 ty)
//! ```
//!
//! and the low-rank factors and their gradients besides, which are small. The floor of the fused layer is the
//! second sum; what the kernels move above it are partial sums of the low-rank terms.

use crate::lora_layer::Shape;

/// Bytes of an element of the update.
const F32: u64 = 4;

/// The fused layer, without partial sums.
pub fn floor(shape: Shape, element_size: u64) -> u64 {
    let [x, weight, y] = shape.elements();
    let activations = (2 * x + y) + (2 * x + 2 * y);
    element_size * (activations + 2 * weight) + F32 * low_rank(shape)
}

/// The fused layer; the kernels leave `partials` f32 elements in their workspace, forward and backward together.
pub fn fused(shape: Shape, element_size: u64, partials: u64) -> u64 {
    let [_, in_features, out_features, rank] = shape.extents();
    // Gradients are added to what is there.
    let accumulated = rank * (in_features + out_features);
    floor(shape, element_size) + F32 * (2 * partials + accumulated)
}

/// PEFT's sequence, all of it in one type; casts between types would come on top.
pub fn unfused(shape: Shape, element_size: u64) -> u64 {
    let [x, weight, y] = shape.elements();
    let forward = 2 * x + weight + 7 * y;
    let backward = 6 * x + weight + 5 * y;
    element_size * (forward + backward + low_rank(shape))
}

/// Every tensor once in each direction: what a layer in a single launch with unbounded cache would move.
pub fn tensors(shape: Shape, element_size: u64) -> u64 {
    let [x, weight, y] = shape.elements();
    element_size * (3 * x + 2 * weight + 2 * y) + F32 * low_rank(shape)
}

/// Elements of the factors, of `h`, and of their gradients, each time that an operation reads or writes one.
/// It is the same for the fused layer and for PEFT's sequence: `h = x·Aᵀ`, `h·Bᵀ`, `dB` and `dh` of `dy`, `dA`,
/// `dh·A`.
fn low_rank(shape: Shape) -> u64 {
    let [tokens, in_features, out_features, rank] = shape.extents();
    let (a, b, h) = (rank * in_features, out_features * rank, tokens * rank);
    (a + h) + (h + b) + (b + h + h + b) + (h + a) + (h + a)
}
