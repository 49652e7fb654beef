// Unfused f32 matrix product: what the fused kernels are compared with
//
//   C [m, n] = A [m, k] . B [k, n]                                    f32 in, f32 accumulation
//
// Layouts   row-major and dense, each factor optionally held transposed: _nn takes A [m, k] and
//           B [k, n]; _nt takes B as [n, k], which is a linear layer's weight [out, in]; _tn takes
//           A as [k, m], which is a weight gradient's activations [tokens, in].
// Launch    one block of MATMUL_THREADS threads per MATMUL_TILE x MATMUL_TILE tile of C: grid
//           (n / tile, m / tile), rounded up.
// Shared    8.4 KB, see tile_f32.cuh.
// Traffic   at least 4 (m k + k n + m n) bytes; it moves A n / 64 times and B m / 64 times.
//           2 m n k FLOPs, none of them on tensor cores.
#include "matmul/tile_f32.cuh"

#define MATMUL(suffix, a_transposed, b_transposed)                                           \
    extern "C" __global__ void __launch_bounds__(MATMUL_THREADS)                             \
        matmul_f32_##suffix(const float *a, const float *b, float *c, MatmulShape shape) {   \
        multiply_tile<a_transposed, b_transposed>(a, b, shape,                               \
                                                  [&](size_t i, float sum) { c[i] = sum; });  \
    }

MATMUL(nn, false, false)
MATMUL(nt, false, true)
MATMUL(tn, true, false)
