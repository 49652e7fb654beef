// A square tile of an f32 matrix product, without tensor cores: every product keeps its bits
//
// A block of MATMUL_THREADS has a tile of MATMUL_TILE x MATMUL_TILE, each thread 4 x 4 of its sums in registers. Two
// slices of 64 x 16 pass through shared memory, 8.4 KB; rows are padded by two: the 16 depths of two neighbours
// that a warp stores transposed then fall into all 32 banks.
#pragma once

#include "abi.h"

constexpr int TILE = MATMUL_TILE;
constexpr int DEPTH = 16;              // k per slice
constexpr int PER_THREAD = 4;          // results of a thread along each edge
constexpr int LANES = TILE / PER_THREAD; // threads along each edge of the tile

static_assert(LANES * LANES == MATMUL_THREADS, "a thread owns PER_THREAD x PER_THREAD results");

// A slice of a factor: slice[d][i] is element i along the tile's edge at depth d.
using Slice = float[DEPTH][TILE + 2];

// Fills the slice at (edge0, depth0), with zeros beyond the matrix. Consecutive threads read
// consecutive addresses whichever way the factor is held.
template <bool depth_major>
__device__ void load(Slice slice, const float *factor, uint32_t edge, uint32_t depth, uint32_t edge0, uint32_t depth0) {
    for (int i = threadIdx.x; i < TILE * DEPTH; i += MATMUL_THREADS) {
        int along_edge = depth_major ? i % TILE : i / DEPTH;
        int along_depth = depth_major ? i / TILE : i % DEPTH;
        uint32_t e = edge0 + along_edge;
        uint32_t d = depth0 + along_depth;
        size_t index = depth_major ? (size_t)d * edge + e : (size_t)e * depth + d;
        slice[along_depth][along_edge] = e < edge && d < depth ? factor[index] : 0.0f;
    }
}

// A [m, k] . B [k, n], each optionally held transposed; calls `finish(index, sum)` for every element of the block's
// tile of C, with its index in C.
template <bool a_transposed, bool b_transposed, typename Finish>
__device__ void multiply_tile(const float *a, const float *b, const MatmulShape &shape, Finish finish) {
    __shared__ Slice a_slice;
    __shared__ Slice b_slice;
    uint32_t row0 = blockIdx.y * TILE;
    uint32_t col0 = blockIdx.x * TILE;
    int row_lane = threadIdx.x / LANES;
    int col_lane = threadIdx.x % LANES;
    float sums[PER_THREAD][PER_THREAD] = {};

    for (uint32_t depth0 = 0; depth0 < shape.k; depth0 += DEPTH) {
        load<a_transposed>(a_slice, a, shape.m, shape.k, row0, depth0);
        load<!b_transposed>(b_slice, b, shape.n, shape.k, col0, depth0);
        __syncthreads();
#pragma unroll
        for (int d = 0; d < DEPTH; ++d) {
            float a_values[PER_THREAD], b_values[PER_THREAD];
            for (int i = 0; i < PER_THREAD; ++i) {
                a_values[i] = a_slice[d][row_lane + i * LANES];
                b_values[i] = b_slice[d][col_lane + i * LANES];
            }
            for (int i = 0; i < PER_THREAD; ++i)
                for (int j = 0; j < PER_THREAD; ++j) sums[i][j] += a_values[i] * b_values[j];
        }
        __syncthreads();
    }

    for (int i = 0; i < PER_THREAD; ++i)
        for (int j = 0; j < PER_THREAD; ++j) {
            uint32_t row = row0 + row_lane + i * LANES;
            uint32_t col = col0 + col_lane + j * LANES;
            if (row < shape.m && col < shape.n) finish((size_t)row * shape.n + col, sums[i][j]);
        }
}
