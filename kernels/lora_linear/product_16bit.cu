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
//           at rank 16. Its slices pass through the ring before the frozen product's, so they are on
//           their way together.
// Shared    GEMM_STAGES slices of GEMM_DEPTH of both factors: 144 KB for the large tile, 72 KB for
//           the small one.
// Traffic   at least 2 (rows depth + cols depth + rows cols) bytes; it moves left cols / COLS times
//           and right rows / ROWS times, mostly from the second-level cache.
//           2 rows cols (depth + rank) FLOPs on tensor cores.
#include "abi.h"
#include "gemm.cuh"
#include "lora_linear/dropout.cuh"
#include "lora_linear/simt.cuh"
#include "nf4/source.cuh"

constexpr int RANKS = 16; // of a low-rank slice, tf32
constexpr int RANK_BYTES = RANKS * sizeof(float);

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

// The update, drop(scaling left_low . right_low), as slices that pass through the ring before the product's: RANKS of
// the rank at a time, f32 as they are in memory. They become tf32 in registers.
template <typename Tile, bool right_edge_major> struct Update {
    static_assert((Tile::ROWS + Tile::COLS) * RANK_BYTES <= Tile::STAGE_BYTES, "a slice fits a stage");
    static constexpr int LEFT_BYTES = Tile::ROWS * RANK_BYTES;
    using EdgeSlice = EdgeMajor<RANK_BYTES>;

    const LoraTerm &term;
    Matrix left, right;
    uint32_t row0, col0;
    uint32_t count;
    bool masked;
    uint32_t mask[Tile::M];

    __device__ Update(const LoraTerm &term, const Tile &tile, uint32_t rows, uint32_t cols)
        : term(term), left(term.left_low, rows, term.rank),
          right(right_edge_major ? Matrix(term.right_low, cols, term.rank) : Matrix(term.right_low, term.rank, cols)),
          row0(tile.row0), col0(tile.col0), count((term.rank + RANKS - 1) / RANKS),
          masked(!right_edge_major && term.rank > 0 && term.dropout.probability > 0) {
        if (masked) find_kept(mask, tile, term.dropout, cols);
    }

    // Four elements of a factor, zeros beyond its edges.
    static __device__ void copy4(uint32_t to, const Matrix &factor, uint32_t row, uint32_t col) {
        if (factor.aligned) {
            bool exists = row < factor.rows && col < factor.cols;
            copy_async(to, factor.data + (size_t)row * factor.cols + col, exists);
        } else {
            float4 v = factor.load4(row, col);
            store_shared(to, make_uint4(__float_as_uint(v.x), __float_as_uint(v.y), __float_as_uint(v.z),
                                        __float_as_uint(v.w)));
        }
    }

    // slice[edge][r] = factor[edge0 + edge][rank0 + r]
    template <int EDGE>
    static __device__ void load_rows(uint32_t slice, const Matrix &factor, uint32_t edge0, uint32_t rank0) {
#pragma unroll
        for (int i = threadIdx.x; i < EDGE * RANKS / 4; i += GEMM_THREADS) {
            int edge = i / (RANKS / 4), chunk = i % (RANKS / 4);
            copy4(slice + swizzled<RANK_BYTES>(edge, chunk), factor, edge0 + edge, rank0 + chunk * 4);
        }
    }

    // Where four elements of the edge lie in slice[r][edge]: the four ranks of a fragment in different banks.
    static __device__ uint32_t depth_major(int r, int chunk) {
        return r * Tile::COLS * sizeof(float) + (chunk ^ r % 4 * 2) * 16;
    }

    // slice[r][edge] = factor[rank0 + r][edge0 + edge]
    template <int EDGE>
    static __device__ void load_columns(uint32_t slice, const Matrix &factor, uint32_t edge0, uint32_t rank0) {
#pragma unroll
        for (int i = threadIdx.x; i < EDGE * RANKS / 4; i += GEMM_THREADS) {
            int r = i / (EDGE / 4), chunk = i % (EDGE / 4);
            copy4(slice + depth_major(r, chunk), factor, rank0 + r, edge0 + chunk * 4);
        }
    }

    __device__ void load(uint32_t place, uint32_t slice) const {
        load_rows<Tile::ROWS>(place, left, row0, slice * RANKS);
        if (right_edge_major)
            load_rows<Tile::COLS>(place + LEFT_BYTES, right, col0, slice * RANKS);
        else
            load_columns<Tile::COLS>(place + LEFT_BYTES, right, col0, slice * RANKS);
    }

    __device__ void add(Tile &tile, uint32_t place) const {
        uint32_t left_begin = place + EdgeSlice::left_begin(tile.warp_row, tile.lane);
        uint32_t right_begin = place + LEFT_BYTES;
        int g = tile.lane / 4, t = tile.lane % 4;
        if (right_edge_major) right_begin += EdgeSlice::right_begin(tile.warp_col, tile.lane);
        else right_begin += depth_major(t, tile.warp_col / 4 + g / 4) + g % 4 * sizeof(float);
#pragma unroll
        for (int step = 0; step < RANKS / 8; ++step) {
            typename Tile::Fragments fragments;
#pragma unroll
            for (int i = 0; i < Tile::M; ++i) {
                EdgeSlice::read_left(fragments.left[i], left_begin, i, step);
#pragma unroll
                for (int k = 0; k < 4; ++k)
                    fragments.left[i][k] = to_tf32(__uint_as_float(fragments.left[i][k]) * term.scaling);
            }
#pragma unroll
            for (int j = 0; j < Tile::N / 2; ++j) {
                if (right_edge_major) {
                    EdgeSlice::read_right(fragments.right[j], right_begin, j, step);
                } else {
                    // Words of ranks t and t + 4, of two times eight columns.
#pragma unroll
                    for (int k = 0; k < 4; ++k)
                        fragments.right[j][k] =
                            load_shared_word((right_begin ^ (4 * j + k / 2 * 2) % 8 * 16) + (4 * j) / 8 * 128 +
                                             (step * 8 + k % 2 * 4) * Tile::COLS * sizeof(float));
                }
#pragma unroll
                for (int k = 0; k < 4; ++k) fragments.right[j][k] = to_tf32(__uint_as_float(fragments.right[j][k]));
            }
            if (!masked)
                tile.template multiply_all<Tf32>(fragments);
            else
                add_kept(tile, fragments);
        }
    }

    // A second set of sums would not fit the registers: one fragment at a time.
    __device__ void add_kept(Tile &tile, const typename Tile::Fragments &fragments) const {
#pragma unroll
        for (int i = 0; i < Tile::M; ++i)
#pragma unroll
            for (int j = 0; j < Tile::N; ++j) {
                float part[4] = {};
                multiply(Tf32(), part, fragments.left[i], fragments.right[j / 2][j % 2 * 2],
                         fragments.right[j / 2][j % 2 * 2 + 1]);
#pragma unroll
                for (int k = 0; k < 4; ++k)
                    if (mask[i] >> (4 * j + k) & 1) tile.sums[i][j][k] += term.dropout.kept * part[k];
            }
    }
};

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
        Update<Tile, right_edge_major> update(term, tile, rows, cols);
        auto add = [&](auto right) { tile.add(update, left, right, term.depth); };
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
    PRODUCT(prefix, nf4, T, storage, unaligned, SmallTile, 1, false)

PRODUCTS(lora_linear, false, __half, f16)
PRODUCTS(lora_linear, false, __nv_bfloat16, bf16)
PRODUCTS(nf4_lora_linear, true, __half, f16)
PRODUCTS(nf4_lora_linear, true, __nv_bfloat16, bf16)
