// Exponentials in one instruction of the special function units.
#pragma once

// Two to the power of x: 2 ulp, and zero where that is not a normal number.
__device__ inline float exp2_fast(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

// e to the power of x, whose rounding adds |x| / 2^23 to the relative error.
__device__ inline float exp_fast(float x) { return exp2_fast(x * 1.4426950408889634f); }
