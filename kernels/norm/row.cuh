// What the norms share: a block walks one row of a [tokens, width] matrix, 16 bytes per thread and step
// where the width allows, else one element.
#pragma once

#include "../reduce.cuh"
#include "../storage.cuh"

// Calls `body(i, count)` for the runs of the row that are this thread's.
template <typename T, typename Body> __device__ void for_each_in_row(uint32_t width, Body body) {
    if (width % PER_VECTOR<T> == 0) {
        for (uint32_t i = threadIdx.x * PER_VECTOR<T>; i < width; i += blockDim.x * PER_VECTOR<T>)
            body(i, Count<PER_VECTOR<T>>());
    } else {
        for (uint32_t i = threadIdx.x; i < width; i += blockDim.x) body(i, Count<1>());
    }
}
