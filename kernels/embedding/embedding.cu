// Rows by index: the embedding, and target tokens out of a batch
//
//   gather            y[i] = table[ids[i]]
//   scatter_add       dx[ids[i]] += dy[i]                     for every i with that index, in order
//   ..._transposed    the same of a table that is held transposed: a low-rank update's A
//
// Layouts   table, dx [rows, width], transposed [width, rows]; ids [n] u32; y, dy [n, width]. Where width is a
//           multiple of a 16-byte vector, rows are moved in vectors. An index beyond the table traps.
// Launch    one block of EMBEDDING_THREADS per i; for scatter_add, as many along y as cover the width with a
//           vector (or an element) per thread. scatter_add adds the rows of one index in the block of its first
//           occurrence: no atomics, so the sum has one order. The block looks for them once, an id per thread
//           at a time.
// Traffic   gather: 2 n width elements. scatter_add: 2 n width in, and each touched row once out;
//           the ids are read again by every block, from cache. Of a transposed table, each element is alone in
//           a sector of 32 bytes.
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

template <bool transposed, typename T, int N>
__device__ void scatter_add(const T *dy, const uint32_t *ids, T *dx, EmbeddingShape shape, uint32_t n) {
    constexpr int WARPS = EMBEDDING_THREADS / 32;
    __shared__ uint32_t found[2][WARPS];  // two, so that one barrier per turn is enough
    uint32_t id = ids[blockIdx.x];
    if (id >= shape.rows) __trap();
    bool seen = false;
    for (uint32_t j = threadIdx.x; j < blockIdx.x; j += EMBEDDING_THREADS) seen |= ids[j] == id;
    if (__syncthreads_or(seen)) return;  // the block of the first occurrence adds them all

    uint32_t column = (blockIdx.y * EMBEDDING_THREADS + threadIdx.x) * N;
    bool owns = column < shape.width;
    T *to = transposed ? dx + (size_t)column * shape.rows + id : dx + (size_t)id * shape.width + column;
    float sum[N];
    if (owns) load_run(to, sum);
    uint32_t turn = 0;
    for (uint32_t first = blockIdx.x; first < n; first += EMBEDDING_THREADS, turn ^= 1) {
        uint32_t i = first + threadIdx.x;
        uint32_t matches = __ballot_sync(0xffffffff, i < n && ids[i] == id);
        if (threadIdx.x % 32 == 0) found[turn][threadIdx.x / 32] = matches;
        __syncthreads();
        for (int warp = 0; warp < WARPS; ++warp)
            for (uint32_t left = found[turn][warp]; left != 0; left &= left - 1) {
                uint32_t row = first + 32 * warp + __ffs(left) - 1;
                float term[N];
                if (!owns) continue;
                load_run(dy + (size_t)row * shape.width + column, term);
                for (int e = 0; e < N; ++e) sum[e] += term[e];
            }
    }
    if (owns) store_run(to, sum);
}

#define EMBEDDING(name, T)                                                                          \
    extern "C" __global__ void __launch_bounds__(EMBEDDING_THREADS)                                 \
        gather_##name(const T *table, const uint32_t *ids, T *y, EmbeddingShape shape) {            \
        gather(table, ids, y, shape);                                                               \
    }                                                                                               \
    extern "C" __global__ void __launch_bounds__(EMBEDDING_THREADS)                                 \
        scatter_add_##name(const T *dy, const uint32_t *ids, T *dx, EmbeddingShape shape, uint32_t n) { \
        if (shape.width % PER_VECTOR<T> == 0)                                                       \
            scatter_add<false, T, PER_VECTOR<T>>(dy, ids, dx, shape, n);                            \
        else                                                                                        \
            scatter_add<false, T, 1>(dy, ids, dx, shape, n);                                        \
    }

EMBEDDING(f32, float)
EMBEDDING(f16, __half)
EMBEDDING(bf16, __nv_bfloat16)

extern "C" __global__ void __launch_bounds__(EMBEDDING_THREADS)
    gather_transposed(const float *table, const uint32_t *ids, float *y, EmbeddingShape shape) {
    uint32_t id = ids[blockIdx.x];
    if (id >= shape.rows) __trap();
    for (uint32_t i = threadIdx.x; i < shape.width; i += EMBEDDING_THREADS)
        y[(size_t)blockIdx.x * shape.width + i] = table[(size_t)i * shape.rows + id];
}

extern "C" __global__ void __launch_bounds__(EMBEDDING_THREADS)
    scatter_add_transposed(const float *dy, const uint32_t *ids, float *dx, EmbeddingShape shape, uint32_t n) {
    scatter_add<true, float, 1>(dy, ids, dx, shape, n);
}
