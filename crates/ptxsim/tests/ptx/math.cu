// CUDA's math library on the device: polynomial evaluation, range reduction with tables in memory, fused
// arithmetic and the approximate instructions, all at once. Checked against f64 within the error
// that the CUDA C++ Programming Guide states for each function.

#include <cstdint>

#define UNARY(name, call)                                                                     \
    extern "C" __global__ void name(const float *x, float *y, uint32_t n) {                   \
        uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;                                   \
        if (i < n) y[i] = call(x[i]);                                                         \
    }

UNARY(k_exp, expf)
UNARY(k_exp2, exp2f)
UNARY(k_expm1, expm1f)
UNARY(k_log, logf)
UNARY(k_log1p, log1pf)
UNARY(k_sin, sinf)
UNARY(k_cos, cosf)
UNARY(k_tanh, tanhf)
UNARY(k_rsqrt, rsqrtf)
UNARY(k_cbrt, cbrtf)
UNARY(k_fast_sin, __sinf)
