// The gradient of a linear layer's bias, where it is trained
//
//   dbias[o] += scaling (sum over t of dY[t][o])
//
// Layouts   dY [tokens, features]; dbias [features] f32. Runs of COLUMN_SUM_RUN elements where the features allow.
// Launch    column_sum.cuh.
// Traffic   dY once.
#include "../storage.cuh"
#include "abi.h"
#include "column_sum.cuh"

template <int N, typename T>
__device__ void bias_gradient(const T *dy, float scaling, float *dbias, ColumnSumShape shape) {
    auto add = [&](uint32_t row, uint32_t column, float (&sums)[N]) {
        float values[N];
        load_run(dy + (size_t)row * shape.features + column, values);
#pragma unroll
        for (int j = 0; j < N; ++j) sums[j] += values[j];
    };
    column_sum<N>(shape, add, [&](uint32_t column, float sum) { dbias[column] += scaling * sum; });
}

#define BIAS_GRADIENT(name, T)                                                                     \
    extern "C" __global__ void __launch_bounds__(COLUMN_SUM_LANES * COLUMN_SUM_TOKEN_LANES)        \
        bias_gradient_##name(const T *dy, float scaling, float *dbias, ColumnSumShape shape) {     \
        if (shape.features % COLUMN_SUM_RUN == 0)                                                  \
            bias_gradient<COLUMN_SUM_RUN>(dy, scaling, dbias, shape);                              \
        else                                                                                       \
            bias_gradient<1>(dy, scaling, dbias, shape);                                           \
    }

BIAS_GRADIENT(f32, float)
BIAS_GRADIENT(f16, __half)
BIAS_GRADIENT(bf16, __nv_bfloat16)
