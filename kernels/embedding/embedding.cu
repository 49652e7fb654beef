// Rows by index: the embedding, and target tokens out of a batch
//
//   gather            y[i] = table[ids[i]]
//   scatter_add       dx[ids[i]] += dy[i]                     for every i with that index, in order
//
// Layouts   table, dx [rows, width]; ids [n] u32; y, dy [n, width]. Where width is a multiple of a
//           16-byte vector, rows are moved in vectors. An index beyond the table traps.
// Launch    one block of EMBEDDING_THREADS per i. scatter_add adds the rows of one index in the block of
//           its first occurrence: no atomics, so the sum has one order.
// Traffic   gather: 2 n width elements. scatter_add: 2 n width in, and each touched row once out.
#include "../storage.cuh"
#include "abi.h"

template <typename T> __device__ void gather(const T *table, const uint32_t *ids, T *y, EmbeddingShape shape) {
    uint32_t id = ids[blockIdx.x];
    if (id >= shape.rows) __trap();
    const T *from = table + (size_t)id * shape.width;
    T *to = y + (size_t)blockIdx.x * shape.width;
    if (shape.width % PER_VECTOR<T> == 0) {
        for (uint32_t i = threadIdx.x * PER_VECTOR<T>; i < shape.width; i += EMBEDDING_THREADS * PER_VECTOR<T>)
            *reinterpret_cast<uint4 *>(to + i) = *reinterpret_cast<const uint4 *>(from + i);
    } else {
        for (uint32_t i = threadIdx.x; i < shape.width; i += EMBEDDING_THREADS) to[i] = from[i];
    }
}

template <typename T>
__device__ void scatter_add(const T *dy, const uint32_t *ids, T *dx, EmbeddingShape shape, uint32_t n) {
    uint32_t id = ids[blockIdx.x];
    if (id >= shape.rows) __trap();
    bool seen = false;
    for (uint32_t j = threadIdx.x; j < blockIdx.x; j += EMBEDDING_THREADS) seen |= ids[j] == id;
    if (__syncthreads_or(seen)) return;  // the block of the first occurrence adds them all

    T *to = dx + (size_t)id * shape.width;
    for (uint32_t i = threadIdx.x; i < shape.width; i += EMBEDDING_THREADS) {
        float sum = widen(to[i]);
        for (uint32_t j = blockIdx.x; j < n; ++j)
            if (ids[j] == id) sum += widen(dy[(size_t)j * shape.width + i]);
        to[i] = narrow<T>(sum);
    }
}

#define EMBEDDING(name, T)                                                                          \
    extern "C" __global__ void __launch_bounds__(EMBEDDING_THREADS)                                 \
        gather_##name(const T *table, const uint32_t *ids, T *y, EmbeddingShape shape) {            \
        gather(table, ids, y, shape);                                                               \
    }                                                                                               \
    extern "C" __global__ void __launch_bounds__(EMBEDDING_THREADS)                                 \
        scatter_add_##name(const T *dy, const uint32_t *ids, T *dx, EmbeddingShape shape, uint32_t n) { \
        scatter_add(dy, ids, dx, shape, n);                                                         \
    }

EMBEDDING(f32, float)
EMBEDDING(f16, __half)
EMBEDDING(bf16, __nv_bfloat16)
