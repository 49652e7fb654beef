// The forward product of a linear layer with its low-rank update for a few tokens, f16 and bf16
//
//   Y [tokens, out] = X . W^T + scaling H . B^T + bias,   tokens <= 8 (_8) or 16 (_16)
//
// Layouts   row-major and dense; rows of X [tokens, in], W [out, in] and Y are whole chunks of 16 bytes, at
//           multiples of 16. H [tokens, rank], B [out, rank] and bias [out], or none, are f32.
// Launch    LORA_THREADS threads per OUTS rows of W; grid out / OUTS, rounded up. The warps take turns
//           along the rows, and their sums meet in shared memory, in the order of the warps.
// Fragments W is the left factor, so that its rows fill the tensor core's 16 and the tokens its 8. A
//           sum over the depth may go in any order, so a lane's 16 bytes of a row are its words of two
//           fragments: nothing passes through shared memory on its way.
// Traffic   2 out in bytes, each once, and X once per block from cache; 2 tokens out in FLOPs.
#include "abi.h"
#include "mma.cuh"
#include "storage.cuh"

constexpr int OUTS = LORA_SKINNY_OUTS, WARPS = LORA_THREADS / 32;
constexpr int RUN = 64;  // features that a warp takes at a time: 128 bytes of each row
static_assert(OUTS == 16, "the rows of a fragment");

template <typename T, int TOKENS> __device__ void skinny(const LoraProduct &product, const float *bias, T *y) {
    constexpr int N = TOKENS / 8;
    __shared__ float partials[WARPS][TOKENS][OUTS + 4]; // lanes that store together: different banks
    const LoraTerm &term = product.terms[0];
    uint32_t tokens = product.rows, outs = product.cols, depth = term.depth;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    uint32_t out0 = blockIdx.x * OUTS;
    // Rows that do not exist repeat the last: nobody looks at their sums.
    const T *w = reinterpret_cast<const T *>(term.right), *x = reinterpret_cast<const T *>(term.left);
    const T *upper = w + (size_t)min(out0 + lane / 4, outs - 1) * depth;
    const T *lower = w + (size_t)min(out0 + lane / 4 + 8, outs - 1) * depth;
    const T *token[N];
#pragma unroll
    for (int n = 0; n < N; ++n) token[n] = x + (size_t)min(n * 8 + lane / 4, tokens - 1) * depth;

    float sums[N][4] = {};
#pragma unroll 2
    for (uint32_t begin = warp * RUN; begin < depth; begin += WARPS * RUN) {
        uint4 a[2][2] = {}, b[2][N] = {};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            uint32_t d = begin + half * (RUN / 2) + lane % 4 * 8;
            if (d < depth) {
                a[half][0] = __ldcs(reinterpret_cast<const uint4 *>(upper + d));
                a[half][1] = __ldcs(reinterpret_cast<const uint4 *>(lower + d));
#pragma unroll
                for (int n = 0; n < N; ++n) b[half][n] = *reinterpret_cast<const uint4 *>(token[n] + d);
            }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            uint4 u = a[half][0], l = a[half][1];
            uint32_t first[4] = {u.x, l.x, u.y, l.y}, second[4] = {u.z, l.z, u.w, l.w};
#pragma unroll
            for (int n = 0; n < N; ++n) {
                multiply(T(), sums[n], first, b[half][n].x, b[half][n].y);
                multiply(T(), sums[n], second, b[half][n].z, b[half][n].w);
            }
        }
    }
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
        for (int k = 0; k < 4; ++k)
            partials[warp][n * 8 + lane % 4 * 2 + k % 2][lane / 4 + k / 2 * 8] = sums[n][k];
    __syncthreads();

    uint32_t out = out0 + threadIdx.x % OUTS, row = threadIdx.x / OUTS;
    if (row >= tokens || out >= outs) return;
    float sum = 0;
    for (int i = 0; i < WARPS; ++i) sum += partials[i][row][threadIdx.x % OUTS];
    const float *h = reinterpret_cast<const float *>(term.left_low) + (size_t)row * term.rank;
    const float *b = reinterpret_cast<const float *>(term.right_low) + (size_t)out * term.rank;
    float update = 0;
    for (uint32_t r = 0; r < term.rank; ++r) update += h[r] * b[r];
    y[(size_t)row * outs + out] = narrow<T>(sum + term.scaling * update + (bias ? bias[out] : 0.0f));
}

#define SKINNY(T, storage, TOKENS)                                                                     \
    extern "C" __global__ void __launch_bounds__(LORA_THREADS) lora_linear_skinny_##storage##_##TOKENS( \
        const __grid_constant__ LoraProduct shape, const float *bias, T *y) {                          \
        skinny<T, TOKENS>(shape, bias, y);                                                             \
    }

SKINNY(__half, f16, 8)
SKINNY(__half, f16, 16)
SKINNY(__nv_bfloat16, bf16, 8)
SKINNY(__nv_bfloat16, bf16, 16)
