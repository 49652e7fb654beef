// Element-wise operations on whole tensors
//
//   cast        y = x, rounded to nearest even                between any two of f32, f16, bf16
//   add_assign  y = y + x
//   subtract_assign  y = y - x
//   scale       x = factor * x
//   find_nonfinite  first = the smallest index of a NaN or an infinity
//
// Layouts   x, y [elements], aligned to 16 bytes; arithmetic in f32.
// Launch    ELEMENTWISE_THREADS threads per block; each takes 16 bytes of elements (of the wider type in
//           cast), the last ones one by one.
// Traffic   every element once in and once out; add_assign and subtract_assign two in.
#include "../storage.cuh"
#include "abi.h"

template <typename From, typename To>
__device__ void cast(const From *x, To *y, uint64_t elements) {
    constexpr int RUN = sizeof(From) == sizeof(To) ? PER_VECTOR<From> : ELEMENTWISE_CAST_RUN;
    for_each_run<ELEMENTWISE_THREADS, RUN>(elements, [&](uint64_t i, auto count) {
        float values[decltype(count)::value];
        load_run(x + i, values);
        store_run(y + i, values);
    });
}

template <int sign, typename T> __device__ void add_assign(const T *x, T *y, uint64_t elements) {
    for_each_run<ELEMENTWISE_THREADS, PER_VECTOR<T>>(elements, [&](uint64_t i, auto count) {
        constexpr int N = decltype(count)::value;
        float a[N], b[N];
        load_run(x + i, a);
        load_run(y + i, b);
#pragma unroll
        for (int j = 0; j < N; ++j) b[j] += sign * a[j];
        store_run(y + i, b);
    });
}

template <typename T> __device__ void scale(T *x, float factor, uint64_t elements) {
    for_each_run<ELEMENTWISE_THREADS, PER_VECTOR<T>>(elements, [&](uint64_t i, auto count) {
        constexpr int N = decltype(count)::value;
        float a[N];
        load_run(x + i, a);
#pragma unroll
        for (int j = 0; j < N; ++j) a[j] *= factor;
        store_run(x + i, a);
    });
}

// A minimum of integers is the same in any order, so this atomic keeps results reproducible. Indices from
// 2^32 - 2 on are all reported as that.
template <typename T> __device__ void find_nonfinite(const T *x, uint32_t *first, uint64_t elements) {
    for_each_run<ELEMENTWISE_THREADS, PER_VECTOR<T>>(elements, [&](uint64_t i, auto count) {
        constexpr int N = decltype(count)::value;
        float a[N];
        load_run(x + i, a);
        for (int j = 0; j < N; ++j) {
            if (!isfinite(a[j])) {
                atomicMin(first, (uint32_t)min(i + j, (uint64_t)0xfffffffe));
                break;
            }
        }
    });
}

#define KERNEL extern "C" __global__ void __launch_bounds__(ELEMENTWISE_THREADS)

#define CAST(from, From, to, To)                                                          \
    KERNEL cast_##from##_##to(const From *x, To *y, uint64_t elements) { cast(x, y, elements); }

CAST(f32, float, f16, __half)
CAST(f32, float, bf16, __nv_bfloat16)
CAST(f16, __half, f32, float)
CAST(f16, __half, bf16, __nv_bfloat16)
CAST(bf16, __nv_bfloat16, f32, float)
CAST(bf16, __nv_bfloat16, f16, __half)

#define IN_PLACE(name, T)                                                                 \
    KERNEL add_assign_##name(const T *x, T *y, uint64_t elements) { add_assign<1>(x, y, elements); } \
    KERNEL subtract_assign_##name(const T *x, T *y, uint64_t elements) { add_assign<-1>(x, y, elements); } \
    KERNEL scale_##name(T *x, float factor, uint64_t elements) { scale(x, factor, elements); }    \
    KERNEL find_nonfinite_##name(const T *x, uint32_t *first, uint64_t elements) {        \
        find_nonfinite(x, first, elements);                                               \
    }

IN_PLACE(f32, float)
IN_PLACE(f16, __half)
IN_PLACE(bf16, __nv_bfloat16)
