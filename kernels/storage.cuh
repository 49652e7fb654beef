// How activations are stored (f32, f16, bf16) and computed with (f32), a value or 16 bytes at a time.
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

// Sixteen aligned bytes of memory as floats in registers.
template <typename T> struct Vector {
    float values[PER_VECTOR<T>];

    __device__ static Vector load(const T *from) {
        uint4 raw = *reinterpret_cast<const uint4 *>(from);
        const T *stored = reinterpret_cast<const T *>(&raw);
        Vector vector;
#pragma unroll
        for (int i = 0; i < PER_VECTOR<T>; ++i) vector.values[i] = widen(stored[i]);
        return vector;
    }

    __device__ void store(T *to) const {
        uint4 raw;
        T *stored = reinterpret_cast<T *>(&raw);
#pragma unroll
        for (int i = 0; i < PER_VECTOR<T>; ++i) stored[i] = narrow<T>(values[i]);
        *reinterpret_cast<uint4 *>(to) = raw;
    }
};

// For element-wise kernels with THREADS threads per block and COUNT elements per thread: calls `whole(i)` for
// the COUNT elements that begin at i, or `single(i)` for each of fewer at the end.
template <int THREADS, int COUNT, typename Whole, typename Single>
__device__ void for_each_run(uint64_t elements, Whole whole, Single single) {
    uint64_t i = ((uint64_t)blockIdx.x * THREADS + threadIdx.x) * COUNT;
    if (i + COUNT <= elements) {
        whole(i);
    } else {
        for (; i < elements; ++i) single(i);
    }
}

// A number of elements that is known when the kernel is compiled, as an argument.
template <int N> struct Count {
    static constexpr int value = N;
};

// N elements as floats: 16 bytes at once, or one by one.
template <typename T, int N> __device__ void load_run(const T *from, float (&values)[N]) {
    if constexpr (N == PER_VECTOR<T>) {
        Vector<T> vector = Vector<T>::load(from);
#pragma unroll
        for (int j = 0; j < N; ++j) values[j] = vector.values[j];
    } else {
#pragma unroll
        for (int j = 0; j < N; ++j) values[j] = widen(from[j]);
    }
}

template <typename T, int N> __device__ void store_run(T *to, const float (&values)[N]) {
    if constexpr (N == PER_VECTOR<T>) {
        Vector<T> vector;
#pragma unroll
        for (int j = 0; j < N; ++j) vector.values[j] = values[j];
        vector.store(to);
    } else {
#pragma unroll
        for (int j = 0; j < N; ++j) to[j] = narrow<T>(values[j]);
    }
}

// N f32 parameters of the row's columns: with f16 rows a run is two vectors of f32.
template <int N> __device__ void load_parameters(const float *from, float (&values)[N]) {
    if constexpr (N % 4 == 0) {
#pragma unroll
        for (int j = 0; j < N; j += 4) {
            float4 four = *reinterpret_cast<const float4 *>(from + j);
            values[j] = four.x, values[j + 1] = four.y, values[j + 2] = four.z, values[j + 3] = four.w;
        }
    } else {
#pragma unroll
        for (int j = 0; j < N; ++j) values[j] = from[j];
    }
}
