// How the kernels over many tensors share them out
#pragma once

#include "storage.cuh"
#include "abi.h"

// The tensor that this block works on, and the first element of its chunk.
struct Chunk {
    OptimizerTensor tensor;
    uint32_t begin, end;

    __device__ Chunk(const OptimizerTable &table) {
        uint32_t i = 0;
        static_assert(OPTIMIZER_TENSORS <= 64, "the steps reach every tensor");
        for (uint32_t step = 32; step > 0; step /= 2)
            if (i + step < table.count && blockIdx.x >= table.tensors[i + step].first_block) i += step;
        tensor = table.tensors[i];
        begin = (blockIdx.x - tensor.first_block) * OPTIMIZER_CHUNK;
        end = min(tensor.elements, begin + OPTIMIZER_CHUNK);
    }

    // Calls `body(i, count)` for this thread's elements, four at a time while there are four.
    template <typename Body> __device__ void for_each(Body body) const {
        for (uint32_t i = begin + 4 * threadIdx.x; i < end; i += 4 * OPTIMIZER_THREADS) {
            if (i + 4 <= end)
                body(i, Count<4>());
            else
                for (uint32_t j = i; j < end; ++j) body(j, Count<1>());
        }
    }
};

// What every gradient is multiplied by.
__device__ inline float clip_factor(const AdamWStep &step, float norm) {
    return step.max_grad_norm > 0.0f ? fminf(1.0f, step.max_grad_norm / (norm + 1e-6f)) : 1.0f;
}
