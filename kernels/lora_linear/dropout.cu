// Dropout in memory of its own, for a frozen weight that reads the dropped-out input too: DoRA in training
//
//   y[i] = kept(i) ? x[i] / (1 - probability) : 0                     with the masks of dropout.cuh
//
// Layouts   x, y [elements], aligned to 16 bytes.
// Launch    ELEMENTWISE_THREADS threads per block, each takes 16 bytes of elements, the last ones one by one.
// Traffic   every element once in and once out; one Philox counter for four elements.
#include "../storage.cuh"
#include "abi.h"
#include "lora_linear/dropout.cuh"

template <typename T> __device__ void drop(const T *x, T *y, const LoraDropout &dropout, uint64_t elements) {
    uint32_t step = step_of(dropout);
    for_each_run<ELEMENTWISE_THREADS, PER_VECTOR<T>>(elements, [&](uint64_t i, auto count) {
        constexpr int N = decltype(count)::value;
        constexpr int TOGETHER = N < 4 ? N : 4;
        float values[N];
        load_run(x + i, values);
#pragma unroll
        for (int first = 0; first < N; first += TOGETHER) {
            uint32_t kept = kept4(dropout, step, i + first);
#pragma unroll
            for (int j = 0; j < TOGETHER; ++j)
                values[first + j] = kept >> j & 1 ? values[first + j] * dropout.kept : 0.0f;
        }
        store_run(y + i, values);
    });
}

#define DROPOUT(name, T)                                                                 \
    extern "C" __global__ void __launch_bounds__(ELEMENTWISE_THREADS)                    \
        lora_dropout_##name(const T *x, T *y, LoraDropout dropout, uint64_t elements) {  \
        drop(x, y, dropout, elements);                                                   \
    }

DROPOUT(f32, float)
DROPOUT(f16, __half)
DROPOUT(bf16, __nv_bfloat16)
