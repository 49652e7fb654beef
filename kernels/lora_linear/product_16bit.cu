// The two products of a linear layer with its low-rank update, f16 and bf16 on tensor cores
//
//   forward  Y  [tokens, out] = X . W^T + scaling H . B^T + bias
//   dx       dX [tokens, in]  = sum over projections of dY . W + drop(dH . A)
//
// Layouts   row-major. left is X [tokens, in] or dY [tokens, out]; right is W [out, in]
//           in both: forward reads it along rows (depth = in), dx along columns (depth = out). They
//           and the result have one type, or W is NF4 (nf4/source.cuh). left_low is H or dH [tokens, rank] f32; right_low is
//           B [out, rank] or A [rank, in], f32; bias [out] f32 or none.
// Launch    GEMM_THREADS threads per tile of the result (gemm.cuh), as many blocks as tiles. _large
//           and _small need rows that are whole chunks of 16 bytes and start at multiples of 16.
// Update    `rank` more columns of depth in the same tile, as tf32: its factors are f32 in memory,
//           and tf32 keeps f32's range, where f16 would lose small gradients in dH, with three more
//           bits than bf16. It costs twice as much per column as 16 bits do: 32 columns of depth
//           at rank 16. Its slices use the stage that is free while the first ones of the frozen
//           product are on their way.
// Shared    GEMM_STAGES slices of GEMM_DEPTH of both factors: 96 KB for the large tile, 48 KB for
//           the small one.
// Traffic   at least 2 (rows depth + cols depth + rows cols) bytes; it moves left cols / COLS times
//           and right rows / ROWS times, mostly from the second-level cache.
//           2 rows cols (depth + rank) FLOPs on tensor cores.
#include "abi.h"
#include "gemm.cuh"
#include "lora_linear/dropout.cuh"
#include "lora_linear/simt.cuh"
#include "nf4/source.cuh"

constexpr int RANKS = 16; // of a low-rank slice
using LowRankSlice = EdgeMajor<RANKS * sizeof(float)>;

// slice[edge][r] = tf32(scaling factor[edge0 + edge][rank0 + r])
template <int EDGE>
__device__ void load_rows(uint32_t slice, const Matrix &factor, uint32_t edge0, uint32_t rank0, float scaling) {
    for (int i = threadIdx.x; i < EDGE * RANKS / 4; i += GEMM_THREADS) {
        int edge = i / (RANKS / 4), chunk = i % (RANKS / 4);
        float4 v = factor.load4(edge0 + edge, rank0 + chunk * 4);
        store_shared(slice + swizzled<RANKS * sizeof(float)>(edge, chunk),
                     make_uint4(to_tf32(v.x * scaling), to_tf32(v.y * scaling), to_tf32(v.z * scaling),
                                to_tf32(v.w * scaling)));
    }
}

// slice[edge][r] = tf32(factor[rank0 + r][edge0 + edge])
template <int EDGE>
__device__ void load_columns(uint32_t slice, const Matrix &factor, uint32_t edge0, uint32_t rank0) {
    for (int i = threadIdx.x; i < EDGE * RANKS / 4; i += GEMM_THREADS) {
        int edge = i % EDGE, chunk = i / EDGE;
        uint32_t values[4];
#pragma unroll
        for (int r = 0; r < 4; ++r) values[r] = to_tf32(factor.load(rank0 + chunk * 4 + r, edge0 + edge));
        store_shared(slice + swizzled<RANKS * sizeof(float)>(edge, chunk),
                     make_uint4(values[0], values[1], values[2], values[3]));
    }
}

// Bits 4j to 4j + 3 of mask[i]: which of sums[i][j] the dropout keeps.
template <typename Tile>
__device__ void find_kept(uint32_t (&mask)[Tile::M], const Tile &tile, const LoraDropout &dropout, uint32_t cols) {
    static_assert(Tile::N <= 8, "a row of fragments has 32 bits");
    int odd = tile.lane % 2;
    uint32_t step = step_of(dropout);
#pragma unroll
    for (int i = 0; i < Tile::M; ++i) {
        mask[i] = 0;
#pragma unroll 1
        for (int j = 0; j < Tile::N; ++j) {
            // Two lanes hold the same four columns of two rows: each works out one row for both.
            uint64_t index = (uint64_t)(tile.row(i) + 8 * odd) * cols + (tile.col(j) & ~3u);
            uint32_t own = kept4(dropout, step, index);
            uint32_t other = __shfl_xor_sync(0xffffffff, own, 1);
            uint32_t upper = (odd ? other : own) >> 2 * odd & 3, lower = (odd ? own : other) >> 2 * odd & 3;
            mask[i] |= (upper | lower << 2) << 4 * j;
        }
    }
}

// sums += drop(scaling left_low . right_low), through the last stage.
template <typename Tile, bool right_edge_major>
__device__ void add_low_rank(Tile &tile, const LoraTerm &term, uint32_t rows, uint32_t cols) {
    static_assert((Tile::ROWS + Tile::COLS) * RANKS * sizeof(float) <= Tile::STAGE_BYTES, "a stage is enough");
    uint32_t left_place = tile.left_place(Tile::STAGES - 1);
    uint32_t right_place = left_place + Tile::ROWS * RANKS * sizeof(float);
    uint32_t left_begin = left_place + LowRankSlice::left_begin(tile.warp_row, tile.lane);
    uint32_t right_begin = right_place + LowRankSlice::right_begin(tile.warp_col, tile.lane);
    Matrix left(term.left_low, rows, term.rank);
    Matrix right = right_edge_major ? Matrix(term.right_low, cols, term.rank) : Matrix(term.right_low, term.rank, cols);

    bool masked = !right_edge_major && term.dropout.probability > 0;
    uint32_t mask[Tile::M];
    if (masked) find_kept(mask, tile, term.dropout, cols);

    for (uint32_t rank0 = 0; rank0 < term.rank; rank0 += RANKS) {
        load_rows<Tile::ROWS>(left_place, left, tile.row0, rank0, term.scaling);
        if (right_edge_major)
            load_rows<Tile::COLS>(right_place, right, tile.col0, rank0, 1.0f);
        else
            load_columns<Tile::COLS>(right_place, right, tile.col0, rank0);
        __syncthreads();
        typename Tile::Fragments fragments[2];
#pragma unroll
        for (int step = 0; step < 2; ++step) {
#pragma unroll
            for (int i = 0; i < Tile::M; ++i)
                LowRankSlice::read_left(fragments[step].left[i], left_begin, i, step);
#pragma unroll
            for (int j = 0; j < Tile::N / 2; ++j)
                LowRankSlice::read_right(fragments[step].right[j], right_begin, j, step);
        }
        if (!masked) {
#pragma unroll
            for (int step = 0; step < 2; ++step) tile.template multiply_all<Tf32>(fragments[step]);
        } else {
            // A second set of sums would not fit the registers: one fragment at a time.
#pragma unroll
            for (int i = 0; i < Tile::M; ++i)
#pragma unroll
                for (int j = 0; j < Tile::N; ++j) {
                    float part[4] = {};
#pragma unroll
                    for (int step = 0; step < 2; ++step)
                        multiply(Tf32(), part, fragments[step].left[i], fragments[step].right[j / 2][j % 2 * 2],
                                 fragments[step].right[j / 2][j % 2 * 2 + 1]);
#pragma unroll
                    for (int k = 0; k < 4; ++k)
                        if (mask[i] >> (4 * j + k) & 1) tile.sums[i][j][k] += term.dropout.kept * part[k];
                }
        }
        __syncthreads(); // the next slice, or the product, takes the stage over
    }
}

template <typename T, typename Tile, bool right_edge_major, bool aligned, bool nf4>
__device__ void product(const LoraProduct &product, const float *bias, T *out) {
    extern __shared__ __align__(128) unsigned char ring[];
    uint32_t rows = product.rows, cols = product.cols;
    uint2 corner = own_tile<Tile>(rows, cols);
    Tile tile(ring, corner.x, corner.y);

    __shared__ float quant_map[16];
    if (nf4) {
        if (threadIdx.x < 16) quant_map[threadIdx.x] = NF4_QUANT_MAP[threadIdx.x];
        __syncthreads();
    }

    for (uint32_t i = 0; i < product.count; ++i) {
        const LoraTerm &term = product.terms[i];
        using Left = FromEdgeMajor<T, Tile::ROWS, Tile::DEPTH, aligned>;
        Left left(term.left, rows, term.depth, tile.row0);
        auto add = [&](auto right) {
            tile.begin(left, right);
            if (term.rank) add_low_rank<Tile, right_edge_major>(tile, term, rows, cols);
            tile.add(left, right, term.depth);
        };
        if constexpr (nf4)
            add(FromNf4<T, Tile::COLS, Tile::DEPTH, aligned, right_edge_major>(term.quantized, quant_map, cols,
                                                                               term.depth, tile.col0));
        else if constexpr (right_edge_major)
            add(FromEdgeMajor<T, Tile::COLS, Tile::DEPTH, aligned>(term.right, cols, term.depth, tile.col0));
        else
            add(FromDepthMajor<T, Tile::COLS, Tile::DEPTH, aligned>(term.right, cols, term.depth, tile.col0));
    }
    tile.template store<aligned>(out, rows, cols, bias);
}

#define PRODUCT(prefix, nf4, T, storage, name, Tile, blocks, aligned)                                    \
    extern "C" __global__ void __launch_bounds__(GEMM_THREADS, blocks) prefix##_forward_##storage##_##name( \
        const __grid_constant__ LoraProduct shape, const float *bias, T *y) {                            \
        product<T, Tile<T>, true, aligned, nf4>(shape, bias, y);                                         \
    }                                                                                                    \
    extern "C" __global__ void __launch_bounds__(GEMM_THREADS, blocks) prefix##_dx_##storage##_##name(   \
        const __grid_constant__ LoraProduct shape, T *dx) {                                              \
        product<T, Tile<T>, false, aligned, nf4>(shape, nullptr, dx);                                    \
    }
#define PRODUCTS(prefix, nf4, T, storage)                           \
    PRODUCT(prefix, nf4, T, storage, large, LargeTile, 1, true)     \
    PRODUCT(prefix, nf4, T, storage, small, SmallTile, 2, true)     \
    PRODUCT(prefix, nf4, T, storage, unaligned, SmallTile, 2, false)

PRODUCTS(lora_linear, false, __half, f16)
PRODUCTS(lora_linear, false, __nv_bfloat16, bf16)
PRODUCTS(nf4_lora_linear, true, __half, f16)
PRODUCTS(nf4_lora_linear, true, __nv_bfloat16, bf16)
