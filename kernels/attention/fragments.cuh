// Tiles of 16-bit rows in shared memory, and the two products that attention makes of them, on tensor cores.
//
// A warp owns M times 16 rows of a tile and shares none of them: of a product [own rows, streamed rows] it
// holds whole rows, each spread over four lanes, so a row's maximum and sum are two shuffles. Rounded to 16
// bits, a product's sums are already fragments of the left factor of the next product: weights never pass
// through memory.
//
//   multiply     own . streamedᵀ          scores, and their gradients
//   accumulate   weights . streamed       results
//
// D is the head_dim that a kernel is compiled for: smaller ones are padded with zeros. Tiles are swizzled, so
// that `ldmatrix` reads eight rows, and eight lanes write a row, without a conflict of banks.
#pragma once

#include "../fast_math.cuh"
#include "../mma.cuh"
#include "../storage.cuh"
#include "sequence.cuh"

constexpr int WARPS = THREADS / 32;

template <int D> struct Tile {
    static constexpr int CHUNKS = D / 8; // of 16 bytes in a row
    static constexpr int ROW_BYTES = 2 * D;
};

// What a lane holds of the rows [16 M] and columns [8 N] of a product: see `multiply` in mma.cuh.
template <int M, int N> using Sums = float[M][N][4];

// The same of a product rounded to 16 bits, as the left factor of the next: 16 columns at a time.
template <int M, int N> using Weights = uint32_t[M][N / 2][4];

extern __shared__ __align__(1024) uint8_t shared[];

__device__ inline int lane() { return threadIdx.x % 32; }
// The shuffle tells the compiler that a warp's lanes agree.
__device__ inline int warp() { return __shfl_sync(0xffffffff, threadIdx.x / 32, 0); }

// The row of a fragment that a lane holds in the sums 0 and 1 (half 0) or 2 and 3 (half 1), and the first of
// the two columns.
__device__ inline int lane_row(int half) { return lane() / 4 + 8 * half; }
__device__ inline int lane_column() { return lane() % 4 * 2; }

// Where a lane begins to read: as the right factor of `multiply`; as that of `accumulate`, from `column` on; as
// the left factor, the 16 rows from `row` on.
template <int D> __device__ uint32_t multiply_begin(uint32_t tile) {
    return tile + swizzled<Tile<D>::ROW_BYTES>(lane() % 8 + lane() / 16 * 8, lane() / 8 % 2);
}
template <int D> __device__ uint32_t accumulate_begin(uint32_t tile, int column) {
    return tile + swizzled<Tile<D>::ROW_BYTES>(lane() % 16, column / 8 + lane() / 16);
}
template <int D> __device__ uint32_t own_begin(uint32_t tile, int row) {
    return tile + row * Tile<D>::ROW_BYTES + swizzled<Tile<D>::ROW_BYTES>(lane() % 16, lane() / 16);
}

// `chunks` further along the row, an even number: the swizzle trades places within 128 bytes.
__device__ inline uint32_t along(uint32_t begin, int chunks) { return (begin ^ chunks % 8 * 16) + chunks / 8 * 128; }

// Begins to copy the ROWS rows from `first` on of `count`, with zeros beyond them and beyond head_dim. They are
// there after wait_for_copies and a barrier.
template <int D, int ROWS, typename T>
__device__ void load(uint32_t tile, Rows<const T> rows, int first, int count, bool aligned) {
    constexpr int CHUNKS = Tile<D>::CHUNKS;
    constexpr int STRIDE = THREADS / CHUNKS; // rows between a thread's copies
    static_assert(ROWS % STRIDE == 0 && STRIDE % 4 == 0, "threads have the same number of copies");
    // Read again for every tile: what follows from it would otherwise occupy registers throughout the loop.
    uint32_t thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    uint32_t chunk = thread % CHUNKS;
    uint32_t present = chunk * 8 < rows.head_dim ? rows.head_dim - chunk * 8 : 0;
    if (aligned) {
#pragma unroll
        for (int i = 0; i < ROWS / STRIDE; ++i) {
            int row = thread / CHUNKS + i * STRIDE;
            bool exists = first + row < count && present > 0;
            copy_async(tile + swizzled<Tile<D>::ROW_BYTES>(row, chunk), rows[first + row] + chunk * 8, exists);
        }
    } else {
#pragma unroll 1
        for (int i = 0; i < ROWS / STRIDE; ++i) {
            int row = thread / CHUNKS + i * STRIDE;
            store_shared(tile + swizzled<Tile<D>::ROW_BYTES>(row, chunk),
                         gather(rows[first + row] + chunk * 8, first + row < count ? present : 0));
        }
    }
}

// result = own . streamedᵀ, for 8 N streamed rows.
template <typename T, int D, int M, int N>
__device__ void multiply(Sums<M, N> &result, uint32_t own, uint32_t streamed) {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) result[m][n][e] = 0.0f;
#pragma unroll 2
    for (int step = 0; step < D / 16; ++step) {
        uint32_t a[M][4];
#pragma unroll
        for (int m = 0; m < M; ++m) load_matrices(a[m], along(own, 2 * step) + m * 16 * Tile<D>::ROW_BYTES);
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            uint32_t b[4];
            load_matrices(b, along(streamed, 2 * step) + n * 8 * Tile<D>::ROW_BYTES);
#pragma unroll
            for (int m = 0; m < M; ++m) {
                multiply(T{}, result[m][n], a[m], b[0], b[1]);
                multiply(T{}, result[m][n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

template <typename T, int M, int N> __device__ void round(Weights<M, N> &weights, const Sums<M, N> &product) {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                weights[m][n / 2][n % 2 * 2 + half] = pack<T>(product[m][n][2 * half], product[m][n][2 * half + 1]);
}

// result += weights . streamed, for 8 N streamed rows and 8 C columns.
template <typename T, int D, int M, int STEPS, int C>
__device__ void accumulate(Sums<M, C> &result, const uint32_t (&weights)[M][STEPS][4], uint32_t streamed) {
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
#pragma unroll
        for (int c = 0; c < C; c += 2) {
            uint32_t b[4];
            load_matrices_transposed(b, along(streamed, c) + step * 16 * Tile<D>::ROW_BYTES);
#pragma unroll
            for (int m = 0; m < M; ++m) {
                multiply(T{}, result[m][c], weights[m][step], b[0], b[1]);
                multiply(T{}, result[m][c + 1], weights[m][step], b[2], b[3]);
            }
        }
    }
}

// Writes results to the rows first.. of count, from `column` on, by way of the warp's own rows of a tile that
// nobody needs any more: whole rows leave at a time, 16 bytes per lane. `row` is the warp's first in the tile.
template <int D, typename T, int M, int C>
__device__ void store(Rows<T> rows, int first, int count, uint32_t column, bool aligned, const Sums<M, C> &results,
                      uint32_t tile, int row) {
    __syncwarp();
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int c = 0; c < C; ++c)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                store_shared(tile + swizzled<Tile<D>::ROW_BYTES>(row + 16 * m + lane_row(half), c) +
                                 lane_column() * 2,
                             pack<T>(results[m][c][2 * half], results[m][c][2 * half + 1]));
    __syncwarp();
#pragma unroll 1
    for (int i = lane(); i < 16 * M * C; i += 32) {
        int at = row + i / C;
        uint32_t from = column + i % C * 8;
        if (first + at >= count || from >= rows.head_dim) continue;
        uint4 values = load_shared(tile + swizzled<Tile<D>::ROW_BYTES>(at, i % C));
        T *to = rows[first + at] + from;
        if (aligned) {
            *reinterpret_cast<uint4 *>(to) = values;
        } else {
            const T *elements = reinterpret_cast<const T *>(&values);
            for (int e = 0; e < 8; ++e)
                if (from + e < rows.head_dim) to[e] = elements[e];
        }
    }
}

template <int M, int C> __device__ void scale(Sums<M, C> &results, float factor) {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int c = 0; c < C; ++c)
#pragma unroll
            for (int e = 0; e < 4; ++e) results[m][c][e] *= factor;
}

// Over the four lanes of a row.
template <typename Operation> __device__ float reduce_row(float value) {
    value = Operation::combine(value, __shfl_xor_sync(0xffffffff, value, 1));
    return Operation::combine(value, __shfl_xor_sync(0xffffffff, value, 2));
}
