// What the kernels for a few tokens share: the update of a linear layer and the sums of a block's warps.
#pragma once

#include "../storage.cuh"
#include "nf4/format.cuh"

constexpr int WARPS = NF4_GEMV_THREADS / 32;

// scaling h . lora_b^T of one token and row, for the ranks that are this warp's share.
__device__ inline float low_rank_share(const Nf4Gemv &shape, uint32_t token, uint32_t row, int warp) {
    float sum = 0;
    if (token >= shape.tokens || row >= shape.out_features) return sum;
    const float *h = reinterpret_cast<const float *>(shape.h) + (size_t)token * shape.rank;
    const float *b = reinterpret_cast<const float *>(shape.lora_b) + (size_t)row * shape.rank;
    for (uint32_t r = warp; r < shape.rank; r += WARPS) sum += h[r] * b[r];
    return shape.scaling * sum;
}

// The sums of each warp, by token and row. Rows are 20 words, so that the stores of a warp's fragments, and the
// reads of 8 tokens of 4 rows, fall into different banks.
using Partials = float[WARPS][NF4_GEMV_TOKENS][NF4_GEMV_ROWS + 4];

// Adds up what the warps found, in their order, and writes it: one token and row per thread.
template <typename T> __device__ void store_sums(const Nf4Gemv &shape, const Partials &partials, uint32_t row0) {
    uint32_t token = threadIdx.x % NF4_GEMV_TOKENS, i = threadIdx.x / NF4_GEMV_TOKENS, row = row0 + i;
    if (i >= NF4_GEMV_ROWS || token >= shape.tokens || row >= shape.out_features) return;
    float sum = shape.bias ? reinterpret_cast<const float *>(shape.bias)[row] : 0.0f;
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) sum += partials[warp][token][i];
    reinterpret_cast<T *>(shape.y)[(size_t)token * shape.out_features + row] = narrow<T>(sum);
}
