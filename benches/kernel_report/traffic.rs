//! What one layer moves in a forward and a backward pass, in bytes of device memory: every launch reads each of
//! its inputs once and writes each of its results once, and nothing outlives a launch in a cache.
//!
//! With `x` and `dx` of `x` elements, `y` and `dy` of `y`, a weight of `w`, all of them stored in `e` bytes:
//!
//! ```text
//! fused             h; y                                  e (2 x + w +   y)
//!   backward        dh and dB; dA; dx                     e (2 x + w + 2 y)
//! PEFT's sequence   x·Wᵀ; x·Aᵀ, h·Bᵀ, scale; add          e (  x + w + 4 y) + u (  x + 3 y)
//!   backward        dy·W; scale, dB, dh, dA, dh·A; add    e (4 x + w +   y) + u (2 x + 4 y)
//! ```
//!
//! where `u` bytes store the update's own activations, and the low-rank factors and their gradients come besides,
//! which are small. The floor of the fused layer is its two sums; what the kernels move above it are partial sums of
//! the low-rank terms, and the gradients that they add to.

use crate::lora_layer::Shape;

/// Bytes of an element of the fused layer's update.
const F32: u64 = 4;

/// The fused layer, without partial sums.
pub fn floor(shape: Shape, element_size: u64) -> u64 {
    let [x, weight, y] = shape.elements();
    let forward = 2 * x + weight + y;
    let backward = 2 * x + weight + 2 * y;
    element_size * (forward + backward) + F32 * low_rank(shape)
}

/// The fused layer; the kernels leave `partials` f32 elements in their workspace, forward and backward together.
pub fn fused(shape: Shape, element_size: u64, partials: u64) -> u64 {
    let [_, in_features, out_features, rank] = shape.extents();
    // Gradients are added to what is there.
    let accumulated = rank * (in_features + out_features);
    floor(shape, element_size) + F32 * (2 * partials + accumulated)
}

/// PEFT's sequence, with the update in elements of `update_size` bytes. Where they are not those of the layer, `x`, the
/// update, `dy` and its part of `dx` are cast, each read and written once more.
pub fn unfused(shape: Shape, element_size: u64, update_size: u64) -> u64 {
    let [x, weight, y] = shape.elements();
    let layer = (x + weight + 4 * y) + (4 * x + weight + y);
    let update = (x + 3 * y) + (2 * x + 4 * y) + low_rank(shape);
    let cast = match element_size == update_size {
        true => 0,
        false => 2 * (x + y),
    };
    element_size * (layer + cast) + update_size * (update + cast)
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
