// sm_90a kernels for the simulator's tests: each feature, and beside it the same kernel with one thing
// forgotten (the macro-like template argument says what).

#include "hopper.cuh"

struct alignas(64) TensorMap { uint8_t bytes[128]; };

// ---- bulk copy in, double, bulk copy out ----

enum Defect { none, no_wait, no_fence, no_store_wait, no_expect, late_fence, early_fence };

template <Defect defect> __device__ void bulk(const float *x, float *y) {
    __shared__ alignas(128) float tile[256];
    __shared__ Barrier full;
    if (threadIdx.x == 0) {
        barrier_init(&full, 1);
        fence_async();
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        if (defect == no_expect) barrier_arrive(&full);
        else barrier_expect(&full, sizeof tile);
        bulk_load(tile, x + 256 * blockIdx.x, sizeof tile, &full);
    }
    if (defect != no_wait) barrier_wait(&full, 0);
    if (defect == early_fence) fence_async();
    tile[threadIdx.x] *= 2;
    if (defect != no_fence && defect != late_fence && defect != early_fence) fence_async();
    __syncthreads();
    if (threadIdx.x == 0) {
        // Allowed too: the fence of one thread, after it has synchronized with the writers.
        if (defect == late_fence) fence_async();
        bulk_store(y + 256 * blockIdx.x, tile, sizeof tile);
        bulk_commit();
        if (defect != no_store_wait) bulk_wait<0>();
    }
    if (defect == no_store_wait) {
        __syncthreads();
        tile[threadIdx.x] = 0;
    }
}

extern "C" __global__ void bulk_copy(const float *x, float *y) { bulk<none>(x, y); }
extern "C" __global__ void bulk_copy_late_fence(const float *x, float *y) { bulk<late_fence>(x, y); }
extern "C" __global__ void bulk_copy_early_fence(const float *x, float *y) { bulk<early_fence>(x, y); }
extern "C" __global__ void bulk_copy_no_wait(const float *x, float *y) { bulk<no_wait>(x, y); }
extern "C" __global__ void bulk_copy_no_fence(const float *x, float *y) { bulk<no_fence>(x, y); }
extern "C" __global__ void bulk_copy_no_store_wait(const float *x, float *y) { bulk<no_store_wait>(x, y); }
extern "C" __global__ void bulk_copy_no_expect(const float *x, float *y) { bulk<no_expect>(x, y); }

// ---- cp.async whose landing is an arrival at an mbarrier ----

template <Defect defect, bool counted> __device__ void copy_arrive(const float *x, float *y) {
    __shared__ alignas(16) float tile[256];
    __shared__ Barrier full;
    if (threadIdx.x == 0) barrier_init(&full, counted ? 64 : 1);
    __syncthreads();
    if (threadIdx.x < 64) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(&tile[4 * threadIdx.x])),
                     "l"(x + 256 * blockIdx.x + 4 * threadIdx.x)
                     : "memory");
        if (counted)
            asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(&full)) : "memory");
        else
            asm volatile("cp.async.mbarrier.arrive.shared::cta.b64 [%0];" ::"r"(shared_address(&full)) : "memory");
    }
    __syncthreads();
    if (!counted && threadIdx.x == 0) barrier_arrive(&full);
    if (defect != no_wait) barrier_wait(&full, 0);
    y[256 * blockIdx.x + threadIdx.x] = 2 * tile[255 - threadIdx.x];
}

extern "C" __global__ void copy_arrive_counted(const float *x, float *y) { copy_arrive<none, true>(x, y); }
extern "C" __global__ void copy_arrive_uncounted(const float *x, float *y) { copy_arrive<none, false>(x, y); }
extern "C" __global__ void copy_arrive_no_wait(const float *x, float *y) { copy_arrive<no_wait, true>(x, y); }

// ---- tensor copies: a box of 64 bf16 x 8 rows, swizzled by 128 bytes, in and out ----

extern "C" __global__ void tensor_copy(const __grid_constant__ TensorMap from, const __grid_constant__ TensorMap to,
                                       uint32_t *plain, int32_t x, int32_t y) {
    __shared__ alignas(1024) uint32_t tile[256];
    __shared__ Barrier full;
    if (threadIdx.x == 0) {
        barrier_init(&full, 1);
        fence_async();
    }
    __syncthreads();
    if (threadIdx.x < 32 && elect()) {
        barrier_expect(&full, sizeof tile);
        tensor_load_2d(tile, &from, x, y, &full);
    }
    barrier_wait(&full, 0);
    plain[threadIdx.x] = tile[threadIdx.x];
    if (threadIdx.x == 0) {
        tensor_store_2d(&to, 8, 1, tile);
        bulk_commit();
        bulk_wait<0>();
    }
}

// ---- wgmma: C[64, 16] = A[64, 64] * B[16, 64] transposed, bf16, 128-byte swizzle ----

template <Defect defect, bool from_registers>
__device__ void multiply(const uint4 *a, const uint4 *b, float *c) {
    __shared__ alignas(1024) uint4 a_tile[64 * 8];
    __shared__ alignas(1024) uint4 b_tile[16 * 8];
    for (int i = threadIdx.x; i < 64 * 8; i += 128) a_tile[i ^ (i / 8 % 8)] = a[i];
    for (int i = threadIdx.x; i < 16 * 8; i += 128) b_tile[i ^ (i / 8 % 8)] = b[i];
    if (defect != no_fence) fence_async();
    __syncthreads();
    float d[8];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    wgmma_fence();
    for (int k = 0; k < 4; k++) {
        uint64_t b_k = descriptor((char *)b_tile + 32 * k, 0, 1024, 1);
        if (from_registers) {
            uint32_t fragment[4];
            for (int i = 0; i < 4; i++) {
                int row = 16 * warp + lane / 4 + 8 * (i % 2), word = 8 * k + lane % 4 + 4 * (i / 2);
                fragment[i] = ((const uint32_t *)a)[32 * row + word];
            }
            wgmma_fence();
            wgmma_m64n16k16_registers(d, fragment, b_k, k > 0);
        } else {
            wgmma_m64n16k16(d, descriptor((char *)a_tile + 32 * k, 0, 1024, 1), b_k, k > 0);
        }
    }
    wgmma_commit();
    if (defect != no_wait) wgmma_wait<0>();
    for (int i = 0; i < 8; i++) {
        int row = 16 * warp + lane / 4 + 8 * (i / 2 % 2), column = 8 * (i / 4) + 2 * (lane % 4) + i % 2;
        c[16 * row + column] = d[i];
    }
}

extern "C" __global__ void wgmma_shared(const uint4 *a, const uint4 *b, float *c) { multiply<none, false>(a, b, c); }
extern "C" __global__ void wgmma_no_fence(const uint4 *a, const uint4 *b, float *c) { multiply<no_fence, false>(a, b, c); }
extern "C" __global__ void wgmma_no_wait(const uint4 *a, const uint4 *b, float *c) { multiply<no_wait, false>(a, b, c); }

// With B by n (not transposed in memory): B[64, 16], 32-byte rows; and A from registers.
template <Defect defect> __device__ void multiply_registers(const uint4 *a, const uint4 *b, float *c) {
    __shared__ alignas(1024) uint4 b_tile[64 * 2];
    // N-major with a 32-byte swizzle: rows of k, 16 n each.
    for (int i = threadIdx.x; i < 64 * 2; i += 128) b_tile[i ^ (i / 8 % 2)] = b[i];
    fence_async();
    __syncthreads();
    float d[8];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    wgmma_fence();
    for (int k = 0; k < 4; k++) {
        uint32_t fragment[4];
        for (int i = 0; i < 4; i++) {
            int row = 16 * warp + lane / 4 + 8 * (i % 2), word = 8 * k + lane % 4 + 4 * (i / 2);
            fragment[i] = ((const uint32_t *)a)[32 * row + word];
        }
        if (defect != no_fence) wgmma_fence();
        wgmma_m64n16k16_registers(d, fragment, descriptor(b_tile + 32 * k, 0, 256, 3), k > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    for (int i = 0; i < 8; i++) {
        int row = 16 * warp + lane / 4 + 8 * (i / 2 % 2), column = 8 * (i / 4) + 2 * (lane % 4) + i % 2;
        c[16 * row + column] = d[i];
    }
}

extern "C" __global__ void wgmma_registers(const uint4 *a, const uint4 *b, float *c) { multiply_registers<none>(a, b, c); }
extern "C" __global__ void wgmma_registers_no_fence(const uint4 *a, const uint4 *b, float *c) {
    multiply_registers<no_fence>(a, b, c);
}

// ---- a producer warp and a consumer warpgroup over a ring of two buffers ----

extern "C" __global__ void __launch_bounds__(256) pipeline(const float *x, float *sum, int tiles) {
    __shared__ alignas(128) float ring[2][128];
    __shared__ Barrier full[2], empty[2];
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; i++) {
            barrier_init(&full[i], 1);
            barrier_init(&empty[i], 128);
        }
        fence_async();
    }
    __syncthreads();
    if (threadIdx.x >= 128) {
        registers_decrease<24>();
        if (threadIdx.x == 128)
            for (int t = 0; t < tiles; t++) {
                barrier_wait(&empty[t % 2], (t / 2 + 1) & 1);
                barrier_expect(&full[t % 2], 512);
                bulk_load(ring[t % 2], x + 128 * t, 512, &full[t % 2]);
            }
    } else {
        registers_increase<240>();
        float total = 0;
        for (int t = 0; t < tiles; t++) {
            barrier_wait(&full[t % 2], t / 2 & 1);
            total += ring[t % 2][threadIdx.x];
            barrier_arrive(&empty[t % 2]);
        }
        sum[threadIdx.x] = total;
    }
}

// ---- clusters of two: distributed shared memory, a remote arrival, a multicast tile ----

extern "C" __global__ void __cluster_dims__(2, 1, 1) cluster_exchange(uint32_t *out) {
    __shared__ uint32_t mine[64];
    mine[threadIdx.x] = 1000 * blockIdx.x + threadIdx.x;
    cluster_sync();
    out[64 * blockIdx.x + threadIdx.x] = load_remote(&mine[threadIdx.x], cluster_rank() ^ 1);
    cluster_sync();
}

// Stores and atomics to the other block's shared memory.
extern "C" __global__ void __cluster_dims__(2, 1, 1) cluster_scatter(uint32_t *out) {
    __shared__ uint32_t theirs[64], count;
    if (threadIdx.x == 0) count = 0;
    cluster_sync();
    uint32_t other = cluster_rank() ^ 1;
    asm volatile("{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
                 "st.shared::cluster.u32 [remote], %2;\n"
                 "mapa.shared::cluster.u32 remote, %3, %1;\n"
                 "red.relaxed.cluster.shared::cluster.add.u32 [remote], 1;\n}" ::"r"(shared_address(&theirs[threadIdx.x])),
                 "r"(other), "r"(100 * blockIdx.x + threadIdx.x), "r"(shared_address(&count))
                 : "memory");
    cluster_sync();
    out[64 * blockIdx.x + threadIdx.x] = theirs[threadIdx.x] + 10000 * count;
}

// A block that reads its neighbour after it may have left.
extern "C" __global__ void __cluster_dims__(2, 1, 1) cluster_no_last_wait(uint32_t *out) {
    __shared__ uint32_t mine[64];
    mine[threadIdx.x] = threadIdx.x;
    cluster_sync();
    if (cluster_rank() == 0) out[threadIdx.x] = load_remote(&mine[threadIdx.x], 1);
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) cluster_multicast(const __grid_constant__ TensorMap map,
                                                                       uint32_t *out) {
    __shared__ alignas(1024) uint32_t tile[256];
    __shared__ Barrier full;
    if (threadIdx.x == 0) {
        barrier_init(&full, 1);
        fence_barrier_init();
    }
    cluster_sync();
    if (threadIdx.x == 0) {
        barrier_expect(&full, sizeof tile);
        // Each block loads its half of the tile into both blocks.
        uint32_t rank = cluster_rank();
        tensor_load_2d_multicast(tile + 128 * rank, &map, 0, 4 * rank, &full, 3);
    }
    barrier_wait(&full, 0);
    out[256 * blockIdx.x + threadIdx.x] = tile[threadIdx.x];
    cluster_sync();
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) cluster_arrive(uint32_t *out) {
    __shared__ uint32_t mail;
    __shared__ Barrier ready;
    if (threadIdx.x == 0) {
        barrier_init(&ready, 1);
        fence_barrier_init();
    }
    cluster_sync();
    uint32_t other = cluster_rank() ^ 1;
    if (threadIdx.x == 0) {
        mail = 7 + blockIdx.x;
        barrier_arrive_remote(&ready, other);
    }
    barrier_wait(&ready, 0);
    if (threadIdx.x == 0) out[blockIdx.x] = load_remote(&mail, other);
    cluster_sync();
}
