// A matrix product as it is written for Hopper: a producer warp fills a ring of stages by tensor
// copies, two consumer warpgroups multiply from shared memory, mbarriers hand the stages over.
//
// C[m, n] = A[m, k] * B[n, k] transposed, bf16 in, f32 out; tiles of 128 x 64 x 64, swizzled by 128 bytes.

#include "hopper.cuh"

struct alignas(64) TensorMap { uint8_t bytes[128]; };

constexpr int STAGES = 3, TILE_M = 128, TILE_N = 64, TILE_K = 64;

// D[64, 64] += A[64, 16] * B[16, 64]
__device__ inline void wgmma_m64n64k16(float (&d)[32], uint64_t a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
                 "%32, %33, 1, 1, 1, 0, 0;"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
                 : "l"(a), "l"(b)
                 : "memory");
}

enum Defect { none, early_release, no_empty_wait, wrong_parity };

template <Defect defect>
__device__ void multiply(const TensorMap &a, const TensorMap &b, float *c, int n, int k) {
    extern __shared__ __align__(1024) uint8_t shared[];
    uint8_t *a_tiles = shared, *b_tiles = shared + STAGES * TILE_M * TILE_K * 2;
    __shared__ Barrier full[STAGES], empty[STAGES];
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) {
            barrier_init(&full[s], 1);
            barrier_init(&empty[s], 2);
        }
        fence_async();
    }
    __syncthreads();
    int row = blockIdx.y * TILE_M, column = blockIdx.x * TILE_N, tiles = k / TILE_K;
    if (threadIdx.x < 128) {
        registers_decrease<40>();
        if (threadIdx.x == 0)
            for (int t = 0; t < tiles; t++) {
                int s = t % STAGES;
                if (defect != no_empty_wait) barrier_wait(&empty[s], (t / STAGES + 1) & 1);
                barrier_expect(&full[s], (TILE_M + TILE_N) * TILE_K * 2);
                tensor_load_2d(a_tiles + s * TILE_M * TILE_K * 2, &a, t * TILE_K, row, &full[s]);
                tensor_load_2d(b_tiles + s * TILE_N * TILE_K * 2, &b, t * TILE_K, column, &full[s]);
            }
        return;
    }
    registers_increase<232>();
    int group = threadIdx.x / 128 - 1, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    float d[32] = {};
    for (int t = 0; t < tiles; t++) {
        int s = t % STAGES;
        barrier_wait(&full[s], (t / STAGES + (defect == wrong_parity)) & 1);
        uint8_t *a_tile = a_tiles + (s * TILE_M + 64 * group) * TILE_K * 2, *b_tile = b_tiles + s * TILE_N * TILE_K * 2;
        wgmma_fence();
        for (int i = 0; i < TILE_K / 16; i++)
            wgmma_m64n64k16(d, descriptor(a_tile + 32 * i, 0, 1024, 1), descriptor(b_tile + 32 * i, 0, 1024, 1));
        wgmma_commit();
        if (defect != early_release) wgmma_wait<0>();
        if (threadIdx.x % 128 == 0) barrier_arrive(&empty[s]);
    }
    if (defect == early_release) wgmma_wait<0>();
    for (int i = 0; i < 32; i++) {
        int r = row + 64 * group + 16 * warp + lane / 4 + 8 * (i / 2 % 2);
        c[r * n + column + 8 * (i / 4) + 2 * (lane % 4) + i % 2] = d[i];
    }
}

#define MATMUL(name, defect)                                                                  \
    extern "C" __global__ void __launch_bounds__(384)                                         \
        name(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, float *c, int n, int k) { \
        multiply<defect>(a, b, c, n, k);                                                      \
    }

MATMUL(hopper_matmul, none)
MATMUL(hopper_matmul_early_release, early_release)
MATMUL(hopper_matmul_no_empty_wait, no_empty_wait)
MATMUL(hopper_matmul_wrong_parity, wrong_parity)
