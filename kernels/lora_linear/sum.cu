// Sums of the partial results of other blocks, in their order: the same bits in every run
//
//   out[i] = (accumulate ? out[i] : 0) + scaling (partials[0][i] + partials[1][i] + ...)
//
// Layouts   partials [splits, count] and out [count], f32.
// Launch    LORA_SUM_THREADS threads of four elements each; grid (count / 4 / threads, sums), rounded up
//           for the longest.
// Traffic   4 count (splits + 1) bytes, and 4 count more to accumulate; splits FLOPs per element.
#include "abi.h"
#include "lora_linear/simt.cuh"

// Loads that are on their way together: there are few threads, and each has nothing else to do meanwhile.
constexpr int TOGETHER = 8;

extern "C" __global__ void __launch_bounds__(LORA_SUM_THREADS)
    lora_linear_sum(const __grid_constant__ LoraSums all) {
    const LoraSum &sum = all.sums[blockIdx.y];
    uint64_t first = ((uint64_t)blockIdx.x * LORA_SUM_THREADS + threadIdx.x) * 4;
    if (first >= sum.count) return;
    const float *partials = reinterpret_cast<const float *>(sum.partials);
    float *out = reinterpret_cast<float *>(sum.out);
    int present = sum.count - first < 4 ? (int)(sum.count - first) : 4;
    bool aligned = sum.count % 4 == 0 && sum.partials % 16 == 0 && sum.out % 16 == 0;

    auto load = [&](const float *from) {
        if (aligned) return *reinterpret_cast<const float4 *>(from);
        return make_float4(from[0], present > 1 ? from[1] : 0, present > 2 ? from[2] : 0,
                           present > 3 ? from[3] : 0);
    };
    float4 total = make_float4(0, 0, 0, 0);
    auto add = [&](float4 partial) {
        total = make_float4(total.x + partial.x, total.y + partial.y, total.z + partial.z, total.w + partial.w);
    };
    uint32_t split = 0;
    for (; split + TOGETHER <= sum.splits; split += TOGETHER) {
        float4 ahead[TOGETHER];
#pragma unroll
        for (int i = 0; i < TOGETHER; ++i) ahead[i] = load(partials + (split + i) * sum.count + first);
#pragma unroll
        for (int i = 0; i < TOGETHER; ++i) add(ahead[i]);
    }
    for (; split < sum.splits; ++split) add(load(partials + split * sum.count + first));
    float4 before = make_float4(0, 0, 0, 0);
    if (sum.accumulate) before = load(out + first);
    float4 after = make_float4(before.x + sum.scaling * total.x, before.y + sum.scaling * total.y,
                               before.z + sum.scaling * total.z, before.w + sum.scaling * total.w);
    if (aligned)
        *reinterpret_cast<float4 *>(out + first) = after;
    else
        for (int i = 0; i < present; ++i) out[first + i] = at(after, i);
}
