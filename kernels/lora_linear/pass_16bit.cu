// One pass over activations z [tokens, features] for the low-rank side of a linear layer, f16 and bf16 on
// tensor cores
//
//   lora_linear_h      H  = drop(X) . A^T                         z = X, sums over features
//   lora_linear_dh     dH = scaling dY . B                        z = dY, sums over features
//   lora_linear_dh_db  dH = scaling dY . B, dB = scaling dY^T . H z = dY, both sums at once
//   lora_linear_da     dA = dH^T . drop(X)                        z = X, sums over tokens
//
// Layouts   as in pass_f32.cu, but for z: wide, tall and the partial sums are f32.
// Launch    LORA_THREADS threads per block_tokens (at most LORA_PASS_TOKENS) x block_features of z and
//           LORA_PASS_RANKS of a projection's rank; grid (projections x rank blocks, features, tokens).
//           Blocks that share a part of z are neighbours, so it comes from memory once.
// Shared    tiles of TOKENS x FEATURES of z in a ring, filled by asynchronous copies; wide for two
//           columns of tiles and tall for all of the block's tokens, as tf32; 97.5 KB.
// Sums      a block walks down one column of tiles after the other. Sums over features of all of its
//           tokens stay in registers from the first column to the last, sums over tokens from the
//           top of a column to its end. tf32 takes z as it is and three bits more of the low-rank
//           factors than bf16 would, with f32's range.
// Traffic   at least 2 tokens features bytes, the low-rank factors and the partial sums;
//           2 tokens features rank FLOPs per sum.
//
//           features ->      warps, sums over features    warps, sums over tokens
//         +------+------+         +-------+-------+        +---+---+---+---+
//  tokens |  |   |  |   |      16 |   0   |   4   |        |   |   |   |   |
//     |   |  v   |  v   |      16 |   1   |   5   |        | 0 | 1 | 2 |...|
//     v   |  |   |  |   |         |  ...  |  ...  |        |   |   |   |   |
//         +------+------+         +-------+-------+        +---+---+---+---+
//          a block's tiles            one tile                one tile
#include "abi.h"
#include "lora_linear/dropout.cuh"
#include "lora_linear/simt.cuh"
#include "mma.cuh"

constexpr int TOKENS = LORA_PASS_TILE_TOKENS, FEATURES = LORA_PASS_TILE_FEATURES, STAGES = 3;
constexpr int RANKS = LORA_PASS_RANKS;
constexpr int N = RANKS / 8;                       // fragments along the rank
constexpr int COLUMN = LORA_PASS_TOKENS / TOKENS;  // tiles in a column, at most
constexpr int ROW_BYTES = FEATURES * 2, TILE_BYTES = TOKENS * ROW_BYTES;
constexpr int HALF = FEATURES / 2;

static_assert(TOKENS == 64 && FEATURES == 128 && LORA_THREADS == 256, "as the warps are laid out");

// [rank][feature] and [rank][token]. Rows are 8 words past a multiple of 32: a half-warp reads two words each
// of four rows from different banks.
using Wide = uint32_t[RANKS][FEATURES + 8];
using Tall = uint32_t[RANKS][LORA_PASS_TOKENS + 8];

struct Shared {
    unsigned char ring[STAGES][TILE_BYTES];
    Wide wide[2];
    Tall tall;
};
static_assert(sizeof(Shared) == LORA_PASS_SHARED, "what the launcher asks for");

// The activations that a block reads.
template <typename T> struct Activations {
    const T *data;
    uint32_t tokens, features;
    bool aligned; // rows are whole chunks of 16 bytes, at multiples of 16

    __device__ explicit Activations(const LoraPass &pass)
        : data(reinterpret_cast<const T *>(pass.z)), tokens(pass.tokens), features(pass.features),
          aligned(pass.z % 16 == 0 && pass.features % 8 == 0) {}

    // Begins to fill a tile, with zeros beyond the edges.
    __device__ void load(uint32_t tile, uint32_t token0, uint32_t feature0) const {
        constexpr int CHUNKS = FEATURES / 8;
        for (int i = threadIdx.x; i < TOKENS * CHUNKS; i += LORA_THREADS) {
            int row = i / CHUNKS, chunk = i % CHUNKS;
            uint32_t token = token0 + row, feature = feature0 + chunk * 8;
            uint32_t present = token < tokens && feature < features ? features - feature : 0;
            const T *from = data + (size_t)token * features + feature;
            uint32_t to = tile + swizzled<ROW_BYTES>(row, chunk);
            if (aligned)
                copy_async(to, from, present > 0);
            else
                store_shared(to, gather(from, present));
        }
    }

    // Zeros in a tile what the dropout does not keep.
    __device__ void drop(uint32_t tile, uint32_t token0, uint32_t feature0, const LoraDropout &dropout,
                         uint32_t step) const {
        constexpr int CHUNKS = FEATURES / 8;
        for (int i = threadIdx.x; i < TOKENS * CHUNKS; i += LORA_THREADS) {
            int row = i / CHUNKS, chunk = i % CHUNKS;
            uint64_t index = (uint64_t)(token0 + row) * features + feature0 + chunk * 8;
            uint32_t kept = kept4(dropout, step, index) | kept4(dropout, step, index + 4) << 4;
            auto words = [&](uint32_t pair) { return (kept >> pair & 1 ? 0xffffu : 0) | (kept >> pair & 2 ? 0xffff0000u : 0); };
            uint32_t place = tile + swizzled<ROW_BYTES>(row, chunk);
            uint4 v = load_shared(place);
            store_shared(place, make_uint4(v.x & words(0), v.y & words(2), v.z & words(4), v.w & words(6)));
        }
    }
};

// `down`: wide is held [rank, features], as A is.
template <bool down> __device__ void load_wide(Wide &slice, const Matrix &wide, uint32_t feature0, uint32_t rank0) {
#pragma unroll
    for (int j = 0; j < RANKS * FEATURES / 4 / (int)LORA_THREADS; ++j) {
        int i = threadIdx.x + j * LORA_THREADS;
        int rank = down ? i / (FEATURES / 4) : i % (RANKS / 4) * 4;
        int feature = down ? i % (FEATURES / 4) * 4 : i / (RANKS / 4);
        float4 v = down ? wide.load4(rank0 + rank, feature0 + feature) : wide.load4(feature0 + feature, rank0 + rank);
#pragma unroll
        for (int k = 0; k < 4; ++k) slice[down ? rank : rank + k][down ? feature + k : feature] = to_tf32(at(v, k));
    }
}

__device__ void load_tall(Tall &slice, const Matrix &tall, uint32_t token0, uint32_t tokens, uint32_t rank0) {
    for (int i = threadIdx.x; i < tokens * RANKS / 4; i += LORA_THREADS) {
        int token = i / (RANKS / 4), rank = i % (RANKS / 4) * 4;
        float4 v = tall.load4(token0 + token, rank0 + rank);
        for (int k = 0; k < 4; ++k) slice[rank + k][token] = to_tf32(at(v, k));
    }
}

// sums[n] += a fragment of z of 16 rows and 16 of what is summed over . `factor`, which is held [rank, summed]
// from the fragment's first on.
template <typename T, int STRIDE>
__device__ void add_fragment(float (&sums)[N][4], const uint32_t (&z)[4], const uint32_t *factor) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        // Word t of a row of z is two of what is summed over, 2t and 2t + 1: they count as words t and t + 4.
        uint32_t a[4];
        unpack_tf32<T>(z[2 * half], a[0], a[2]);
        unpack_tf32<T>(z[2 * half + 1], a[1], a[3]);
#pragma unroll
        for (int n = 0; n < N; ++n) {
            uint2 b = *reinterpret_cast<const uint2 *>(factor + (n * 8 + lane / 4) * STRIDE + half * 8 + lane % 4 * 2);
            multiply(Tf32(), sums[n], a, b.x, b.y);
        }
    }
}

// Writes two neighbours of a row of a partial sum [rows, rank], as far as they exist.
__device__ void store_pair(float *out, uint32_t rows, uint32_t rank, uint32_t row, uint32_t r, float first,
                           float second) {
    if (row >= rows || r >= rank) return;
    float *to = out + (size_t)row * rank + r;
    if (rank % 2 == 0) {
        *reinterpret_cast<float2 *>(to) = make_float2(first, second);
    } else {
        to[0] = first;
        if (r + 1 < rank) to[1] = second;
    }
}

// `down`: wide and the sums over tokens are held [rank, features], as A is.
template <typename T, bool over_features, bool over_tokens, bool down>
__device__ void pass(const LoraPass &pass) {
    extern __shared__ __align__(128) unsigned char dynamic[];
    Shared &shared = *reinterpret_cast<Shared *>(dynamic);
    const LoraSide &side = pass.sides[blockIdx.x / pass.rank_blocks];
    uint32_t rank0 = blockIdx.x % pass.rank_blocks * RANKS, rank = side.rank;
    if (rank0 >= rank) return;

    uint32_t tokens = pass.tokens, features = pass.features;
    uint32_t token_begin = blockIdx.z * pass.block_tokens;
    uint32_t feature_begin = blockIdx.y * pass.block_features;
    int height = (min(pass.block_tokens, tokens - token_begin) + TOKENS - 1) / TOKENS;
    uint32_t width = (min(pass.block_features, features - feature_begin) + FEATURES - 1) / FEATURES;
    bool dropped = down && side.dropout.probability > 0;  // of X alone
    float kept = dropped ? side.dropout.kept : 1.0f;
    uint32_t mask_step = step_of(side.dropout);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

    Activations<T> z(pass);
    Matrix wide = down ? Matrix(side.wide, rank, features) : Matrix(side.wide, features, rank);
    uint32_t ring = shared_address(shared.ring);
    int next_row = 0;
    uint32_t next_column = 0;
    auto load_next = [&](int stage) {
        if (next_column < width)
            z.load(ring + stage * TILE_BYTES, token_begin + next_row * TOKENS, feature_begin + next_column * FEATURES);
        commit_copies();
        if (++next_row == height) next_row = 0, ++next_column;
    };
    for (int stage = 0; stage < STAGES - 1; ++stage) load_next(stage);

    if (over_features) load_wide<down>(shared.wide[0], wide, feature_begin, rank0);
    if (over_tokens)
        load_tall(shared.tall, Matrix(side.tall, tokens, rank), token_begin, height * TOKENS, rank0);

    // Where the lane's rows begin in a tile: 16 tokens and half of the features, or 16 features.
    uint32_t row_begin = swizzled<ROW_BYTES>(warp % 4 * 16 + lane % 16, warp / 4 * (HALF / 8) + lane / 16);
    uint32_t column_begin = swizzled<ROW_BYTES>(lane % 8 + lane / 16 * 8, warp * 2 + lane / 8 % 2);
    float row_sums[COLUMN][N][4] = {};
    int stage = 0;

    for (uint32_t column = 0; column < width; ++column) {
        uint32_t feature0 = feature_begin + column * FEATURES;
        float column_sums[N][4] = {};
#pragma unroll(over_features ? COLUMN : 1)
        for (int row = 0; row < COLUMN; ++row) {
            if (row < height) {
                wait_for_copies<STAGES - 2>();
                __syncthreads(); // this tile has landed, and everybody is done with the one before
                load_next(stage == 0 ? STAGES - 1 : stage - 1);
                if (over_features && row == 0 && column + 1 < width)
                    load_wide<down>(shared.wide[(column + 1) % 2], wide, feature0 + FEATURES, rank0);
                uint32_t tile = ring + stage * TILE_BYTES;
                stage = stage + 1 == STAGES ? 0 : stage + 1;
                if (dropped) {
                    z.drop(tile, token_begin + row * TOKENS, feature0, side.dropout, mask_step);
                    __syncthreads();
                }
                uint32_t fragment[4];
                if (over_features) {
    #pragma unroll
                    for (int step = 0; step < HALF / 16; ++step) {
                        load_matrices(fragment, tile + (row_begin ^ step * 32));
                        add_fragment<T, FEATURES + 8>(row_sums[row], fragment,
                                                      &shared.wide[column % 2][0][warp / 4 * HALF + step * 16]);
                    }
                }
                if (over_tokens) {
    #pragma unroll
                    for (int step = 0; step < TOKENS / 16; ++step) {
                        load_matrices_transposed(fragment, tile + column_begin + step * 16 * ROW_BYTES);
                        add_fragment<T, LORA_PASS_TOKENS + 8>(column_sums, fragment,
                                                              &shared.tall[0][row * TOKENS + step * 16]);
                    }
                }
            }
        }
        if (over_tokens) {
            float *out = reinterpret_cast<float *>(side.column_partials) + (size_t)blockIdx.z * features * rank;
#pragma unroll
            for (int n = 0; n < N; ++n)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    uint32_t feature = feature0 + warp * 16 + lane / 4 + half * 8;
                    uint32_t r = rank0 + n * 8 + lane % 4 * 2;
                    float first = kept * column_sums[n][2 * half], second = kept * column_sums[n][2 * half + 1];
                    if (!down) {
                        store_pair(out, features, rank, feature, r, first, second);
                    } else if (feature < features) {
                        if (r < rank) out[(size_t)r * features + feature] = first;
                        if (r + 1 < rank) out[(size_t)(r + 1) * features + feature] = second;
                    }
                }
        }
    }

    if constexpr (over_features) {
        // The two halves of the features, through the ring.
        wait_for_copies<0>();
        __syncthreads();
        float *halves = reinterpret_cast<float *>(shared.ring);
        float *out = reinterpret_cast<float *>(side.row_partials) + (size_t)blockIdx.y * tokens * rank;
        auto place = [&](int row, int n, int k) { return ((row * N + n) * 4 + k) * 128 + threadIdx.x % 128; };
        static_assert(COLUMN * N * 4 * 128 * sizeof(float) <= sizeof(shared.ring), "the ring holds half of the sums");
        if (warp >= 4) {
#pragma unroll
            for (int row = 0; row < COLUMN; ++row)
#pragma unroll
                for (int n = 0; n < N; ++n)
#pragma unroll
                    for (int k = 0; k < 4; ++k) halves[place(row, n, k)] = row_sums[row][n][k];
        }
        __syncthreads();
        if (warp < 4) {
#pragma unroll
            for (int row = 0; row < COLUMN; ++row)
#pragma unroll
                for (int n = 0; n < N; ++n)
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        uint32_t token = token_begin + row * TOKENS + warp * 16 + lane / 4 + half * 8;
                        float first = row_sums[row][n][2 * half] + halves[place(row, n, 2 * half)];
                        float second = row_sums[row][n][2 * half + 1] + halves[place(row, n, 2 * half + 1)];
                        if (row < height)
                            store_pair(out, tokens, rank, token, rank0 + n * 8 + lane % 4 * 2, kept * first,
                                       kept * second);
                    }
        }
    }
}

#define PASS(T, storage, name, over_features, over_tokens, down)              \
    extern "C" __global__ void __launch_bounds__(LORA_THREADS, 2)             \
        lora_linear_##name##_##storage(const __grid_constant__ LoraPass shape) { \
        pass<T, over_features, over_tokens, down>(shape);                     \
    }
#define PASSES(T, storage)                     \
    PASS(T, storage, h, true, false, true)     \
    PASS(T, storage, dh, true, false, false)   \
    PASS(T, storage, dh_db, true, true, false) \
    PASS(T, storage, da, false, true, true)

PASSES(__half, f16)
PASSES(__nv_bfloat16, bf16)
