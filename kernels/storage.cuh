// How activations are stored (f32, f16, bf16) and computed with (f32), a value or up to 16 bytes at a time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

// Rounds to nearest even.
template <typename T> __device__ T narrow(float x);
template <> __device__ inline float narrow<float>(float x) { return x; }
template <> __device__ inline __half narrow<__half>(float x) { return __float2half_rn(x); }
template <> __device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

// Elements in 16 bytes.
template <typename T> constexpr int PER_VECTOR = 16 / sizeof(T);

// A number of elements that is known when the kernel is compiled, as an argument.
template <int N> struct Count {
    static constexpr int value = N;
};

// For element-wise kernels with THREADS threads per block and N elements per thread: calls `body(i, count)` for
// the N elements that begin at i, or for each of fewer at the end.
template <int THREADS, int N, typename Body> __device__ void for_each_run(uint64_t elements, Body body) {
    uint64_t i = ((uint64_t)blockIdx.x * THREADS + threadIdx.x) * N;
    if (i + N <= elements) {
        body(i, Count<N>());
    } else {
        for (; i < elements; ++i) body(i, Count<1>());
    }
}

// Elements per thread and step in kernels that read f32 parameters beside rows of T: 16 bytes of f32, 8 of f16.
// With 16 of f16, a warp's reads of the parameters would skip every other 16 bytes.
constexpr int ROW_RUN = 4;

// Calls `body(i, count)` for the runs of a row that are this thread's: ROW_RUN elements where the width allows.
template <typename Body> __device__ void for_each_in_row(uint32_t width, Body body) {
    if (width % ROW_RUN == 0) {
        for (uint32_t i = threadIdx.x * ROW_RUN; i < width; i += blockDim.x * ROW_RUN) body(i, Count<ROW_RUN>());
    } else {
        for (uint32_t i = threadIdx.x; i < width; i += blockDim.x) body(i, Count<1>());
    }
}

// The integer that moves as many bytes at once.
template <int BYTES> struct Word;
template <> struct Word<8> {
    using type = uint2;
};
template <> struct Word<16> {
    using type = uint4;
};

// N elements as floats: 8 or 16 aligned bytes at once, or one by one.
template <typename T, int N> __device__ void load_run(const T *from, float (&values)[N]) {
    constexpr int BYTES = N * sizeof(T);
    if constexpr (BYTES == 8 || BYTES == 16) {
        auto raw = *reinterpret_cast<const typename Word<BYTES>::type *>(from);
        const T *stored = reinterpret_cast<const T *>(&raw);
#pragma unroll
        for (int j = 0; j < N; ++j) values[j] = widen(stored[j]);
    } else {
#pragma unroll
        for (int j = 0; j < N; ++j) values[j] = widen(from[j]);
    }
}

template <typename T, int N> __device__ void store_run(T *to, const float (&values)[N]) {
    constexpr int BYTES = N * sizeof(T);
    if constexpr (BYTES == 8 || BYTES == 16) {
        typename Word<BYTES>::type raw;
        T *stored = reinterpret_cast<T *>(&raw);
#pragma unroll
        for (int j = 0; j < N; ++j) stored[j] = narrow<T>(values[j]);
        *reinterpret_cast<typename Word<BYTES>::type *>(to) = raw;
    } else {
#pragma unroll
        for (int j = 0; j < N; ++j) to[j] = narrow<T>(values[j]);
    }
}
