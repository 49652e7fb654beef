// C = A * B^T in bf16 on tensor cores: A [M, K], B [N, K], C [M, N] f32. 64 x 64 tiles, three
// stages of cp.async, ldmatrix, mma.sync.m16n8k16. M, N multiples of 64, K of 32.
#include <cuda_bf16.h>
#include <cstdint>

constexpr int TILE = 64, DEPTH = 32, STAGES = 3, PITCH = DEPTH + 8;

__device__ inline uint32_t shared_address(const void *p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

extern "C" __global__ void __launch_bounds__(128)
matmul(int M, int N, int K, const __nv_bfloat16 *A, const __nv_bfloat16 *B, float *C) {
  __shared__ __align__(16) __nv_bfloat16 a_tile[STAGES][TILE][PITCH];
  __shared__ __align__(16) __nv_bfloat16 b_tile[STAGES][TILE][PITCH];
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int row0 = blockIdx.y * TILE, column0 = blockIdx.x * TILE;
  int warp_row = warp / 2 * 32, warp_column = warp % 2 * 32;
  float acc[2][4][4] = {};

  auto copy = [&](int stage, int k0) {
    for (int chunk = threadIdx.x; chunk < TILE * DEPTH / 8; chunk += 128) {
      int row = chunk / (DEPTH / 8), column = chunk % (DEPTH / 8) * 8;
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(&a_tile[stage][row][column])),
                   "l"(A + (size_t)(row0 + row) * K + k0 + column));
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(&b_tile[stage][row][column])),
                   "l"(B + (size_t)(column0 + row) * K + k0 + column));
    }
  };

  int steps = K / DEPTH;
  for (int s = 0; s < STAGES - 1; ++s) {
    if (s < steps) copy(s, s * DEPTH);
    asm volatile("cp.async.commit_group;");
  }
  for (int step = 0; step < steps; ++step) {
    asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2));
    __syncthreads();
    if (step + STAGES - 1 < steps) copy((step + STAGES - 1) % STAGES, (step + STAGES - 1) * DEPTH);
    asm volatile("cp.async.commit_group;");
    int stage = step % STAGES;
    for (int k = 0; k < DEPTH; k += 16) {
      uint32_t a[2][4], b[4][2];
      for (int i = 0; i < 2; ++i) {
        uint32_t at = shared_address(&a_tile[stage][warp_row + i * 16 + lane % 16][k + lane / 16 * 8]);
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(a[i][0]), "=r"(a[i][1]), "=r"(a[i][2]), "=r"(a[i][3]) : "r"(at));
      }
      for (int j = 0; j < 4; ++j) {
        uint32_t at = shared_address(&b_tile[stage][warp_column + j * 8 + lane % 8][k + lane / 8 % 2 * 8]);
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                     : "=r"(b[j][0]), "=r"(b[j][1]) : "r"(at));
      }
      for (int i = 0; i < 2; ++i)
        for (int j = 0; j < 4; ++j)
          asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                       : "+f"(acc[i][j][0]), "+f"(acc[i][j][1]), "+f"(acc[i][j][2]), "+f"(acc[i][j][3])
                       : "r"(a[i][0]), "r"(a[i][1]), "r"(a[i][2]), "r"(a[i][3]), "r"(b[j][0]), "r"(b[j][1]));
    }
  }
  for (int i = 0; i < 2; ++i)
    for (int j = 0; j < 4; ++j)
      for (int h = 0; h < 2; ++h) {
        int row = row0 + warp_row + i * 16 + lane / 4 + h * 8;
        int column = column0 + warp_column + j * 8 + lane % 4 * 2;
        *reinterpret_cast<float2 *>(&C[(size_t)row * N + column]) = make_float2(acc[i][j][2 * h], acc[i][j][2 * h + 1]);
      }
}
