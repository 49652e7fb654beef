// Tiles of f32 rows in shared memory, and the two products that attention makes of them, without
// tensor cores.
//
// A block's threads form a grid of 8 x 16. A tile holds EDGE rows; of a product [EDGE, EDGE] a thread
// keeps the rows y + 8 i and the columns x + 16 j, and of a result [EDGE, D] the same rows and four
// columns in every 64. A row therefore belongs to 16 lanes of one warp: its maximum and its sums are
// shuffles, and its weights go through shared memory without a barrier of the block.
//
// D is the head_dim that a kernel is compiled for: smaller ones are padded with zeros.
#pragma once

#include "sequence.cuh"

constexpr int LANES = 16;               // threads along a row
constexpr int STRIPES = THREADS / LANES; // rows that a column of threads is apart

template <int D> struct Tile {
    static constexpr int EDGE = D > 128 ? 16 : 32; // so that four tiles fit the smallest GPU's 99 KB
    static constexpr int ROWS = EDGE / STRIPES;
    static constexpr int COLUMNS = EDGE / LANES;
    static constexpr int VECTORS = D / 64;
    static constexpr int STRIDE = D + 4;        // eight rows of a column: all 32 banks
    static constexpr int WEIGHTS_STRIDE = EDGE | 16; // two rows side by side: all 32 banks
    static constexpr int SIZE = EDGE * STRIDE;
    static constexpr int WEIGHTS_SIZE = EDGE * WEIGHTS_STRIDE;
};

__device__ inline int lane_x() { return threadIdx.x % LANES; }
__device__ inline int lane_y() { return threadIdx.x / LANES; }

// Rows first.. of count, with zeros beyond them and beyond head_dim.
template <int D>
__device__ void load(float *tile, Rows<const float> rows, int first, int count, bool aligned) {
    for (int i = threadIdx.x; i < Tile<D>::EDGE * D / 4; i += THREADS) {
        int row = i / (D / 4);
        uint32_t column = i % (D / 4) * 4;
        float values[4] = {};
        if (first + row < count) {
            const float *source = rows[first + row] + column;
            if (aligned) {
                if (column < rows.head_dim)
                    *reinterpret_cast<float4 *>(values) = *reinterpret_cast<const float4 *>(source);
            } else {
                for (int e = 0; e < 4; ++e)
                    if (column + e < rows.head_dim) values[e] = source[e];
            }
        }
        *reinterpret_cast<float4 *>(tile + row * Tile<D>::STRIDE + column) =
            *reinterpret_cast<float4 *>(values);
    }
}

// result[i][j] = own[y + 8 i] . streamed[x + 16 j]
template <int D>
__device__ void multiply(float (&result)[Tile<D>::ROWS][Tile<D>::COLUMNS], const float *own,
                         const float *streamed) {
    using T = Tile<D>;
    for (int i = 0; i < T::ROWS; ++i)
        for (int j = 0; j < T::COLUMNS; ++j) result[i][j] = 0.0f;
#pragma unroll 2
    for (int d = 0; d < D; d += 4) {
        float4 a[T::ROWS], b[T::COLUMNS];
        for (int i = 0; i < T::ROWS; ++i)
            a[i] = *reinterpret_cast<const float4 *>(own + (lane_y() + STRIPES * i) * T::STRIDE + d);
        for (int j = 0; j < T::COLUMNS; ++j)
            b[j] = *reinterpret_cast<const float4 *>(streamed + (lane_x() + LANES * j) * T::STRIDE + d);
        for (int i = 0; i < T::ROWS; ++i)
            for (int j = 0; j < T::COLUMNS; ++j) {
                result[i][j] += a[i].x * b[j].x;
                result[i][j] += a[i].y * b[j].y;
                result[i][j] += a[i].z * b[j].z;
                result[i][j] += a[i].w * b[j].w;
            }
    }
}

// Hands a product's values to the other lanes of their rows.
template <int D>
__device__ void store_weights(float *weights, const float (&values)[Tile<D>::ROWS][Tile<D>::COLUMNS]) {
    using T = Tile<D>;
    __syncwarp();
    for (int i = 0; i < T::ROWS; ++i)
        for (int j = 0; j < T::COLUMNS; ++j)
            weights[(lane_y() + STRIPES * i) * T::WEIGHTS_STRIDE + lane_x() + LANES * j] = values[i][j];
    __syncwarp();
}

// sums[y + 8 i] += sum over t of weights[y + 8 i][t] * streamed[t]
template <int D>
__device__ void accumulate(float (&sums)[Tile<D>::ROWS][Tile<D>::VECTORS][4], const float *weights,
                           const float *streamed) {
    using T = Tile<D>;
#pragma unroll 2
    for (int t = 0; t < T::EDGE; t += 4) {
        float w[T::ROWS][4];
        for (int i = 0; i < T::ROWS; ++i)
            *reinterpret_cast<float4 *>(w[i]) = *reinterpret_cast<const float4 *>(
                weights + (lane_y() + STRIPES * i) * T::WEIGHTS_STRIDE + t);
#pragma unroll
        for (int u = 0; u < 4; ++u)
#pragma unroll
            for (int c = 0; c < T::VECTORS; ++c) {
                float4 x = *reinterpret_cast<const float4 *>(streamed + (t + u) * T::STRIDE +
                                                             64 * c + 4 * lane_x());
#pragma unroll
                for (int i = 0; i < T::ROWS; ++i) {
                    sums[i][c][0] += w[i][u] * x.x;
                    sums[i][c][1] += w[i][u] * x.y;
                    sums[i][c][2] += w[i][u] * x.z;
                    sums[i][c][3] += w[i][u] * x.w;
                }
            }
    }
}

// Writes factor[i] * sums[i] to the rows first.. of count.
template <int D>
__device__ void store(Rows<float> rows, int first, int count, bool aligned,
                      const float (&sums)[Tile<D>::ROWS][Tile<D>::VECTORS][4],
                      const float (&factor)[Tile<D>::ROWS]) {
    for (int i = 0; i < Tile<D>::ROWS; ++i) {
        int row = first + lane_y() + STRIPES * i;
        if (row >= count) continue;
        float *target = rows[row];
        for (int c = 0; c < Tile<D>::VECTORS; ++c) {
            uint32_t column = 64 * c + 4 * lane_x();
            float values[4];
            for (int e = 0; e < 4; ++e) values[e] = factor[i] * sums[i][c][e];
            if (aligned) {
                // The intrinsic, because nvcc would merge a plain store with the scalar ones below.
                if (column < rows.head_dim)
                    __stwb(reinterpret_cast<float4 *>(target + column),
                           *reinterpret_cast<float4 *>(values));
            } else {
                for (int e = 0; e < 4; ++e)
                    if (column + e < rows.head_dim) target[column + e] = values[e];
            }
        }
    }
}

// Over the lanes of a row.
template <typename Operation> __device__ float reduce_row(float value, Operation operation) {
#pragma unroll
    for (int distance = LANES / 2; distance > 0; distance /= 2)
        value = operation(value, __shfl_xor_sync(0xffffffff, value, distance));
    return value;
}
