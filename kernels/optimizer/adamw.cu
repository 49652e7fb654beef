// AdamW over many tensors at once, clipped by their global gradient norm
//
//   norm    squares[b] = sum of g^2 over the elements of block b;  norm = sqrt(sum_b squares[b])
//   adamw   g *= min(1, max_grad_norm / (norm + 1e-6))          where max_grad_norm > 0
//           p *= 1 - lr weight_decay,  m += (1 - beta1)(g - m),  v = beta2 v + (1 - beta2) g^2
//           p -= step_size m / (sqrt(v) inv_sqrt_correction2 + eps),  step_size = lr / (1 - beta1^t)
//
// as PyTorch's AdamW and clip_grad_norm_ compute it. The norm is read from the device, so the host never
// waits for it; where it is not finite, adamw changes nothing. What depends on the step is read from the
// device too, so that a launch may be repeated as it was.
//
// Layouts   a table of up to OPTIMIZER_TENSORS tensors by value; p, g, m, v [elements] f32 each;
//           rates [tensors of all launches].
// Launch    OPTIMIZER_THREADS threads per block, OPTIMIZER_CHUNK elements of one tensor per block; a block
//           finds its tensor in the table. Sums run in one order; partial sums are f64.
// Traffic   norm: g in. adamw: p, g, m, v in; p, m, v out: 28 bytes per element.
#include "optimizer/chunk.cuh"

// The sum over the block, in one order.
__device__ double block_sum(double x) {
    __shared__ double partial[OPTIMIZER_THREADS / 32];
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffff, x, distance);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
    __syncthreads();
    double all = partial[0];
#pragma unroll
    for (int warp = 1; warp < OPTIMIZER_THREADS / 32; ++warp) all += partial[warp];
    return all;
}

extern "C" __global__ void __launch_bounds__(OPTIMIZER_THREADS)
    gradient_squares(const __grid_constant__ OptimizerTable table, float *squares) {
    Chunk chunk(table);
    const float *grad = reinterpret_cast<const float *>(chunk.tensor.grad);
    // A thread's few squares lose nothing in f32; the many that are summed over threads would.
    float sum = 0.0f;
    constexpr uint32_t RUN = 4, STEP = RUN * OPTIMIZER_THREADS, RUNS = OPTIMIZER_CHUNK / STEP;
    float g[RUNS][RUN]; // all on their way before the first is needed
#pragma unroll
    for (uint32_t run = 0; run < RUNS; ++run) {
        uint32_t i = chunk.begin + run * STEP + RUN * threadIdx.x;
        if (i + RUN <= chunk.end) {
            load_run(grad + i, g[run]);
        } else {
#pragma unroll
            for (uint32_t j = 0; j < RUN; ++j) g[run][j] = i + j < chunk.end ? grad[i + j] : 0.0f;
        }
    }
#pragma unroll
    for (uint32_t run = 0; run < RUNS; ++run)
#pragma unroll
        for (uint32_t j = 0; j < RUN; ++j) sum += g[run][j] * g[run][j];
    double total = block_sum(sum);
    if (threadIdx.x == 0) squares[blockIdx.x] = (float)total;
}

extern "C" __global__ void __launch_bounds__(OPTIMIZER_THREADS)
    gradient_norm(const float *squares, uint32_t count, float *norm) {
    double sum = 0.0;
#pragma unroll 8
    for (uint32_t i = threadIdx.x; i < count; i += OPTIMIZER_THREADS) sum += squares[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) *norm = (float)sqrt(sum);
}

extern "C" __global__ void __launch_bounds__(OPTIMIZER_THREADS)
    adamw(const __grid_constant__ OptimizerTable table, const __grid_constant__ AdamWStep step, const AdamWRate *rates,
          const float *norm) {
    if (!isfinite(*norm)) return;
    Chunk chunk(table);
    float *param = reinterpret_cast<float *>(chunk.tensor.param);
    const float *grad = reinterpret_cast<const float *>(chunk.tensor.grad);
    float *m = reinterpret_cast<float *>(chunk.tensor.m);
    float *v = reinterpret_cast<float *>(chunk.tensor.v);
    AdamWRate rate = rates[chunk.tensor.rate];
    float clip = clip_factor(step, *norm);
    chunk.for_each([&](uint32_t i, auto count) {
        constexpr int N = decltype(count)::value;
        float p[N], g[N], first[N], second[N];
        load_run(param + i, p);
        load_run(grad + i, g);
        load_run(m + i, first);
        load_run(v + i, second);
#pragma unroll
        for (int j = 0; j < N; ++j) {
            float clipped = g[j] * clip;
            first[j] += step.new1 * (clipped - first[j]);
            second[j] = step.keep2 * second[j] + step.new2 * clipped * clipped;
            p[j] = p[j] * rate.decay -
                   rate.step_size * first[j] / (sqrtf(second[j]) * rate.inv_sqrt_correction2 + step.eps);
        }
        store_run(param + i, p);
        store_run(m + i, first);
        store_run(v + i, second);
    });
}
