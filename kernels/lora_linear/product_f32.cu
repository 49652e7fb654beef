// The two products of a linear layer with its low-rank update, f32
//
//   forward  Y  [tokens, out] = X . W^T + scaling H . B^T + bias
//   dx       dX [tokens, in]  = sum over projections of dY . W + drop(dH . A)
//
// Layouts   row-major. left is X [tokens, in] or dY [tokens, out]; right is W [out, in] in both:
//           forward reads it along rows (depth = in), dx along columns (depth = out). W is f32, or
//           NF4 in the kernels that say so, dequantized on its way through registers: blocks run
//           along its rows, so both directions read neighbouring codes. left_low is H or dH [tokens, rank]; right_low is B [out, rank] or A [rank, in]. bias
//           [out] or none. All start at a multiple of 4 bytes; rows that are a multiple of 16 bytes
//           long and aligned are read and written 16 bytes at a time.
// Launch    LORA_THREADS threads per TILE x TILE tile of the result, 128 or 64; grid (cols / TILE,
//           rows / TILE), rounded up. The update is `rank` more columns of depth in the same tile.
// Shared    two stages of two slices of 16 x TILE, 33.8 KB for 128; the 16 values of NF4. Rows are padded by 4: a warp's
//           transposing stores fall into different banks, and 16-byte reads stay aligned.
// Registers TILE / 16 squared results per thread, and the next slice on its way to shared memory.
// Traffic   at least 4 (rows depth + cols depth + rows cols) bytes; it moves left cols / TILE times
//           and right rows / TILE times. 2 rows cols (depth + rank) FLOPs, none on tensor cores.
#include "abi.h"
#include "lora_linear/dropout.cuh"
#include "lora_linear/simt.cuh"
#include "nf4/format.cuh"

// An NF4 weight as simt.cuh's Matrix.
struct Nf4Matrix {
    const Nf4Weight &weight;
    const float *quant_map; // [16] in shared memory
    uint32_t rows, cols;

    __device__ float4 load4(uint32_t row, uint32_t col) const {
        float values[4] = {};
        if (row < rows && col < cols) {
            const uint8_t *packed = reinterpret_cast<const uint8_t *>(weight.packed);
            uint64_t index = (uint64_t)row * cols + col;
            if (cols % 4 == 0) { // within two bytes and one block
                uint32_t word = *reinterpret_cast<const uint16_t *>(packed + index / 2);
                float scale = nf4_absmax(weight, index);
                for (int i = 0; i < 4; ++i) values[i] = quant_map[nf4_code(word, i)] * scale;
            } else {
                for (int i = 0; i < 4 && col + i < cols; ++i, ++index)
                    values[i] = quant_map[nf4_code(packed[index / 2], index % 2)] * nf4_absmax(weight, index);
            }
        }
        return make_float4(values[0], values[1], values[2], values[3]);
    }
};

constexpr int DEPTH = 16; // of a slice

template <int TILE> using Slice = float[DEPTH][TILE + 4];

// A slice on its way through registers. `edge_major`: the factor is held [edge, depth].
template <int TILE, bool edge_major> struct Fetched {
    static constexpr int COUNT = TILE * DEPTH / 4 / LORA_THREADS;
    float4 values[COUNT];

    // Along depth, two lanes read one 32-byte sector of a row; otherwise a warp reads one row.
    static __device__ int edge(int j) {
        int i = threadIdx.x + j * LORA_THREADS;
        return edge_major ? i / 2 % TILE : 4 * (i % (TILE / 4));
    }
    static __device__ int depth(int j) {
        int i = threadIdx.x + j * LORA_THREADS;
        return edge_major ? 4 * (i % 2 + i / (2 * TILE) * 2) : i / (TILE / 4);
    }

    template <typename Factor>
    __device__ void load(const Factor &factor, uint32_t edge0, uint32_t depth0, float scaling) {
        for (int j = 0; j < COUNT; ++j) {
            uint32_t e = edge0 + edge(j), d = depth0 + depth(j);
            float4 v = edge_major ? factor.load4(e, d) : factor.load4(d, e);
            values[j] = make_float4(v.x * scaling, v.y * scaling, v.z * scaling, v.w * scaling);
        }
    }

    __device__ void store(Slice<TILE> slice) const {
        for (int j = 0; j < COUNT; ++j) {
            if (edge_major)
                for (int i = 0; i < 4; ++i) slice[depth(j) + i][edge(j)] = at(values[j], i);
            else
                *reinterpret_cast<float4 *>(&slice[depth(j)][edge(j)]) = values[j];
        }
    }
};

template <int TILE, bool right_edge_major> struct Tile {
    static constexpr int QUADS = TILE / 64; // of results of a thread along each edge
    static constexpr int EDGE = 4 * QUADS;

    Slice<TILE> (&left_slices)[2];
    Slice<TILE> (&right_slices)[2];
    uint32_t row0, col0;
    float sums[EDGE][EDGE];

    // A warp covers 16 x 32 of each quadrant: its 16-byte reads touch every bank once.
    static __device__ int row(int i) {
        return 4 * (threadIdx.x / 64 * 4 + threadIdx.x % 32 / 8) + i % 4 + i / 4 * 64;
    }
    static __device__ int col(int j) {
        return 4 * (threadIdx.x / 32 % 2 * 8 + threadIdx.x % 8) + j % 4 + j / 4 * 64;
    }

    static __device__ void read(const Slice<TILE> slice, int d, int first, float (&values)[EDGE]) {
        for (int q = 0; q < QUADS; ++q) {
            float4 v = *reinterpret_cast<const float4 *>(&slice[d][first + q * 64]);
            for (int i = 0; i < 4; ++i) values[4 * q + i] = at(v, i);
        }
    }

    // sums += the product of two slices.
    __device__ void multiply(const Slice<TILE> left, const Slice<TILE> right) {
#pragma unroll 4
        for (int d = 0; d < DEPTH; ++d) {
            float l[EDGE], r[EDGE];
            read(left, d, row(0), l);
            read(right, d, col(0), r);
            for (int i = 0; i < EDGE; ++i)
                for (int j = 0; j < EDGE; ++j) sums[i][j] += l[i] * r[j];
        }
    }

    // sums += kept times the product where the mask is set: a row at a time, since a second set of
    // sums would not fit the registers.
    __device__ void multiply_masked(const Slice<TILE> left, const Slice<TILE> right,
                                    const uint32_t (&mask)[EDGE], float kept) {
#pragma unroll
        for (int i = 0; i < EDGE; ++i) {
            float row_sums[EDGE] = {};
#pragma unroll 2
            for (int d = 0; d < DEPTH; ++d) {
                float r[EDGE];
                read(right, d, col(0), r);
                for (int j = 0; j < EDGE; ++j) row_sums[j] += left[d][row(i)] * r[j];
            }
            for (int j = 0; j < EDGE; ++j)
                if (mask[i] >> j & 1) sums[i][j] += kept * row_sums[j];
        }
    }

    // sums += drop(scaling left . right)
    template <typename Right>
    __device__ void add(const Matrix &left, const Right &right, uint32_t depth, float scaling,
                        const LoraDropout *dropout, uint32_t cols) {
        uint32_t mask[EDGE] = {};
        uint32_t step = dropout ? step_of(*dropout) : 0;
        if (dropout)
            for (int i = 0; i < EDGE; ++i)
                for (int q = 0; q < QUADS; ++q) {
                    uint64_t index = (uint64_t)(row0 + row(i)) * cols + col0 + col(4 * q);
                    mask[i] |= kept4(*dropout, step, index) << 4 * q;
                }

        Fetched<TILE, true> next_left;
        Fetched<TILE, right_edge_major> next_right;
        next_left.load(left, row0, 0, scaling);
        next_right.load(right, col0, 0, 1.0f);
        int stage = 0;
        for (uint32_t d = 0; d < depth; d += DEPTH, stage ^= 1) {
            next_left.store(left_slices[stage]);
            next_right.store(right_slices[stage]);
            __syncthreads();
            if (d + DEPTH < depth) {
                next_left.load(left, row0, d + DEPTH, scaling);
                next_right.load(right, col0, d + DEPTH, 1.0f);
            }
            if (!right_edge_major && dropout)
                multiply_masked(left_slices[stage], right_slices[stage], mask, dropout->kept);
            else
                multiply(left_slices[stage], right_slices[stage]);
        }
        __syncthreads(); // the next product begins with the first stage
    }
};

template <int TILE, bool right_edge_major, bool nf4>
__device__ void product(const LoraProduct &product, const float *bias, float *out) {
    __shared__ Slice<TILE> left_slices[2];
    __shared__ Slice<TILE> right_slices[2];
    Tile<TILE, right_edge_major> tile{left_slices, right_slices, blockIdx.y * TILE,
                                      blockIdx.x * TILE, {}};
    uint32_t rows = product.rows, cols = product.cols;

    __shared__ float quant_map[16];
    if (nf4) {
        if (threadIdx.x < 16) quant_map[threadIdx.x] = NF4_QUANT_MAP[threadIdx.x];
        __syncthreads();
    }

    for (uint32_t i = 0; i < product.count; ++i) {
        const LoraTerm &term = product.terms[i];
        uint32_t right_rows = right_edge_major ? cols : term.depth;
        uint32_t right_cols = right_edge_major ? term.depth : cols;
        Matrix left(term.left, rows, term.depth);
        if constexpr (nf4)
            tile.add(left, Nf4Matrix{term.quantized, quant_map, right_rows, right_cols}, term.depth, 1.0f,
                     nullptr, cols);
        else
            tile.add(left, Matrix(term.right, right_rows, right_cols), term.depth, 1.0f, nullptr, cols);
        if (term.rank) {
            Matrix right_low = right_edge_major ? Matrix(term.right_low, cols, term.rank)
                                                : Matrix(term.right_low, term.rank, cols);
            tile.add(Matrix(term.left_low, rows, term.rank), right_low, term.rank, term.scaling,
                     term.dropout.probability > 0 ? &term.dropout : nullptr, cols);
        }
    }

    constexpr int EDGE = Tile<TILE, right_edge_major>::EDGE;
#pragma unroll
    for (int j = 0; j < EDGE; j += 4) {
        uint32_t col = tile.col0 + tile.col(j);
        float4 b = make_float4(0, 0, 0, 0);
        if (bias) b = Matrix(reinterpret_cast<uint64_t>(bias), 1, cols).load4(0, col);
#pragma unroll
        for (int i = 0; i < EDGE; ++i) {
            float *sums = &tile.sums[i][j];
            store4(out, rows, cols, tile.row0 + tile.row(i), col,
                   make_float4(sums[0] + b.x, sums[1] + b.y, sums[2] + b.z, sums[3] + b.w));
        }
    }
}

#define PRODUCT(TILE, prefix, nf4)                                                                \
    extern "C" __global__ void __launch_bounds__(LORA_THREADS) prefix##_forward_f32_##TILE(       \
        const __grid_constant__ LoraProduct shape, const float *bias, float *y) {                 \
        product<TILE, true, nf4>(shape, bias, y);                                                 \
    }                                                                                             \
    extern "C" __global__ void __launch_bounds__(LORA_THREADS)                                    \
        prefix##_dx_f32_##TILE(const __grid_constant__ LoraProduct shape, float *dx) {            \
        product<TILE, false, nf4>(shape, nullptr, dx);                                            \
    }

PRODUCT(64, lora_linear, false)
PRODUCT(128, lora_linear, false)
PRODUCT(64, nf4_lora_linear, true)
PRODUCT(128, nf4_lora_linear, true)
