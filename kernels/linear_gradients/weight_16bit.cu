// The gradient of a linear layer's weight, where it is trained whole: f16 and bf16 on tensor cores
//
//   dW [out, in] += dY^T . X                                          dY [tokens, out], X [tokens, in]
//
// Layouts   row-major and dense; dW f32. Both factors are held with the depth, the tokens, along their rows, so
//           `ldmatrix` turns both. _large and _small need rows that are whole chunks of 16 bytes, at multiples
//           of 16.
// Launch    GEMM_THREADS threads per tile of dW (gemm.cuh), as many blocks as tiles; m, n, k: out, in, tokens. A
//           tile's sum over the tokens has one order.
// Shared    144 KB for the large tile, 72 KB for the small one. Sums go from registers to dW, where four lanes
//           share a sector.
// Traffic   at least 2 tokens (in + out) + 8 in out bytes; 2 tokens in out FLOPs on tensor cores.
#include "abi.h"
#include "gemm.cuh"

template <typename T, typename Tile, bool aligned>
__device__ void weight_gradient(const T *dy, const T *x, float *dw, const MatmulShape &shape) {
    extern __shared__ __align__(128) unsigned char ring[];
    uint2 corner = own_tile<Tile>(shape.m, shape.n);
    Tile tile(ring, corner.x, corner.y);
    FromDepthMajor<T, Tile::ROWS, Tile::DEPTH, aligned> left(reinterpret_cast<uint64_t>(dy), shape.m, shape.k,
                                                             tile.row0);
    FromDepthMajor<T, Tile::COLS, Tile::DEPTH, aligned> right(reinterpret_cast<uint64_t>(x), shape.n, shape.k,
                                                              tile.col0);
    NoSlices first;
    tile.add(first, left, right, shape.k);
#pragma unroll
    for (int i = 0; i < Tile::M; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            uint32_t row = tile.row(i) + half * 8;
            if (row >= shape.m) continue;
#pragma unroll
            for (int j = 0; j < Tile::N; ++j) {
                uint32_t col = tile.col(j);
                float2 sums = make_float2(tile.sums[i][j][2 * half], tile.sums[i][j][2 * half + 1]);
                float *to = dw + (size_t)row * shape.n + col;
                if (aligned) {
                    if (col >= shape.n) continue;
                    float2 before = *reinterpret_cast<float2 *>(to);
                    *reinterpret_cast<float2 *>(to) = make_float2(before.x + sums.x, before.y + sums.y);
                } else {
                    if (col < shape.n) to[0] += sums.x;
                    if (col + 1 < shape.n) to[1] += sums.y;
                }
            }
        }
}

#define WEIGHT_GRADIENT(T, storage, name, Tile, blocks, aligned)                                          \
    extern "C" __global__ void __launch_bounds__(GEMM_THREADS, blocks) weight_gradient_##storage##_##name( \
        const T *dy, const T *x, float *dw, MatmulShape shape) {                                          \
        weight_gradient<T, Tile<T>, aligned>(dy, x, dw, shape);                                           \
    }
#define WEIGHT_GRADIENTS(T, storage)                            \
    WEIGHT_GRADIENT(T, storage, large, LargeTile, 1, true)      \
    WEIGHT_GRADIENT(T, storage, small, SmallTile, 2, true)      \
    WEIGHT_GRADIENT(T, storage, unaligned, SmallTile, 1, false)

WEIGHT_GRADIENTS(__half, f16)
WEIGHT_GRADIENTS(__nv_bfloat16, bf16)
