// Small kernels that between them use most of what nvcc writes for compute_80.
#include <cassert>
#include <cstdio>
#include <cuda_bf16.h>

__constant__ float table[4] = {1.0f, 2.0f, 4.0f, 8.0f};
__device__ int counter;

extern "C" __global__ void saxpy(int n, float a, const float *x, float *y) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = a * x[i] + y[i];
}

// Sum of each block by shared memory and shuffles.
extern "C" __global__ void block_sum(int n, const float *x, float *out) {
  __shared__ float partial[32];
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  float sum = i < n ? x[i] : 0.0f;
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_down_sync(0xffffffffu, sum, offset);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x < 32) {
    sum = threadIdx.x < blockDim.x / 32 ? partial[threadIdx.x] : 0.0f;
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_down_sync(0xffffffffu, sum, offset);
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
  }
}

extern "C" __global__ void reverse_dynamic(int n, int *data) {
  extern __shared__ int tile[];
  tile[threadIdx.x] = data[threadIdx.x];
  __syncthreads();
  data[threadIdx.x] = tile[n - 1 - threadIdx.x];
}

__device__ __noinline__ float poly(float x, int degree) {
  float sum = 0.0f;
  for (int k = degree; k >= 0; --k) sum = sum * x + table[k & 3];
  return sum;
}

extern "C" __global__ void calls(const float *x, float *y) {
  int i = threadIdx.x;
  y[i] = i % 3 == 0 ? poly(x[i], i % 5) : poly(x[i], 2) - 1.0f;
}

typedef int (*Operation)(int, int);
__device__ __noinline__ int plus(int a, int b) { return a + b; }
__device__ __noinline__ int times(int a, int b) { return a * b; }
__device__ Operation operations[2] = {plus, times};

extern "C" __global__ void through_pointers(int *data) {
  data[threadIdx.x] = operations[threadIdx.x % 2](data[threadIdx.x], 3);
}

extern "C" __global__ void count(int limit) {
  if (threadIdx.x < limit) atomicAdd(&counter, 1);
}

extern "C" __global__ void say(int value) {
  printf("thread %d of %u: %5.2f %s %lld\n", threadIdx.x, blockDim.x, value * 0.5, "text", 1ll << 40);
}

extern "C" __global__ void must_be_positive(int value) { assert(value > 0); }

extern "C" __global__ void local_array(const int *order, int *out) {
  int values[16];
  for (int i = 0; i < 16; ++i) values[i] = i * i;
  for (int i = 0; i < 16; ++i) values[order[i] & 15] += i + threadIdx.x;
  out[threadIdx.x] = values[order[threadIdx.x & 15] & 15];
}

struct Params { float scale; int n; float *out; char filler[100]; };
extern "C" __global__ void by_value(const __grid_constant__ Params params) {
  const Params *p = &params;
  if (threadIdx.x < p->n) p->out[threadIdx.x] = p->scale * threadIdx.x + p->filler[threadIdx.x % 100];
}

extern "C" __global__ void choose(int *data) {
  int v = data[threadIdx.x];
  switch (v) {
    case 0: v = 17; break;
    case 1: v = v * 5 + 2; break;
    case 2: v = ~v; break;
    case 3: v = v << 7; break;
    case 4: v = v - 100; break;
    case 5: v = __popc(v * 12345); break;
    case 6: v = __clz(v); break;
    case 7: v = __brev(v); break;
    default: v = -1;
  }
  data[threadIdx.x] = v;
}

extern "C" __global__ void bf16_pairs(const __nv_bfloat162 *a, const __nv_bfloat162 *b, __nv_bfloat162 *out) {
  int i = threadIdx.x;
  out[i] = __hfma2(a[i], b[i], __float2bfloat162_rn(0.5f));
}

// The last block to finish adds up what the others wrote.
extern "C" __global__ void sum_of_blocks(float *partial, unsigned *ticket, float *out) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = blockIdx.x + 1.0f;
    __threadfence();
    last = atomicAdd(ticket, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (last && threadIdx.x == 0) {
    __threadfence();
    float sum = 0.0f;
    for (int i = 0; i < gridDim.x; ++i) sum += partial[i];
    *out = sum;
  }
}
