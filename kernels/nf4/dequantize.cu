// NF4 dequantization
//
//   out[i] = quant_map[code[i]] * absmax[i / block_size]          rounded once to the type of out
//
// and under double quantization, with every operation rounded to f32 as bitsandbytes does:
//
//   absmax[b] = nested_quant_map[absmax_code[b]] * nested_absmax[b / 256] + offset
//
// Layouts   packed [(elements + 1) / 2] u8: element 2j in the high nibble of byte j, 2j + 1 in the
//           low one. absmax [blocks] f32, or u8 codes with nested_quant_map [256] f32 and
//           nested_absmax [(blocks + 255) / 256] f32, where blocks = elements / block_size rounded
//           up. out [elements] f32, f16 or bf16. out is aligned to 16 bytes, packed to 4.
// Launch    NF4_DEQUANTIZE_THREADS threads; each makes NF4_DEQUANTIZE_STORES stores of 16 bytes,
//           a block's worth of threads apart, so that every access of a warp is one contiguous run.
// Shared    16 floats: one bank each, so any mix of codes reads without a conflict.
// Traffic   at least elements / 2 + 4 blocks bytes in and sizeof(T) elements out; one multiply per
//           element. Stores dominate: 4096 x 4096 to bf16 is 8.9 MB in, 33.6 MB out.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "abi.h"

// bitsandbytes' create_normal_map: quantiles of a normal distribution, with an exact zero.
__constant__ float NF4_QUANT_MAP[16] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};

struct PlainAbsmax {
    const float *absmax; // [blocks]

    __device__ float operator[](uint64_t block) const { return absmax[block]; }
};

struct NestedAbsmax {
    const uint8_t *absmax;         // [blocks] codes
    const float *nested_quant_map; // [256]
    const float *nested_absmax;    // [blocks / 256, rounded up]
    float offset;

    // The _rn forms keep nvcc from fusing the two roundings into one.
    __device__ float operator[](uint64_t block) const {
        float scale = nested_absmax[block / NF4_NESTED_BLOCK_SIZE];
        return __fadd_rn(__fmul_rn(nested_quant_map[absmax[block]], scale), offset);
    }
};

template <typename T> __device__ T cast(float value);
template <> __device__ float cast(float value) { return value; }
template <> __device__ __half cast(float value) { return __float2half_rn(value); }
template <> __device__ __nv_bfloat16 cast(float value) { return __float2bfloat16_rn(value); }

// The codes behind one 16-byte store: two bytes for f32, four for the 16-bit types.
template <int bytes> struct Codes;
template <> struct Codes<2> { using Word = uint16_t; };
template <> struct Codes<4> { using Word = uint32_t; };

// Element `index` of a little-endian word of codes: the high nibble of a byte comes first.
__device__ uint32_t code(uint32_t word, int index) { return word >> (4 * (index ^ 1)) & 15; }

template <typename T, typename Absmax>
__device__ void dequantize(const uint8_t *packed, Absmax absmax, T *out, Nf4Shape shape) {
    constexpr int PER_STORE = 16 / sizeof(T);
    using Word = typename Codes<PER_STORE / 2>::Word;

    __shared__ float quant_map[16];
    if (threadIdx.x < 16) quant_map[threadIdx.x] = NF4_QUANT_MAP[threadIdx.x];
    __syncthreads();

    uint64_t first = (uint64_t)blockIdx.x * NF4_DEQUANTIZE_THREADS * NF4_DEQUANTIZE_STORES;
#pragma unroll
    for (int store = 0; store < NF4_DEQUANTIZE_STORES; ++store) {
        uint64_t vector = first + store * NF4_DEQUANTIZE_THREADS + threadIdx.x;
        uint64_t start = vector * PER_STORE;
        if (start >= shape.elements) return;
        // A vector never straddles two blocks: the smallest block holds 32 elements.
        float scale = absmax[start >> shape.log2_block_size];

        if (start + PER_STORE <= shape.elements) {
            uint32_t word = reinterpret_cast<const Word *>(packed)[vector];
            alignas(16) T values[PER_STORE];
#pragma unroll
            for (int i = 0; i < PER_STORE; ++i) {
                values[i] = cast<T>(quant_map[code(word, i)] * scale);
            }
            reinterpret_cast<uint4 *>(out)[vector] = *reinterpret_cast<const uint4 *>(values);
        } else { // the ragged tail, one element at a time
            for (uint64_t i = start; i < shape.elements; ++i) {
                out[i] = cast<T>(quant_map[code(packed[i / 2], i % 2)] * scale);
            }
        }
    }
}

#define NF4_DEQUANTIZE(suffix, T)                                                                 \
    extern "C" __global__ void __launch_bounds__(NF4_DEQUANTIZE_THREADS)                          \
        nf4_dequantize_##suffix(const uint8_t *packed, const float *absmax, T *out,               \
                                Nf4Shape shape) {                                                 \
        dequantize<T>(packed, PlainAbsmax{absmax}, out, shape);                                   \
    }                                                                                             \
    extern "C" __global__ void __launch_bounds__(NF4_DEQUANTIZE_THREADS)                          \
        nf4_dequantize_nested_##suffix(const uint8_t *packed, const uint8_t *absmax,              \
                                       const float *nested_quant_map, const float *nested_absmax, \
                                       T *out, Nf4Shape shape) {                                  \
        NestedAbsmax nested{absmax, nested_quant_map, nested_absmax, shape.offset};               \
        dequantize<T>(packed, nested, out, shape);                                                \
    }

NF4_DEQUANTIZE(f32, float)
NF4_DEQUANTIZE(f16, __half)
NF4_DEQUANTIZE(bf16, __nv_bfloat16)
