// Unfused f16 and bf16 matrix product on tensor cores: what the fused kernels are compared with
//
//   C [m, n] = A [m, k] . B [k, n]                             16 bits in and out, f32 accumulation
//
// Layouts   row-major and dense. _nn takes B as [k, n], _nt as [n, k], which is a linear layer's weight
//           [out, in]. _large and _small need rows that are whole chunks of 16 bytes, at multiples of 16.
// Launch    GEMM_THREADS threads per tile of C (gemm.cuh), as many blocks as tiles.
// Shared    144 KB for the large tile, 72 KB for the small one.
// Traffic   at least 2 (m k + k n + m n) bytes; 2 m n k FLOPs on tensor cores.
#include "abi.h"
#include "gemm.cuh"

template <typename T, typename Tile, bool b_transposed, bool aligned>
__device__ void matmul(uint64_t a, uint64_t b, T *c, const MatmulShape &shape) {
    extern __shared__ __align__(128) unsigned char ring[];
    uint2 corner = own_tile<Tile>(shape.m, shape.n);
    Tile tile(ring, corner.x, corner.y);
    FromEdgeMajor<T, Tile::ROWS, Tile::DEPTH, aligned> left(a, shape.m, shape.k, tile.row0);
    using Right = std::conditional_t<b_transposed, FromEdgeMajor<T, Tile::COLS, Tile::DEPTH, aligned>,
                                     FromDepthMajor<T, Tile::COLS, Tile::DEPTH, aligned>>;
    Right right(b, shape.n, shape.k, tile.col0);
    NoSlices first;
    tile.add(first, left, right, shape.k);
    tile.template store<aligned>(c, shape.m, shape.n, nullptr);
}

#define MATMUL(T, storage, layout, b_transposed, name, Tile, blocks, aligned)                              \
    extern "C" __global__ void __launch_bounds__(GEMM_THREADS, blocks) matmul_##storage##_##layout##_##name( \
        const T *a, const T *b, T *c, MatmulShape shape) {                                                 \
        matmul<T, Tile<T>, b_transposed, aligned>(reinterpret_cast<uint64_t>(a), reinterpret_cast<uint64_t>(b), c, \
                                                  shape);                                                  \
    }
#define MATMULS(T, storage, layout, b_transposed)                              \
    MATMUL(T, storage, layout, b_transposed, large, LargeTile, 1, true)        \
    MATMUL(T, storage, layout, b_transposed, small, SmallTile, 2, true)        \
    MATMUL(T, storage, layout, b_transposed, unaligned, SmallTile, 1, false)

MATMULS(__half, f16, nn, false)
MATMULS(__half, f16, nt, true)
MATMULS(__nv_bfloat16, bf16, nn, false)
MATMULS(__nv_bfloat16, bf16, nt, true)
