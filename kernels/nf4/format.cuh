// The NF4 format of bitsandbytes, as kernels read it
//
//   weight[i] = quant_map[code[i]] * absmax[i / block_size]
//
// and under double quantization, with every operation rounded to f32 as bitsandbytes does:
//
//   absmax[b] = nested_quant_map[absmax_code[b]] * nested_absmax[b / 256] + offset
//
// Layouts   the elements of a weight in row-major order, blocks of 32 to 4096, the last one as long as what
//           is left. packed [(elements + 1) / 2] u8: element 2j in the high nibble of byte j, 2j + 1 in the
//           low one. absmax [blocks] f32, or u8 codes with nested_quant_map [256] f32 and nested_absmax
//           [(blocks + 255) / 256] f32.
#pragma once

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

// An absmax under double quantization. The _rn forms keep nvcc from fusing the two roundings into one.
__device__ inline float nf4_nested(float entry, float nested_absmax, float offset) {
    return __fadd_rn(__fmul_rn(entry, nested_absmax), offset);
}

// The absmax of the block that element `index` is in.
__device__ inline float nf4_absmax(const Nf4Weight &weight, uint64_t index) {
    uint64_t block = index >> weight.log2_block_size;
    if (!weight.nested_quant_map) return reinterpret_cast<const float *>(weight.absmax)[block];
    float scale = reinterpret_cast<const float *>(weight.nested_absmax)[block / NF4_NESTED_BLOCK_SIZE];
    uint8_t code = reinterpret_cast<const uint8_t *>(weight.absmax)[block];
    return nf4_nested(reinterpret_cast<const float *>(weight.nested_quant_map)[code], scale, weight.offset);
}

// The code of element `index` of a little-endian word of codes: the high nibble of a byte comes first.
__device__ inline uint32_t nf4_code(uint32_t word, uint32_t index) { return word >> (4 * (index ^ 1)) & 15; }
