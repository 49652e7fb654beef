// The magnitudes of DoRA (Liu et al. 2024), with the norm of the weight as a constant
//
//   gain       gain[o] = magnitude[o] / norm[o]
//   forward    y[t][o] = gain[o] z[t][o] + bias[o]                         bias may be null
//   backward   dz[t][o] = gain[o] dy[t][o]
//              dmagnitude[o] += (sum over t of dy[t][o] z[t][o]) / norm[o]
//   scale_rows W[o][i] *= gain[o]                                           what forward does, to a merged weight
//
// Layouts   z, y, dy, dz [tokens, features]; gain, norm, magnitude, dmagnitude, bias [features] f32;
//           W [features, in_features] f32. Runs of ROW_RUN elements where rows allow.
// Launch    gain: DORA_THREADS features per block. forward, scale_rows: one block of DORA_THREADS per row.
//           backward: column_sum.cuh.
// Traffic   forward: each of z and y once. backward: dy, z and dz once. scale_rows: W in and out. The vectors
//           are read by every token's block, from cache.
#include "../storage.cuh"
#include "abi.h"
#include "column_sum.cuh"

extern "C" __global__ void __launch_bounds__(DORA_THREADS)
    dora_gain(const float *magnitude, const float *norm, float *gain, uint32_t features) {
    uint32_t o = blockIdx.x * DORA_THREADS + threadIdx.x;
    if (o < features) gain[o] = magnitude[o] / norm[o];
}

extern "C" __global__ void __launch_bounds__(DORA_THREADS)
    dora_scale_rows(float *weight, const float *gain, uint32_t in_features) {
    float factor = gain[blockIdx.x];
    float *row = weight + (size_t)blockIdx.x * in_features;
    for_each_in_row(in_features, [&](uint32_t i, auto count) {
        float values[decltype(count)::value];
        load_run(row + i, values);
        for (float &value : values) value *= factor;
        store_run(row + i, values);
    });
}

template <typename T>
__device__ void forward(const T *z, const float *gain, const float *bias, T *y, uint32_t features) {
    size_t row = (size_t)blockIdx.x * features;
    for_each_in_row(features, [&](uint32_t i, auto count) {
        constexpr int N = decltype(count)::value;
        float values[N], g[N], b[N] = {};
        load_run(z + row + i, values);
        load_run(gain + i, g);
        if (bias) load_run(bias + i, b);
#pragma unroll
        for (int j = 0; j < N; ++j) values[j] = g[j] * values[j] + b[j];
        store_run(y + row + i, values);
    });
}

template <int N, typename T>
__device__ void backward(const T *dy, const T *z, const float *gain, const float *norm, T *dz, float *dmagnitude,
                         ColumnSumShape shape) {
    auto add = [&](uint32_t row, uint32_t column, float (&sums)[N]) {
        size_t i = (size_t)row * shape.features + column;
        float d[N], values[N], g[N];
        load_run(dy + i, d);
        load_run(z + i, values);
        load_run(gain + column, g);
#pragma unroll
        for (int j = 0; j < N; ++j) {
            sums[j] += d[j] * values[j];
            d[j] *= g[j];
        }
        store_run(dz + i, d);
    };
    column_sum<N>(shape, add, [&](uint32_t column, float sum) { dmagnitude[column] += sum / norm[column]; });
}

#define DORA(name, T)                                                                                          \
    extern "C" __global__ void __launch_bounds__(DORA_THREADS)                                                 \
        dora_forward_##name(const T *z, const float *gain, const float *bias, T *y, uint32_t features) {       \
        forward(z, gain, bias, y, features);                                                                   \
    }                                                                                                          \
    extern "C" __global__ void __launch_bounds__(COLUMN_SUM_LANES * COLUMN_SUM_TOKEN_LANES)                    \
        dora_backward_##name(const T *dy, const T *z, const float *gain, const float *norm, T *dz,             \
                             float *dmagnitude, ColumnSumShape shape) {                                        \
        if (shape.features % COLUMN_SUM_RUN == 0)                                                              \
            backward<COLUMN_SUM_RUN>(dy, z, gain, norm, dz, dmagnitude, shape);                                \
        else                                                                                                   \
            backward<1>(dy, z, gain, norm, dz, dmagnitude, shape);                                             \
    }

DORA(f32, float)
DORA(f16, __half)
DORA(bf16, __nv_bfloat16)
