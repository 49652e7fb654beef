// RMSNorm, forward and backward (Zhang and Sennrich 2019)
//
//   rstd[t] = 1 / sqrt(mean_i x[t, i]^2 + eps),  y[t, i] = x[t, i] rstd[t] weight[i]
//   forward_add   sum = residual + delta first, and x is that sum as it is stored
//   recompute     y from x and rstd
//   backward      g = dy weight:  dx += rstd (g - x rstd^2 mean(g x))
//   dweight       dweight[i] += sum_t dy[t, i] x[t, i] rstd[t]
//
// Layouts   x, y, residual, delta, sum, dy, dx [tokens, width] of T (f32, f16, bf16); weight, dweight [width]
//           and rstd [tokens] f32. Aligned to 16 bytes. Arithmetic in f32.
// Launch    one block of 32 to 256 threads per token; dweight: NORM_COLUMNS x NORM_ROW_LANES threads per
//           NORM_COLUMNS columns, so that its sums have one order.
// Memory    forward keeps a row in registers where it fits; else a row is read twice, the second time from cache,
//           so any width will do.
// Traffic   forward: 1 in, 1 out; forward_add 2 in, 2 out; backward 3 in, 1 out; dweight 2 in.
#include "../reduce.cuh"
#include "../storage.cuh"
#include "abi.h"

// Runs of a row that a thread keeps.
constexpr int KEPT_RUNS = 4;

__device__ bool fits_registers(uint32_t width) {
    return width % ROW_RUN == 0 && width <= KEPT_RUNS * ROW_RUN * blockDim.x;
}

// `forward` of a row that fits registers.
template <typename T>
__device__ void forward_kept(const T *x, const float *weight, T *y, float *rstd, NormShape shape, float *scratch) {
    float kept[KEPT_RUNS][ROW_RUN];
    auto place = [](int run) { return (run * blockDim.x + threadIdx.x) * ROW_RUN; };
#pragma unroll
    for (int run = 0; run < KEPT_RUNS; ++run) {
        if (place(run) < shape.width) {
            load_run(x + place(run), kept[run]);
        } else {
#pragma unroll
            for (int j = 0; j < ROW_RUN; ++j) kept[run][j] = 0.0f;
        }
    }
    float squares = 0.0f;
#pragma unroll
    for (int run = 0; run < KEPT_RUNS; ++run)
#pragma unroll
        for (int j = 0; j < ROW_RUN; ++j) squares += kept[run][j] * kept[run][j];
    float inverse = rsqrtf(block_reduce<Sum>(squares, scratch) / shape.width + shape.eps);
#pragma unroll
    for (int run = 0; run < KEPT_RUNS; ++run) {
        if (place(run) >= shape.width) continue;
        float w[ROW_RUN];
        load_run(weight + place(run), w);
#pragma unroll
        for (int j = 0; j < ROW_RUN; ++j) kept[run][j] *= inverse * w[j];
        store_run(y + place(run), kept[run]);
    }
    if (threadIdx.x == 0) *rstd = inverse;
}

template <typename T, bool add>
__device__ void forward(const T *x, const T *delta, T *sum, const float *weight, T *y, float *rstd, NormShape shape) {
    __shared__ float scratch[32];
    size_t row = (size_t)blockIdx.x * shape.width;
    float squares = 0.0f;
    if constexpr (!add) {
        if (fits_registers(shape.width))
            return forward_kept(x + row, weight, y + row, rstd + blockIdx.x, shape, scratch);
    }
    for_each_in_row(shape.width, [&](uint32_t i, auto count) {
        constexpr int N = decltype(count)::value;
        float a[N];
        load_run(x + row + i, a);
        if constexpr (add) {
            float b[N];
            load_run(delta + row + i, b);
#pragma unroll
            for (int j = 0; j < N; ++j) a[j] = widen(narrow<T>(a[j] + b[j]));
            store_run(sum + row + i, a);
        }
#pragma unroll
        for (int j = 0; j < N; ++j) squares += a[j] * a[j];
    });
    float inverse = rsqrtf(block_reduce<Sum>(squares, scratch) / shape.width + shape.eps);
    // Each thread reads back what it wrote itself.
    const T *normed = add ? sum : x;
    for_each_in_row(shape.width, [&](uint32_t i, auto count) {
        constexpr int N = decltype(count)::value;
        float a[N], w[N];
        load_run(normed + row + i, a);
        load_run(weight + i, w);
#pragma unroll
        for (int j = 0; j < N; ++j) a[j] *= inverse * w[j];
        store_run(y + row + i, a);
    });
    if (threadIdx.x == 0) rstd[blockIdx.x] = inverse;
}

template <typename T>
__device__ void recompute(const T *x, const float *rstd, const float *weight, T *y, NormShape shape) {
    size_t row = (size_t)blockIdx.x * shape.width;
    float inverse = rstd[blockIdx.x];
    for_each_in_row(shape.width, [&](uint32_t i, auto count) {
        constexpr int N = decltype(count)::value;
        float a[N], w[N];
        load_run(x + row + i, a);
        load_run(weight + i, w);
#pragma unroll
        for (int j = 0; j < N; ++j) a[j] *= inverse * w[j];
        store_run(y + row + i, a);
    });
}

template <typename T>
__device__ void backward(const T *dy, const T *x, const float *rstd, const float *weight, T *dx, NormShape shape) {
    __shared__ float scratch[32];
    size_t row = (size_t)blockIdx.x * shape.width;
    float inverse = rstd[blockIdx.x];
    float products = 0.0f;
    for_each_in_row(shape.width, [&](uint32_t i, auto count) {
        constexpr int N = decltype(count)::value;
        float g[N], a[N], w[N];
        load_run(dy + row + i, g);
        load_run(x + row + i, a);
        load_run(weight + i, w);
#pragma unroll
        for (int j = 0; j < N; ++j) products += g[j] * w[j] * a[j];
    });
    float mean = block_reduce<Sum>(products, scratch) / shape.width * inverse * inverse;
    for_each_in_row(shape.width, [&](uint32_t i, auto count) {
        constexpr int N = decltype(count)::value;
        float g[N], a[N], w[N], d[N];
        load_run(dy + row + i, g);
        load_run(x + row + i, a);
        load_run(weight + i, w);
        load_run(dx + row + i, d);
#pragma unroll
        for (int j = 0; j < N; ++j) d[j] += inverse * (g[j] * w[j] - a[j] * mean);
        store_run(dx + row + i, d);
    });
}

template <typename T>
__device__ void dweight(const T *dy, const T *x, const float *rstd, float *dweight, NormShape shape) {
    __shared__ float partial[NORM_ROW_LANES][NORM_COLUMNS];
    uint32_t column = blockIdx.x * NORM_COLUMNS + threadIdx.x;
    float sum = 0.0f;
    if (column < shape.width)
        for (uint32_t t = threadIdx.y; t < shape.tokens; t += NORM_ROW_LANES) {
            size_t i = (size_t)t * shape.width + column;
            sum += widen(dy[i]) * widen(x[i]) * rstd[t];
        }
    partial[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && column < shape.width) {
        for (uint32_t lane = 1; lane < NORM_ROW_LANES; ++lane) sum += partial[lane][threadIdx.x];
        dweight[column] += sum;
    }
}

#define KERNEL extern "C" __global__ void __launch_bounds__(NORM_MAX_THREADS)

#define RMS_NORM(name, T)                                                                           \
    KERNEL rms_norm_forward_##name(const T *x, const float *weight, T *y, float *rstd, NormShape shape) { \
        forward<T, false>(x, nullptr, nullptr, weight, y, rstd, shape);                             \
    }                                                                                               \
    KERNEL rms_norm_forward_add_##name(const T *residual, const T *delta, T *sum, const float *weight, \
                                       T *y, float *rstd, NormShape shape) {                        \
        forward<T, true>(residual, delta, sum, weight, y, rstd, shape);                             \
    }                                                                                               \
    KERNEL rms_norm_recompute_##name(const T *x, const float *rstd, const float *weight, T *y,      \
                                     NormShape shape) {                                             \
        recompute<T>(x, rstd, weight, y, shape);                                                    \
    }                                                                                               \
    KERNEL rms_norm_backward_##name(const T *dy, const T *x, const float *rstd, const float *weight, \
                                    T *dx, NormShape shape) {                                       \
        backward<T>(dy, x, rstd, weight, dx, shape);                                                \
    }                                                                                               \
    KERNEL rms_norm_dweight_##name(const T *dy, const T *x, const float *rstd, float *dweight_,     \
                                   NormShape shape) {                                               \
        dweight<T>(dy, x, rstd, dweight_, shape);                                                   \
    }

RMS_NORM(f32, float)
RMS_NORM(f16, __half)
RMS_NORM(bf16, __nv_bfloat16)
