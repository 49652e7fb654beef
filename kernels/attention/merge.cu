// The end of a split attention
//
//   lse[row] = log(sum over splits of exp(lse_s[row]))
//   o[row]   = sum over splits of exp(lse_s[row] - lse[row]) o_s[row]
//
// where each split has seen its share of the keys, in the order of the splits: every run gives the same bits.
//
// Layouts   partial [splits, tokens * heads, head_dim] f32, then partial_lse [splits, tokens * heads];
//           o [tokens * heads, head_dim], lse [tokens * heads].
// Launch    one thread per element of o, ATTENTION_MERGE_THREADS a block.
// Traffic   4 splits bytes in and sizeof(T) out per element of o; the weights of a row come from the cache.
#include "abi.h"
#include "storage.cuh"

template <typename T>
__device__ void merge(const float *partial, const float *partial_lse, T *o, float *lse,
                      AttentionShape shape) {
    size_t rows = (size_t)shape.tokens * shape.heads;
    size_t i = (size_t)blockIdx.x * ATTENTION_MERGE_THREADS + threadIdx.x;
    size_t row = i / shape.head_dim;
    if (row >= rows) return;
    // A split that saw nothing has -infinity and adds nothing, but one always saw something.
    float largest = -INFINITY;
    for (uint32_t s = 0; s < shape.splits; ++s) largest = fmaxf(largest, partial_lse[s * rows + row]);
    float sum = 0.0f, weighted = 0.0f;
    for (uint32_t s = 0; s < shape.splits; ++s) {
        float weight = expf(partial_lse[s * rows + row] - largest);
        sum += weight;
        weighted += weight * partial[s * rows * shape.head_dim + i];
    }
    o[i] = narrow<T>(weighted / sum);
    if (i % shape.head_dim == 0) lse[row] = largest + logf(sum);
}

#define MERGE(suffix, T)                                                                            \
    extern "C" __global__ void __launch_bounds__(ATTENTION_MERGE_THREADS) attention_merge_##suffix( \
        const float *partial, const float *partial_lse, T *o, float *lse, AttentionShape shape) {   \
        merge<T>(partial, partial_lse, o, lse, shape);                                              \
    }

MERGE(f32, float)
MERGE(f16, __half)
MERGE(bf16, __nv_bfloat16)
