// Sums of the partial results of other blocks, in their order: the same bits in every run
//
//   out[i] = (accumulate ? out[i] : 0) + scaling (partials[0][i] + partials[1][i] + ...)
//
// Layouts   partials [splits, count] and out [count], f32.
// Launch    LORA_THREADS threads of four elements each; grid (count / 4 / threads, sums), rounded up
//           for the longest.
// Traffic   4 count (splits + 1) bytes, and 4 count more to accumulate; splits FLOPs per element.
#include "abi.h"
#include "lora_linear/simt.cuh"

extern "C" __global__ void __launch_bounds__(LORA_THREADS)
    lora_linear_sum(const __grid_constant__ LoraSums all) {
    const LoraSum &sum = all.sums[blockIdx.y];
    uint64_t first = ((uint64_t)blockIdx.x * LORA_THREADS + threadIdx.x) * 4;
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
    for (uint32_t split = 0; split < sum.splits; ++split) {
        float4 partial = load(partials + split * sum.count + first);
        total = make_float4(total.x + partial.x, total.y + partial.y, total.z + partial.z,
                            total.w + partial.w);
    }
    float4 before = make_float4(0, 0, 0, 0);
    if (sum.accumulate) before = load(out + first);
    float4 after = make_float4(before.x + sum.scaling * total.x, before.y + sum.scaling * total.y,
                               before.z + sum.scaling * total.z, before.w + sum.scaling * total.w);
    if (aligned)
        *reinterpret_cast<float4 *>(out + first) = after;
    else
        for (int i = 0; i < present; ++i) out[first + i] = at(after, i);
}
