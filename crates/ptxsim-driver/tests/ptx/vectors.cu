// nvcc -ptx -arch=compute_80 -lineinfo -o vectors.ptx vectors.cu
extern "C" __global__ void add(const float *a, const float *b, float *sum, int count) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) sum[i] = a[i] + b[i];
}

__device__ float factor = 2.0f;

extern "C" __global__ void scale(float *values) { values[threadIdx.x] *= factor; }

// One element too many.
extern "C" __global__ void overrun(float *values, int count) {
    if (threadIdx.x <= count) values[threadIdx.x] = 1.0f;
}

// out[0] is the sum of what the block put into dynamic shared memory.
extern "C" __global__ void shared_sum(float *out, int count) {
    extern __shared__ float staged[];
    for (int i = threadIdx.x; i < count; i += blockDim.x) staged[i] = 1.0f;
    __syncthreads();
    if (threadIdx.x == 0) {
        float sum = 0.0f;
        for (int i = 0; i < count; ++i) sum += staged[i];
        out[0] = sum;
    }
}
