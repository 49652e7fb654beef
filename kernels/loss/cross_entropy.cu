// Cross-entropy of target tokens, with the gradient in the same launch
//
//   losses[i] = log(sum_j exp logits[i, j]) - logits[i, targets[i]]
//   logits[i, j] = (softmax(logits[i])[j] - (j == targets[i])) grad_scale     cross_entropy_backward
//   total += sum_i losses[i]                                                  cross_entropy_sum
//
// Layouts   logits [n, vocab] of T, read and, by backward, overwritten; targets [n] u32; losses [n], grad_scale
//           [1] and total [1] f32. Aligned to 16 bytes. A target beyond the vocabulary traps.
// Launch    one block of CROSS_ENTROPY_THREADS per row; sum: one block, in f64, in one order.
// Memory    a thread keeps a running maximum and the sum of exponentials relative to it, so one pass over
//           the row is enough for the softmax's denominator; the second pass writes the gradient.
// Traffic   n vocab elements in; backward reads them twice (a row fits the L2 cache) and writes them once.
#include "../reduce.cuh"
#include "../storage.cuh"
#include "abi.h"
#include "fast_math.cuh"

constexpr uint32_t TOGETHER = 4;

// Calls `body(i, count)` for the runs of a row that are this thread's: 16 bytes where the width allows.
template <typename T, typename Body> __device__ void for_each_vector(uint32_t width, Body body) {
    if (width % PER_VECTOR<T> == 0) {
        for (uint32_t i = threadIdx.x * PER_VECTOR<T>; i < width; i += CROSS_ENTROPY_THREADS * PER_VECTOR<T>)
            body(i, Count<PER_VECTOR<T>>());
    } else {
        for (uint32_t i = threadIdx.x; i < width; i += CROSS_ENTROPY_THREADS) body(i, Count<1>());
    }
}

template <typename T, bool backward>
__device__ void cross_entropy(T *logits, const uint32_t *targets, float *losses, const float *grad_scale,
                              uint32_t vocab) {
    __shared__ float scratch[32];
    uint32_t target = targets[blockIdx.x];
    if (target >= vocab) __trap();
    T *row = logits + (size_t)blockIdx.x * vocab;
    float at_target = widen(row[target]);

    float largest = -INFINITY, sum = 0.0f;
    auto take = [&](auto &x) {
        constexpr int N = sizeof(x) / sizeof(float);
        float run = x[0];
#pragma unroll
        for (int j = 1; j < N; ++j) run = fmaxf(run, x[j]);
        if (run > largest) {
            sum *= exp_fast(largest - run);
            largest = run;
        }
        // While all are -infinity there is nothing to be relative to; NaN goes through.
        float base = largest == -INFINITY ? 0.0f : largest;
#pragma unroll
        for (int j = 0; j < N; ++j) sum += exp_fast(x[j] - base);
    };
    if (vocab % PER_VECTOR<T> == 0) {
        constexpr uint32_t N = PER_VECTOR<T>, STEP = CROSS_ENTROPY_THREADS * N;
        uint32_t i = threadIdx.x * N;
        // Several vectors are on their way before the first is needed.
        for (; i + (TOGETHER - 1) * STEP < vocab; i += TOGETHER * STEP) {
            float x[TOGETHER][N];
#pragma unroll
            for (uint32_t j = 0; j < TOGETHER; ++j) load_run(row + i + j * STEP, x[j]);
#pragma unroll
            for (uint32_t j = 0; j < TOGETHER; ++j) take(x[j]);
        }
        for (; i < vocab; i += STEP) {
            float x[N];
            load_run(row + i, x);
            take(x);
        }
    } else {
        for (uint32_t i = threadIdx.x; i < vocab; i += CROSS_ENTROPY_THREADS) {
            float x[1] = {widen(row[i])};
            take(x);
        }
    }
    float all = block_reduce<Max>(largest, scratch);
    sum = block_reduce<Sum>(sum * exp_fast(largest - all), scratch);

    if constexpr (backward) {
        float scale = *grad_scale;
        float factor = scale / sum;
        for_each_vector<T>(vocab, [&](uint32_t i, auto count) {
            constexpr int N = decltype(count)::value;
            float x[N];
            load_run(row + i, x);
#pragma unroll
            for (int j = 0; j < N; ++j)
                x[j] = exp_fast(x[j] - all) * factor - (i + j == target ? scale : 0.0f);
            store_run(row + i, x);
        });
    }
    if (threadIdx.x == 0) losses[blockIdx.x] = all + logf(sum) - at_target;
}

#define CROSS_ENTROPY(name, T)                                                                  \
    extern "C" __global__ void __launch_bounds__(CROSS_ENTROPY_THREADS)                         \
        cross_entropy_forward_##name(const T *logits, const uint32_t *targets, float *losses,   \
                                     uint32_t vocab) {                                          \
        cross_entropy<T, false>(const_cast<T *>(logits), targets, losses, nullptr, vocab);      \
    }                                                                                           \
    extern "C" __global__ void __launch_bounds__(CROSS_ENTROPY_THREADS)                         \
        cross_entropy_backward_##name(T *logits, const uint32_t *targets, float *losses,        \
                                      const float *grad_scale, uint32_t vocab) {                \
        cross_entropy<T, true>(logits, targets, losses, grad_scale, vocab);                     \
    }

CROSS_ENTROPY(f32, float)
CROSS_ENTROPY(f16, __half)
CROSS_ENTROPY(bf16, __nv_bfloat16)

extern "C" __global__ void __launch_bounds__(CROSS_ENTROPY_THREADS)
    cross_entropy_sum(const float *losses, float *total, uint32_t n) {
    __shared__ double partial[CROSS_ENTROPY_THREADS];
    double sum = 0.0;
    for (uint32_t i = threadIdx.x; i < n; i += CROSS_ENTROPY_THREADS) sum += losses[i];
    partial[threadIdx.x] = sum;
    for (uint32_t half = CROSS_ENTROPY_THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
    }
    if (threadIdx.x == 0) *total += (float)partial[0];
}
