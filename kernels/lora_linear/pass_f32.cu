// One pass over activations z [tokens, features] for the low-rank side of a linear layer, f32
//
//   lora_linear_h      H  = drop(X) . A^T                         z = X, sums over features
//   lora_linear_dh     dH = scaling dY . B                        z = dY, sums over features
//   lora_linear_dh_db  dH = scaling dY . B, dB = scaling dY^T . H z = dY, both sums at once
//   lora_linear_da     dA = dH^T . drop(X)                        z = X, sums over tokens
//
// Layouts   row-major and dense. wide is A [rank, features] or B [features, rank]; tall is H or dH
//           [tokens, rank]. Partial sums, one set per block along the summed extent:
//           row_partials [feature splits, tokens, rank]; column_partials [token splits, features,
//           rank] for dB and [token splits, rank, features] for dA. lora_linear_sum adds them up in
//           order and applies scaling.
// Launch    LORA_THREADS threads per block_tokens x block_features of z and RANKS of a projection's
//           rank; grid (projections x rank blocks, features, tokens). Blocks that share a part of z
//           are neighbours, so it comes from memory once. With sums over tokens, block_features is
//           at most LORA_PASS_F32_FEATURES: they stay in registers from the first token to the last.
// Shared    a square of 64 x 64 of z, 64 x RANKS of wide and of tall; 27.6 KB.
// Traffic   at least 4 tokens features bytes, the low-rank factors and the partial sums;
//           2 tokens features rank FLOPs per sum.
#include "abi.h"
#include "lora_linear/dropout.cuh"
#include "lora_linear/simt.cuh"

constexpr int EDGE = 64; // of the square of z
constexpr int RANKS = LORA_PASS_F32_RANKS;
constexpr int SQUARES = LORA_PASS_F32_FEATURES / EDGE; // that a block keeps sums over tokens of

static_assert(EDGE * RANKS == 4 * LORA_THREADS, "a thread owns four ranks of one row or column");

// Rows that are 4 words past a multiple of 32: the eight rows that a warp reads together fall into
// different banks. Rows of the low-rank slices are 20 words, for the transposing stores.
using Square = float[EDGE][EDGE + 4];
using LowRank = float[EDGE][RANKS + 4];

__device__ void load_square(Square square, const Matrix &z, uint32_t token0, uint32_t feature0,
                            const LoraDropout &dropout, uint32_t step) {
    for (int j = 0; j < EDGE * EDGE / 4 / (int)LORA_THREADS; ++j) {
        int i = threadIdx.x + j * LORA_THREADS;
        int row = i / (EDGE / 4), col = i % (EDGE / 4) * 4;
        float4 v = z.load4(token0 + row, feature0 + col);
        if (dropout.probability > 0) {
            uint64_t index = (uint64_t)(token0 + row) * z.cols + feature0 + col;
            uint32_t bits = kept4(dropout, step, index);
            v = make_float4(bits & 1 ? v.x * dropout.kept : 0, bits & 2 ? v.y * dropout.kept : 0,
                            bits & 4 ? v.z * dropout.kept : 0, bits & 8 ? v.w * dropout.kept : 0);
        }
        *reinterpret_cast<float4 *>(&square[row][col]) = v;
    }
}

// slice[i][r] = factor[first + i][rank0 + r]; the lanes that store together take rows 4 apart,
// which fall into different banks.
__device__ void load_rows(LowRank slice, const Matrix &factor, uint32_t first, uint32_t rank0) {
    int i = threadIdx.x;
    int row = (i / 4 % 2) * 4 + i / 8 % 4 + i / 32 * 8, col = i % 4 * 4;
    *reinterpret_cast<float4 *>(&slice[row][col]) = factor.load4(first + row, rank0 + col);
}

// slice[i][r] = factor[rank0 + r][first + i]
__device__ void load_columns(LowRank slice, const Matrix &factor, uint32_t first, uint32_t rank0) {
    int i = threadIdx.x;
    int row = 4 * (i % 2 + i / 32 * 2), col = i / 2 % RANKS;
    float4 v = factor.load4(rank0 + col, first + row);
    for (int k = 0; k < 4; ++k) slice[row + k][col] = at(v, k);
}

__device__ void add_product(float4 &sums, float z, const float *low_rank) {
    float4 l = *reinterpret_cast<const float4 *>(low_rank);
    sums = make_float4(sums.x + z * l.x, sums.y + z * l.y, sums.z + z * l.z, sums.w + z * l.w);
}

// `down`: wide and the sums over tokens are held [rank, features], as A is.
template <bool over_features, bool over_tokens, bool down>
__device__ void pass(const LoraPass &pass) {
    __shared__ Square square;
    __shared__ LowRank wide_slice;
    __shared__ LowRank tall_slice;
    const LoraSide &side = pass.sides[blockIdx.x / pass.rank_blocks];
    uint32_t rank0 = blockIdx.x % pass.rank_blocks * RANKS;
    if (rank0 >= side.rank) return;

    uint32_t tokens = pass.tokens, features = pass.features, rank = side.rank;
    uint32_t step = step_of(side.dropout);
    uint32_t token_begin = blockIdx.z * pass.block_tokens;
    uint32_t token_end = min(tokens, token_begin + pass.block_tokens);
    uint32_t feature_begin = blockIdx.y * pass.block_features;
    uint32_t feature_end = min(features, feature_begin + pass.block_features);
    Matrix z(pass.z, tokens, features);
    Matrix tall(side.tall, tokens, rank);
    Matrix wide = down ? Matrix(side.wide, rank, features) : Matrix(side.wide, features, rank);
    float *row_partials =
        reinterpret_cast<float *>(side.row_partials) + (size_t)blockIdx.y * tokens * rank;
    float *column_partials =
        reinterpret_cast<float *>(side.column_partials) + (size_t)blockIdx.z * features * rank;

    int own = threadIdx.x / 4, ranks = threadIdx.x % 4 * 4;
    float4 column_sums[SQUARES] = {};

    for (uint32_t token0 = token_begin; token0 < token_end; token0 += EDGE) {
        float4 row_sums = make_float4(0, 0, 0, 0);
        // One square of z; `column` are the sums over tokens of its features.
        auto add_square = [&](uint32_t feature0, float4 &column) {
            load_square(square, z, token0, feature0, side.dropout, step);
            if (over_features && down) load_columns(wide_slice, wide, feature0, rank0);
            if (over_features && !down) load_rows(wide_slice, wide, feature0, rank0);
            if (over_tokens) load_rows(tall_slice, tall, token0, rank0);
            __syncthreads();
#pragma unroll 8
            for (int i = 0; i < EDGE; ++i) {
                if (over_features) add_product(row_sums, square[own][i], &wide_slice[i][ranks]);
                if (over_tokens) add_product(column, square[i][own], &tall_slice[i][ranks]);
            }
            __syncthreads();
        };
        if (over_tokens) {
#pragma unroll
            for (int s = 0; s < SQUARES; ++s)
                if (feature_begin + s * EDGE < feature_end)
                    add_square(feature_begin + s * EDGE, column_sums[s]);
        } else {
            float4 unused;
            for (uint32_t feature0 = feature_begin; feature0 < feature_end; feature0 += EDGE)
                add_square(feature0, unused);
        }
        if (over_features)
            store4(row_partials, tokens, rank, token0 + own, rank0 + ranks, row_sums);
    }

    if constexpr (over_tokens) {
#pragma unroll
        for (int s = 0; s < SQUARES; ++s) {
            uint32_t feature = feature_begin + s * EDGE + own;
            if constexpr (down) {
                for (int i = 0; i < 4; ++i) {
                    uint32_t r = rank0 + ranks + i;
                    if (feature < features && r < rank)
                        column_partials[(size_t)r * features + feature] = at(column_sums[s], i);
                }
            } else {
                store4(column_partials, features, rank, feature, rank0 + ranks, column_sums[s]);
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(LORA_THREADS)
    lora_linear_h_f32(const __grid_constant__ LoraPass shape) {
    pass<true, false, true>(shape);
}

extern "C" __global__ void __launch_bounds__(LORA_THREADS)
    lora_linear_dh_f32(const __grid_constant__ LoraPass shape) {
    pass<true, false, false>(shape);
}

// Without the 1, the compiler spills on sm_80 to fit one block more.
extern "C" __global__ void __launch_bounds__(LORA_THREADS, 1)
    lora_linear_dh_db_f32(const __grid_constant__ LoraPass shape) {
    pass<true, true, false>(shape);
}

extern "C" __global__ void __launch_bounds__(LORA_THREADS)
    lora_linear_da_f32(const __grid_constant__ LoraPass shape) {
    pass<false, true, true>(shape);
}
