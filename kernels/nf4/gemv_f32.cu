// A linear layer with an NF4 weight for at most 8 tokens, f32
//
//   y [tokens, out] = x . weight^T + scaling h . lora_b^T + bias
//
// Layouts   as in gemv_16bit.cu, with x and y f32.
// Launch    NF4_GEMV_THREADS threads per NF4_GEMV_ROWS rows of the weight; grid (out / rows), rounded up. The warps
//           take turns along in, 128 columns at a time: a lane holds 4 neighbouring columns of x for every row.
// Shared    16 floats: one bank each, so any mix of codes reads without a conflict. The warps' sums, 5 KB.
// Registers NF4_GEMV_ROWS sums of one token; the weight is read again for the next, from cache.
// Traffic   at least out in / 2 + 4 out in / block_size bytes, x and y; 2 tokens out in FLOPs.
#include "nf4/gemv.cuh"
#include "reduce.cuh"

constexpr int STEP = 128;

extern "C" __global__ void __launch_bounds__(NF4_GEMV_THREADS) nf4_gemv_f32(const __grid_constant__ Nf4Gemv shape) {
    __shared__ float quant_map[16];
    __shared__ Partials partials;
    uint32_t row0 = blockIdx.x * NF4_GEMV_ROWS;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (threadIdx.x < 16) quant_map[threadIdx.x] = NF4_QUANT_MAP[threadIdx.x];
    __syncthreads();

    for (uint32_t token = 0; token < shape.tokens; ++token) {
        const float *x = reinterpret_cast<const float *>(shape.x) + (size_t)token * shape.in_features;
        float sums[NF4_GEMV_ROWS] = {};
        for (uint32_t col = warp * STEP + lane * 4; col < shape.in_features; col += WARPS * STEP) {
            float own[4];
            load_run(x + col, own);
#pragma unroll
            for (int i = 0; i < NF4_GEMV_ROWS; ++i) {
                uint64_t index = (uint64_t)min(row0 + i, shape.out_features - 1) * shape.in_features + col;
                uint32_t word = *reinterpret_cast<const uint16_t *>(shape.weight.packed + index / 2);
                float sum = 0;
#pragma unroll
                for (int j = 0; j < 4; ++j) sum += own[j] * quant_map[nf4_code(word, j)];
                sums[i] += nf4_absmax(shape.weight, index) * sum;
            }
        }
#pragma unroll
        for (int i = 0; i < NF4_GEMV_ROWS; ++i) {
            float sum = warp_reduce<Sum>(sums[i]);
            if (lane == i) partials[warp][token][i] = sum + low_rank_share(shape, token, row0 + i, warp);
        }
    }
    __syncthreads();
    store_sums<float>(shape, partials, row0);
}
