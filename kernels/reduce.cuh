// Sums and maxima over a warp or a block, in one fixed order.
#pragma once

struct Sum {
    __device__ static float combine(float a, float b) { return a + b; }
};

struct Max {
    __device__ static float combine(float a, float b) { return fmaxf(a, b); }
};

// The reduction of one value per lane, in every lane.
template <typename Operation> __device__ float warp_reduce(float x) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2)
        x = Operation::combine(x, __shfl_xor_sync(0xffffffff, x, distance));
    return x;
}

// The reduction of one value per thread of a block of whole warps, in every thread. `scratch` is shared
// memory for 32 floats, free again after the next barrier.
template <typename Operation> __device__ float block_reduce(float x, float *scratch) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    x = warp_reduce<Operation>(x);
    if (warps == 1) return x;
    __syncthreads();  // an earlier reduction's reads are done
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    float all = scratch[0];
    for (int i = 1; i < warps; ++i) all = Operation::combine(all, scratch[i]);
    return all;
}
