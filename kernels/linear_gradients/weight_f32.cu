// The gradient of a linear layer's weight, where it is trained whole: f32
//
//   dW [out, in] += dY^T . X                                          dY [tokens, out], X [tokens, in]
//
// Layouts   row-major and dense.
// Launch    one block of MATMUL_THREADS threads per MATMUL_TILE x MATMUL_TILE tile of dW: grid
//           (in / tile, out / tile), rounded up. A tile's sum over the tokens has one order.
// Shared    8.4 KB, see matmul/tile_f32.cuh.
// Traffic   at least 4 (tokens (in + out) + 2 in out) bytes; 2 tokens in out FLOPs, none on tensor cores.
#include "matmul/tile_f32.cuh"

extern "C" __global__ void __launch_bounds__(MATMUL_THREADS)
    weight_gradient_f32(const float *dy, const float *x, float *dw, MatmulShape shape) {
    multiply_tile<true, false>(dy, x, shape, [&](size_t i, float sum) { dw[i] += sum; });
}
