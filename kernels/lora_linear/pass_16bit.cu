// One pass over activations z [tokens, features] for the low-rank side of a linear layer, f16 and bf16 on
// tensor cores
//
//   lora_linear_h      H  = drop(X) . A^T                         z = X, sums over features
//   lora_linear_dh     dH = scaling dY . B                        z = dY, sums over features
//   lora_linear_dh_db  dH = scaling dY . B, dB = scaling dY^T . H z = dY, both sums at once
//   lora_linear_da     dA = dH^T . drop(X)                        z = X, sums over tokens
//
// Layouts   as in pass_f32.cu, but for z: wide, tall and the partial sums are f32.
// Launch    LORA_THREADS threads per block_tokens x block_features of z, at most LORA_PASS_TOKENS x
//           LORA_PASS_FEATURES, and LORA_PASS_RANKS of a projection's rank; grid (projections x rank blocks,
//           features, tokens). Blocks that share a part of z are neighbours, so it comes from memory once.
// Shared    tiles of z in a ring, filled by asynchronous copies; the block's part of wide and tall, as tf32.
//           80 KB (da) to 96 KB (dh_db): two blocks fit a multiprocessor of an H100, one fits any from sm_80 on.
// Sums      with sums over features, a block walks along one row of tiles after the other: those sums stay in
//           registers to the end of the row, sums over tokens, of all its columns, to the end of the block.
//           Without, it walks down the columns, with the sums of one. tf32 takes z as it is and three bits more
//           of the low-rank factors than bf16 would, with f32's range.
// Traffic   at least 2 tokens features bytes, the low-rank factors and the partial sums;
//           2 tokens features rank FLOPs per sum.
//
// Which warp sums up what of a tile:
//
//     h, dh: 128 x 64          dh_db: 64 x 128               da: 64 x 128
//         +-------+            +---------------+            +---+---+---+---+
//      16 |   0   |         16 |       0       |            |   |   |   |   |
//      16 |   1   |         16 |      ...      |   and      |   |   |   |   |
//         |  ...  |         16 |       3       |            | 0 | 1 |...| 7 |
//      16 |   7   |            +---+---+---+---+            |   |   |   |   |
//         +-------+            | 4 | 5 | 6 | 7 |            |   |   |   |   |
//                              +---+---+---+---+            +---+---+---+---+
//                               32 features each             16 features each
#include "abi.h"
#include "lora_linear/dropout.cuh"
#include "lora_linear/simt.cuh"
#include "mma.cuh"
#include <type_traits>

constexpr int STAGES = 3;
constexpr int RANKS = LORA_PASS_RANKS;
constexpr int N = RANKS / 8; // fragments along the rank
constexpr int PASS_WARPS = LORA_THREADS / 32;

// ---- low-rank factors in shared memory, as tf32 ----

// A factor of which SUMMED numbers are summed over, that is held [rank, summed] in memory, as A is.
template <int SUMMED> struct RankMajor {
    // A half-warp reads two words each of four rows: 8 words past a multiple of 32, from different banks.
    static constexpr int ROW = SUMMED + 8;
    uint32_t words[RANKS * ROW];

    // `count` numbers from `first` on, zeros beyond the edges.
    __device__ void load(const Matrix &factor, uint32_t first, uint32_t count, uint32_t rank0) {
#pragma unroll 8
        for (uint32_t i = threadIdx.x; i < RANKS * SUMMED / 4; i += LORA_THREADS) {
            uint32_t rank = i / (SUMMED / 4), summed = i % (SUMMED / 4) * 4;
            if (summed >= count) continue;
            float4 v = factor.load4(rank0 + rank, first + summed);
            *reinterpret_cast<uint4 *>(&words[rank * ROW + summed]) = tf32(v);
        }
    }

    // The words of a fragment: of rank n * 8 + lane / 4, the numbers at + 2 (lane % 4) and the next.
    __device__ uint2 read(int n, int at) const {
        int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
        return *reinterpret_cast<const uint2 *>(&words[(n * 8 + g) * ROW + at + 2 * t]);
    }

    static __device__ uint4 tf32(float4 v) { return make_uint4(to_tf32(v.x), to_tf32(v.y), to_tf32(v.z), to_tf32(v.w)); }
};

// One that is held [summed, rank], as B, H and dH are.
template <int SUMMED> struct SummedMajor {
    static_assert(RANKS == 16, "two rows are all banks");
    uint32_t words[SUMMED * RANKS];

    // A warp reads, of eight rows, the even or the odd ones, and eight ranks of each: rows trade places with
    // neighbours and halves with each other, so that those 32 words lie in different banks.
    static __device__ int place(int summed, int rank) {
        return (summed ^ summed / 4 % 2) * RANKS + (rank ^ summed / 2 % 2 * 8);
    }

    __device__ void load(const Matrix &factor, uint32_t first, uint32_t count, uint32_t rank0) {
#pragma unroll 8
        for (uint32_t i = threadIdx.x; i < count * RANKS / 4; i += LORA_THREADS) {
            uint32_t summed = i / (RANKS / 4), rank = i % (RANKS / 4) * 4;
            float4 v = factor.load4(first + summed, rank0 + rank);
            *reinterpret_cast<uint4 *>(&words[place(summed, rank)]) = RankMajor<SUMMED>::tf32(v);
        }
    }

    __device__ uint2 read(int n, int at) const {
        int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
        return make_uint2(words[place(2 * t, n * 8 + g) + at * RANKS], words[place(2 * t + 1, n * 8 + g) + at * RANKS]);
    }
};

// What a pass has in shared memory, of the parts that it needs.
template <int STAGE_BYTES> struct Ring {
    unsigned char ring[STAGES][STAGE_BYTES];
};
template <typename Wide> struct WithWide {
    Wide wide;
};
template <> struct WithWide<void> {};
template <typename Tall> struct WithTall {
    Tall tall;
};
template <> struct WithTall<void> {};

// ---- the pass ----

// The activations that a block reads, in tiles.
template <typename T, int TOKENS, int FEATURES> struct Activations {
    static constexpr int CHUNKS = FEATURES / 8;
    static constexpr int ROW_BYTES = FEATURES * sizeof(T);

    static constexpr int STRIDE = LORA_THREADS / CHUNKS; // rows between a thread's copies
    static_assert(STRIDE % 8 == 0, "every copy has the same place in the swizzle");

    const T *own; // the thread's first chunk of the first tile
    uint32_t tokens, features;
    bool aligned; // rows are whole chunks of 16 bytes, at multiples of 16

    __device__ explicit Activations(const LoraPass &pass)
        : own(reinterpret_cast<const T *>(pass.z) + (size_t)(threadIdx.x / CHUNKS) * pass.features +
              threadIdx.x % CHUNKS * 8),
          tokens(pass.tokens), features(pass.features), aligned(pass.z % 16 == 0 && pass.features % 8 == 0) {}

    // Begins to fill a tile, with zeros beyond the edges.
    __device__ void load(uint32_t tile, uint32_t token0, uint32_t feature0) const {
        uint32_t token = token0 + threadIdx.x / CHUNKS, feature = feature0 + threadIdx.x % CHUNKS * 8;
        uint32_t present = feature < features ? features - feature : 0;
        const T *first = own + (size_t)token0 * features + feature0;
        uint32_t to = tile + swizzled<ROW_BYTES>(threadIdx.x / CHUNKS, threadIdx.x % CHUNKS);
#pragma unroll
        for (int i = 0; i < TOKENS / STRIDE; ++i) {
            const T *from = first + (uint64_t)features * (i * STRIDE);
            bool exists = present > 0 && token + i * STRIDE < tokens;
            if (aligned)
                copy_async(to + i * STRIDE * ROW_BYTES, from, exists);
            else
                store_shared(to + i * STRIDE * ROW_BYTES, gather(from, exists ? present : 0));
        }
    }

    // Zeros in a tile what the dropout does not keep.
    __device__ void drop(uint32_t tile, uint32_t token0, uint32_t feature0, const LoraDropout &dropout,
                         uint32_t step) const {
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

// sums[n] += a fragment of z of 16 rows and 16 of what is summed over . `factor`, from `at` on.
template <typename T, typename Factor>
__device__ void add_fragment(float (&sums)[N][4], const uint32_t (&z)[4], const Factor &factor, int at) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        // Word t of a row of z is two of what is summed over, 2t and 2t + 1: they count as words t and t + 4.
        uint32_t a[4];
        unpack_tf32<T>(z[2 * half], a[0], a[2]);
        unpack_tf32<T>(z[2 * half + 1], a[1], a[3]);
#pragma unroll
        for (int n = 0; n < N; ++n) {
            uint2 b = factor.read(n, at + half * 8);
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
template <typename T, bool over_features, bool over_tokens, bool down> struct Pass {
    // Of a tile.
    static constexpr int TOKENS = over_tokens ? 64 : 128, FEATURES = over_tokens ? 128 : 64;
    static constexpr int ROW_BYTES = FEATURES * sizeof(T);
    // Warps that sum over features, 16 tokens each; the others, or all, sum over tokens, FRAGMENTS times 16 features.
    static constexpr int ROW_WARPS = over_features ? TOKENS / 16 : 0;
    static constexpr int FRAGMENTS = over_tokens ? FEATURES / 16 / (PASS_WARPS - ROW_WARPS) : 1;
    // Of a block, at most: tokens that are summed over, and columns of tiles.
    static constexpr int MAX_TOKENS = over_features ? LORA_PASS_TOKENS / 2 : LORA_PASS_TOKENS;
    static constexpr int COLUMNS = LORA_PASS_FEATURES / FEATURES;

    using Wide = std::conditional_t<down, RankMajor<LORA_PASS_FEATURES>, SummedMajor<LORA_PASS_FEATURES>>;
    struct Shared : Ring<TOKENS * ROW_BYTES>,
                    WithWide<std::conditional_t<over_features, Wide, void>>,
                    WithTall<std::conditional_t<over_tokens, SummedMajor<MAX_TOKENS>, void>> {};

    const LoraPass &pass;
    Shared &shared;
    const LoraSide &side;
    uint32_t rank0;
    uint32_t token_begin, feature_begin;
    uint32_t height, width; // in tiles
    bool dropped;
    uint32_t mask_step;
    Activations<T, TOKENS, FEATURES> z;
    int lane, warp;
    // The tile that is to be loaded, and the stage of the one that is multiplied.
    uint32_t next_row = 0, next_column = 0;
    int stage = 0;

    __device__ Pass(const LoraPass &pass, unsigned char *dynamic)
        : pass(pass), shared(*reinterpret_cast<Shared *>(dynamic)), side(pass.sides[blockIdx.x / pass.rank_blocks]),
          rank0(blockIdx.x % pass.rank_blocks * RANKS), token_begin(blockIdx.z * pass.block_tokens),
          feature_begin(blockIdx.y * pass.block_features), dropped(down && side.dropout.probability > 0), // of X alone
          mask_step(step_of(side.dropout)), z(pass), lane(threadIdx.x % 32), warp(threadIdx.x / 32) {
        height = (min(pass.block_tokens, pass.tokens - token_begin) + TOKENS - 1) / TOKENS;
        width = (min(pass.block_features, pass.features - feature_begin) + FEATURES - 1) / FEATURES;
    }

    __device__ float kept() const { return dropped ? side.dropout.kept : 1.0f; }

    __device__ void load_next(int stage) {
        if (next_row < height && next_column < width)
            z.load(shared_address(shared.ring[stage]), token_begin + next_row * TOKENS,
                   feature_begin + next_column * FEATURES);
        commit_copies();
        if (over_features) {
            if (++next_column == width) next_column = 0, ++next_row;
        } else {
            if (++next_row == height) next_row = 0, ++next_column;
        }
    }

    // The address of the tile, which is the next in order.
    __device__ uint32_t tile(uint32_t row, uint32_t column) {
        wait_for_copies<STAGES - 2>();
        __syncthreads(); // it has landed, and everybody is done with the one before
        load_next(stage == 0 ? STAGES - 1 : stage - 1);
        uint32_t tile = shared_address(shared.ring[stage]);
        stage = stage + 1 == STAGES ? 0 : stage + 1;
        if (dropped) {
            z.drop(tile, token_begin + row * TOKENS, feature_begin + column * FEATURES, side.dropout, mask_step);
            __syncthreads();
        }
        return tile;
    }

    // The warp's 16 tokens and the tile's features.
    __device__ void add_over_features(float (&sums)[N][4], uint32_t tile, uint32_t column) const {
        uint32_t begin = swizzled<ROW_BYTES>(warp * 16 + lane % 16, lane / 16);
#pragma unroll
        for (int step = 0; step < FEATURES / 16; ++step) {
            uint32_t fragment[4];
            load_matrices(fragment, tile + (begin ^ step % 4 * 32) + step / 4 * 128);
            add_fragment<T>(sums, fragment, shared.wide, column * FEATURES + step * 16);
        }
    }

    // 16 features, and the tile's tokens.
    __device__ void add_over_tokens(float (&sums)[N][4], uint32_t tile, uint32_t row, int feature) const {
        uint32_t begin = swizzled<ROW_BYTES>(lane % 8 + lane / 16 * 8, feature / 8 + lane / 8 % 2);
#pragma unroll
        for (int step = 0; step < TOKENS / 16; ++step) {
            uint32_t fragment[4];
            load_matrices_transposed(fragment, tile + begin + step * 16 * ROW_BYTES);
            add_fragment<T>(sums, fragment, shared.tall, row * TOKENS + step * 16);
        }
    }

    // The warp's first feature of a fragment, in a tile.
    __device__ int feature_of(int fragment) const { return ((warp - ROW_WARPS) * FRAGMENTS + fragment) * 16; }

    __device__ void store_over_features(const float (&sums)[N][4], uint32_t row) const {
        float *out = reinterpret_cast<float *>(side.row_partials) + (size_t)blockIdx.y * pass.tokens * side.rank;
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                store_pair(out, pass.tokens, side.rank, token_begin + row * TOKENS + warp * 16 + lane / 4 + half * 8,
                           rank0 + n * 8 + lane % 4 * 2, kept() * sums[n][2 * half], kept() * sums[n][2 * half + 1]);
    }

    __device__ void store_over_tokens(const float (&sums)[N][4], uint32_t column, int first_feature) const {
        uint32_t features = pass.features, rank = side.rank;
        float *out = reinterpret_cast<float *>(side.column_partials) + (size_t)blockIdx.z * features * rank;
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                uint32_t feature = feature_begin + column * FEATURES + first_feature + lane / 4 + half * 8;
                uint32_t r = rank0 + n * 8 + lane % 4 * 2;
                float first = kept() * sums[n][2 * half], second = kept() * sums[n][2 * half + 1];
                if (!down) {
                    store_pair(out, features, rank, feature, r, first, second);
                } else if (feature < features) {
                    if (r < rank) out[(size_t)r * features + feature] = first;
                    if (r + 1 < rank) out[(size_t)(r + 1) * features + feature] = second;
                }
            }
    }

    __device__ void along_rows() {
        float column_sums[over_tokens ? COLUMNS : 1][FRAGMENTS][N][4] = {};
        for (uint32_t row = 0; row < height; ++row) {
            float row_sums[N][4] = {};
#pragma unroll(over_tokens ? COLUMNS : 1)
            for (int column = 0; column < COLUMNS; ++column)
                if (column < width) {
                    uint32_t z_tile = tile(row, column);
                    if (warp < ROW_WARPS) {
                        add_over_features(row_sums, z_tile, column);
                    } else if constexpr (over_tokens) {
#pragma unroll
                        for (int i = 0; i < FRAGMENTS; ++i)
                            add_over_tokens(column_sums[column][i], z_tile, row, feature_of(i));
                    }
                }
            if (warp < ROW_WARPS) store_over_features(row_sums, row);
        }
        if constexpr (over_tokens) {
            if (warp < ROW_WARPS) return;
#pragma unroll
            for (int column = 0; column < COLUMNS; ++column)
#pragma unroll
                for (int i = 0; i < FRAGMENTS; ++i)
                    if (column < width) store_over_tokens(column_sums[column][i], column, feature_of(i));
        }
    }

    __device__ void down_columns() {
        static_assert(over_features || FRAGMENTS == 1, "one set of sums");
        for (uint32_t column = 0; column < width; ++column) {
            float column_sums[N][4] = {};
#pragma unroll 1
            for (uint32_t row = 0; row < height; ++row)
                add_over_tokens(column_sums, tile(row, column), row, feature_of(0));
            store_over_tokens(column_sums, column, feature_of(0));
        }
    }

    __device__ void run() {
        if (rank0 >= side.rank) return;
#pragma unroll 1
        for (int stage = 0; stage < STAGES - 1; ++stage) load_next(stage);
        if constexpr (over_features) {
            Matrix wide = down ? Matrix(side.wide, side.rank, pass.features) : Matrix(side.wide, pass.features, side.rank);
            shared.wide.load(wide, feature_begin, width * FEATURES, rank0);
        }
        if constexpr (over_tokens)
            shared.tall.load(Matrix(side.tall, pass.tokens, side.rank), token_begin, height * TOKENS, rank0);
        if constexpr (over_features) along_rows();
        else down_columns();
    }
};

#define PASS(T, storage, name, over_features, over_tokens, down)                               \
    extern "C" __global__ void __launch_bounds__(LORA_THREADS, 2)                              \
        lora_linear_##name##_##storage(const __grid_constant__ LoraPass shape) {               \
        extern __shared__ __align__(128) unsigned char dynamic[];                              \
        Pass<T, over_features, over_tokens, down>(shape, dynamic).run();                       \
    }
#define PASSES(T, storage)                     \
    PASS(T, storage, h, true, false, true)     \
    PASS(T, storage, dh, true, false, false)   \
    PASS(T, storage, dh_db, true, true, false) \
    PASS(T, storage, da, false, true, true)

static_assert(sizeof(Pass<__half, true, false, true>::Shared) == LORA_PASS_H_SHARED &&
                  sizeof(Pass<__half, true, false, false>::Shared) == LORA_PASS_DH_SHARED &&
                  sizeof(Pass<__half, true, true, false>::Shared) == LORA_PASS_DH_DB_SHARED &&
                  sizeof(Pass<__half, false, true, true>::Shared) == LORA_PASS_DA_SHARED,
              "what the launcher asks for");

PASSES(__half, f16)
PASSES(__nv_bfloat16, bf16)
