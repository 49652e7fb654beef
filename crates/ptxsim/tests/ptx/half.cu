// CUDA's half-precision intrinsics, one kernel each: compared with the `half` crate.

#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

// x and y hold pairs of 16-bit numbers.
#define PAIRS(name, type, expression)                                                         \
    extern "C" __global__ void name(const type *x, const type *y, type *out, uint32_t n) {    \
        uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;                                   \
        if (i >= n) return;                                                                   \
        type a = x[i], b = y[i];                                                              \
        out[i] = expression;                                                                  \
    }

#define BOTH(operation, expression)                                                           \
    PAIRS(f16_##operation, __half2, expression)                                               \
    PAIRS(bf16_##operation, __nv_bfloat162, expression)

BOTH(add, __hadd2(a, b))
BOTH(sub, __hsub2(a, b))
BOTH(mul, __hmul2(a, b))
BOTH(fma, __hfma2(a, b, a))
BOTH(fma_relu, __hfma2_relu(a, b, a))
BOTH(min, __hmin2(a, b))
BOTH(max_nan, __hmax2_nan(a, b))
BOTH(neg_abs, __hneg2(__habs2(a)))
BOTH(less, __hlt2(a, b))
BOTH(exp2, h2exp2(a))
PAIRS(f16_add_sat, __half2, __hadd2_sat(a, b))
PAIRS(f16_rint, __half2, h2rint(a))

// f32 to every narrow type and back: x holds two f32.
#define NARROW(name, to)                                                                      \
    extern "C" __global__ void name(const float2 *x, uint32_t *out, uint32_t n) {             \
        uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;                                   \
        if (i >= n) return;                                                                   \
        float2 v = x[i];                                                                      \
        auto narrow = to;                                                                     \
        uint32_t bits = 0;                                                                    \
        memcpy(&bits, &narrow, sizeof narrow);                                                \
        out[i] = bits;                                                                        \
    }

NARROW(to_f16, __float22half2_rn(v))
NARROW(to_bf16, __float22bfloat162_rn(v))
NARROW(to_f16_rz, __halves2half2(__float2half_rz(v.x), __float2half_rd(v.y)))
NARROW(to_e4m3, __nv_cvt_float2_to_fp8x2(v, __NV_SATFINITE, __NV_E4M3))
NARROW(to_e5m2, __nv_cvt_float2_to_fp8x2(v, __NV_SATFINITE, __NV_E5M2))
NARROW(to_int, make_short2(__half2short_rn(__float2half(v.x)), __half2ushort_rz(__float2half(v.y))))
