// LayerNorm, forward and backward (Ba et al. 2016)
//
//   mean[t] = mean_i x[t, i],  rstd[t] = 1 / sqrt(mean_i (x[t, i] - mean[t])^2 + eps)
//   n = (x - mean) rstd,  y = n weight + bias
//   recompute     y from x, mean and rstd
//   backward      g = dy weight:  dx += rstd (g - mean(g) - n mean(g n))
//   gradients     dweight += sum_t dy n,  dbias += sum_t dy
//
// Layouts, launch and traffic as rms_norm.cu; the variance takes one more pass over a row in cache, because
// the difference of two large sums of squares would lose it.
#include "../reduce.cuh"
#include "../storage.cuh"
#include "abi.h"

template <typename T>
__device__ void write(const T *x, float mean, float rstd, const float *weight, const float *bias, T *y,
                      size_t row, uint32_t width) {
    for_each_in_row(width, [&](uint32_t i, auto count) {
        constexpr int N = decltype(count)::value;
        float a[N], w[N], b[N];
        load_run(x + row + i, a);
        load_run(weight + i, w);
        load_run(bias + i, b);
#pragma unroll
        for (int j = 0; j < N; ++j) a[j] = (a[j] - mean) * rstd * w[j] + b[j];
        store_run(y + row + i, a);
    });
}

template <typename T>
__device__ void forward(const T *x, const float *weight, const float *bias, T *y, float *means, float *rstds,
                        NormShape shape) {
    __shared__ float scratch[32];
    size_t row = (size_t)blockIdx.x * shape.width;
    float sum = 0.0f;
    for_each_in_row(shape.width, [&](uint32_t i, auto count) {
        constexpr int N = decltype(count)::value;
        float a[N];
        load_run(x + row + i, a);
#pragma unroll
        for (int j = 0; j < N; ++j) sum += a[j];
    });
    float mean = block_reduce<Sum>(sum, scratch) / shape.width;
    float squares = 0.0f;
    for_each_in_row(shape.width, [&](uint32_t i, auto count) {
        constexpr int N = decltype(count)::value;
        float a[N];
        load_run(x + row + i, a);
#pragma unroll
        for (int j = 0; j < N; ++j) squares += (a[j] - mean) * (a[j] - mean);
    });
    float rstd = rsqrtf(block_reduce<Sum>(squares, scratch) / shape.width + shape.eps);
    write(x, mean, rstd, weight, bias, y, row, shape.width);
    if (threadIdx.x == 0) {
        means[blockIdx.x] = mean;
        rstds[blockIdx.x] = rstd;
    }
}

template <typename T>
__device__ void backward(const T *dy, const T *x, const float *means, const float *rstds, const float *weight,
                         T *dx, NormShape shape) {
    __shared__ float scratch[32];
    size_t row = (size_t)blockIdx.x * shape.width;
    float mean = means[blockIdx.x], rstd = rstds[blockIdx.x];
    float sum = 0.0f, products = 0.0f;
    for_each_in_row(shape.width, [&](uint32_t i, auto count) {
        constexpr int N = decltype(count)::value;
        float g[N], a[N], w[N];
        load_run(dy + row + i, g);
        load_run(x + row + i, a);
        load_run(weight + i, w);
#pragma unroll
        for (int j = 0; j < N; ++j) {
            sum += g[j] * w[j];
            products += g[j] * w[j] * (a[j] - mean) * rstd;
        }
    });
    float mean_g = block_reduce<Sum>(sum, scratch) / shape.width;
    float mean_gn = block_reduce<Sum>(products, scratch) / shape.width;
    for_each_in_row(shape.width, [&](uint32_t i, auto count) {
        constexpr int N = decltype(count)::value;
        float g[N], a[N], w[N], d[N];
        load_run(dy + row + i, g);
        load_run(x + row + i, a);
        load_run(weight + i, w);
        load_run(dx + row + i, d);
#pragma unroll
        for (int j = 0; j < N; ++j) d[j] += rstd * (g[j] * w[j] - mean_g - (a[j] - mean) * rstd * mean_gn);
        store_run(dx + row + i, d);
    });
}

template <typename T>
__device__ void gradients(const T *dy, const T *x, const float *means, const float *rstds, float *dweight,
                          float *dbias, NormShape shape) {
    __shared__ float weights[NORM_ROW_LANES][NORM_COLUMNS];
    __shared__ float biases[NORM_ROW_LANES][NORM_COLUMNS];
    uint32_t column = blockIdx.x * NORM_COLUMNS + threadIdx.x;
    float w = 0.0f, b = 0.0f;
    if (column < shape.width)
        for (uint32_t t = threadIdx.y; t < shape.tokens; t += NORM_ROW_LANES) {
            size_t i = (size_t)t * shape.width + column;
            float g = widen(dy[i]);
            w += g * (widen(x[i]) - means[t]) * rstds[t];
            b += g;
        }
    weights[threadIdx.y][threadIdx.x] = w;
    biases[threadIdx.y][threadIdx.x] = b;
    __syncthreads();
    if (threadIdx.y == 0 && column < shape.width) {
        for (uint32_t lane = 1; lane < NORM_ROW_LANES; ++lane) {
            w += weights[lane][threadIdx.x];
            b += biases[lane][threadIdx.x];
        }
        dweight[column] += w;
        dbias[column] += b;
    }
}

#define KERNEL extern "C" __global__ void __launch_bounds__(NORM_MAX_THREADS)

#define LAYER_NORM(name, T)                                                                          \
    KERNEL layer_norm_forward_##name(const T *x, const float *weight, const float *bias, T *y,       \
                                     float *mean, float *rstd, NormShape shape) {                    \
        forward<T>(x, weight, bias, y, mean, rstd, shape);                                           \
    }                                                                                                \
    KERNEL layer_norm_recompute_##name(const T *x, const float *mean, const float *rstd,             \
                                       const float *weight, const float *bias, T *y, NormShape shape) { \
        write<T>(x, mean[blockIdx.x], rstd[blockIdx.x], weight, bias, y,                             \
                 (size_t)blockIdx.x * shape.width, shape.width);                                     \
    }                                                                                                \
    KERNEL layer_norm_backward_##name(const T *dy, const T *x, const float *mean, const float *rstd, \
                                      const float *weight, T *dx, NormShape shape) {                 \
        backward<T>(dy, x, mean, rstd, weight, dx, shape);                                           \
    }                                                                                                \
    KERNEL layer_norm_gradients_##name(const T *dy, const T *x, const float *mean, const float *rstd, \
                                       float *dweight, float *dbias, NormShape shape) {              \
        gradients<T>(dy, x, mean, rstd, dweight, dbias, shape);                                      \
    }

LAYER_NORM(f32, float)
LAYER_NORM(f16, __half)
LAYER_NORM(bf16, __nv_bfloat16)
