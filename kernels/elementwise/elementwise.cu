// Element-wise operations on whole tensors
//
//   cast        y = x, rounded to nearest even                between any two of f32, f16, bf16
//   add_assign  y = y + x
//   scale       x = factor * x
//   find_nonfinite  first = the smallest index of a NaN or an infinity
//
// Layouts   x, y [elements], aligned to 16 bytes; arithmetic in f32.
// Launch    ELEMENTWISE_THREADS threads per block; each takes one vector of 16 bytes (of the narrower
//           type's count in cast), the last vector element by element.
// Traffic   every element once in and once out; add_assign two in.
#include "../storage.cuh"
#include "abi.h"

template <typename From, typename To>
__device__ void cast(const From *x, To *y, uint64_t elements) {
    constexpr int COUNT = PER_VECTOR<From> > PER_VECTOR<To> ? PER_VECTOR<From> : PER_VECTOR<To>;
    for_each_run<ELEMENTWISE_THREADS, COUNT>(
        elements,
        [&](uint64_t i) {
            float values[COUNT];
#pragma unroll
            for (int j = 0; j < COUNT; j += PER_VECTOR<From>) {
                Vector<From> in = Vector<From>::load(x + i + j);
#pragma unroll
                for (int k = 0; k < PER_VECTOR<From>; ++k) values[j + k] = in.values[k];
            }
#pragma unroll
            for (int j = 0; j < COUNT; j += PER_VECTOR<To>) {
                Vector<To> out;
#pragma unroll
                for (int k = 0; k < PER_VECTOR<To>; ++k) out.values[k] = values[j + k];
                out.store(y + i + j);
            }
        },
        [&](uint64_t i) { y[i] = narrow<To>(widen(x[i])); });
}

template <typename T> __device__ void add_assign(const T *x, T *y, uint64_t elements) {
    for_each_run<ELEMENTWISE_THREADS, PER_VECTOR<T>>(
        elements,
        [&](uint64_t i) {
            Vector<T> a = Vector<T>::load(x + i), b = Vector<T>::load(y + i);
#pragma unroll
            for (int j = 0; j < PER_VECTOR<T>; ++j) b.values[j] += a.values[j];
            b.store(y + i);
        },
        [&](uint64_t i) { y[i] = narrow<T>(widen(y[i]) + widen(x[i])); });
}

template <typename T> __device__ void scale(T *x, float factor, uint64_t elements) {
    for_each_run<ELEMENTWISE_THREADS, PER_VECTOR<T>>(
        elements,
        [&](uint64_t i) {
            Vector<T> a = Vector<T>::load(x + i);
#pragma unroll
            for (int j = 0; j < PER_VECTOR<T>; ++j) a.values[j] *= factor;
            a.store(x + i);
        },
        [&](uint64_t i) { x[i] = narrow<T>(factor * widen(x[i])); });
}

// A minimum of integers is the same in any order, so this atomic keeps results reproducible. Indices from
// 2^32 - 2 on are all reported as that.
template <typename T> __device__ void find_nonfinite(const T *x, uint32_t *first, uint64_t elements) {
    auto report = [&](uint64_t i) { atomicMin(first, (uint32_t)min(i, (uint64_t)0xfffffffe)); };
    for_each_run<ELEMENTWISE_THREADS, PER_VECTOR<T>>(
        elements,
        [&](uint64_t i) {
            Vector<T> a = Vector<T>::load(x + i);
            for (int j = 0; j < PER_VECTOR<T>; ++j) {
                if (!isfinite(a.values[j])) {
                    report(i + j);
                    break;
                }
            }
        },
        [&](uint64_t i) {
            if (!isfinite(widen(x[i]))) report(i);
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
    KERNEL add_assign_##name(const T *x, T *y, uint64_t elements) { add_assign(x, y, elements); } \
    KERNEL scale_##name(T *x, float factor, uint64_t elements) { scale(x, factor, elements); }    \
    KERNEL find_nonfinite_##name(const T *x, uint32_t *first, uint64_t elements) {        \
        find_nonfinite(x, first, elements);                                               \
    }

IN_PLACE(f32, float)
IN_PLACE(f16, __half)
IN_PLACE(bf16, __nv_bfloat16)
