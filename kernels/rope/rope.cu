// Rotary position embedding in place (Su et al. 2021), on the halves of a head as GPT-NeoX pairs them
//
//   (a, b) -> (a cos - b s, b cos + a s),  a = x[t, h, i], b = x[t, h, i + half], i < half
//   with cos, sin at [positions[t], i] and s = direction sin: +1 forward, -1 backward
//
// Layouts   x [tokens, heads head_dim] of T; positions [tokens] u32; cos, sin [table_rows, half] f32.
//           Elements of a head from 2 half on stay. A position beyond the table traps.
// Launch    one block of ROPE_THREADS per token; a thread takes ROW_RUN pairs at a time where half and
//           head_dim are multiples of it, else one.
// Traffic   the rotary part of x once in and once out; the tables from cache.
#include "../storage.cuh"
#include "abi.h"

template <typename T, int N>
__device__ void turn(T *token, const float *cos, const float *sin, RopeShape shape) {
    uint32_t runs = shape.half / N;
    for (uint32_t run = threadIdx.x; run < shape.heads * runs; run += ROPE_THREADS) {
        uint32_t i = run % runs * N;
        T *first = token + run / runs * shape.head_dim + i;
        T *second = first + shape.half;
        float a[N], b[N], c[N], s[N];
        load_run(first, a);
        load_run(second, b);
        load_run(cos + i, c);
        load_run(sin + i, s);
#pragma unroll
        for (int j = 0; j < N; ++j) {
            float was = a[j], turn = shape.direction * s[j];
            a[j] = was * c[j] - b[j] * turn;
            b[j] = b[j] * c[j] + was * turn;
        }
        store_run(first, a);
        store_run(second, b);
    }
}

template <typename T>
__device__ void rope(T *x, const uint32_t *positions, const float *cos, const float *sin, RopeShape shape) {
    uint32_t position = positions[blockIdx.x];
    if (position >= shape.table_rows) __trap();
    cos += (size_t)position * shape.half;
    sin += (size_t)position * shape.half;
    T *token = x + (size_t)blockIdx.x * shape.heads * shape.head_dim;
    if (shape.half % ROW_RUN == 0 && shape.head_dim % ROW_RUN == 0)
        turn<T, ROW_RUN>(token, cos, sin, shape);
    else
        turn<T, 1>(token, cos, sin, shape);
}

#define ROPE(name, T)                                                                            \
    extern "C" __global__ void __launch_bounds__(ROPE_THREADS) rope_##name(                      \
        T *x, const uint32_t *positions, const float *cos, const float *sin, RopeShape shape) {  \
        rope<T>(x, positions, cos, sin, shape);                                                  \
    }

ROPE(f32, float)
ROPE(f16, __half)
ROPE(bf16, __nv_bfloat16)
