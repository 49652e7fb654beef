// Columns of a matrix: the parts of a fused projection, and single tokens of the output head
//
//   copy_columns   y[i][to_first + j] = x[i][from_first + j]              for j < width
//   take_columns   y[i][j] = x[i][ids[j]]
//
// Layouts   copy_columns: x [rows, from_columns], y [rows, to_columns]; where all of `block` is a multiple of a
//           16-byte vector, rows are moved in vectors. take_columns: x [rows, columns], ids [n] u32,
//           y [rows, n]; an index beyond the columns traps.
// Launch    one block of COLUMNS_THREADS per row.
// Traffic   copy_columns: rows width elements in and out. take_columns: rows n elements out, and a sector
//           of 32 bytes in for each that is alone in it; the ids are read again by every block, from cache.
#include "../storage.cuh"
#include "abi.h"

template <typename T> __device__ void copy_columns(const T *x, T *y, const ColumnBlock &block) {
    constexpr uint32_t N = PER_VECTOR<T>;
    const T *from = x + (size_t)blockIdx.x * block.from_columns + block.from_first;
    T *to = y + (size_t)blockIdx.x * block.to_columns + block.to_first;
    if ((block.width | block.from_columns | block.from_first | block.to_columns | block.to_first) % N == 0) {
        for (uint32_t i = threadIdx.x * N; i < block.width; i += COLUMNS_THREADS * N)
            *reinterpret_cast<uint4 *>(to + i) = *reinterpret_cast<const uint4 *>(from + i);
    } else {
        for (uint32_t i = threadIdx.x; i < block.width; i += COLUMNS_THREADS) to[i] = from[i];
    }
}

template <typename T>
__device__ void take_columns(const T *x, const uint32_t *ids, T *y, uint32_t columns, uint32_t n) {
    const T *from = x + (size_t)blockIdx.x * columns;
    T *to = y + (size_t)blockIdx.x * n;
    for (uint32_t j = threadIdx.x; j < n; j += COLUMNS_THREADS) {
        uint32_t id = ids[j];
        if (id >= columns) __trap();
        to[j] = from[id];
    }
}

#define KERNEL extern "C" __global__ void __launch_bounds__(COLUMNS_THREADS)

#define COLUMNS(name, T)                                                                                   \
    KERNEL copy_columns_##name(const T *x, T *y, ColumnBlock block) { copy_columns(x, y, block); }         \
    KERNEL take_columns_##name(const T *x, const uint32_t *ids, T *y, uint32_t columns, uint32_t n) {      \
        take_columns(x, ids, y, columns, n);                                                               \
    }

COLUMNS(f32, float)
COLUMNS(f16, __half)
COLUMNS(bf16, __nv_bfloat16)
