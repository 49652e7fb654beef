// NF4 quantization
//
//   absmax[b] = max |x[i]| over block b
//   code[i]   = the quant_map entry nearest to x[i] / absmax[b], the lower of two equally near
//
// to the bit as bitsandbytes computes it: a whole block is multiplied by the reciprocal of absmax, or of 1e-38
// where that is larger; the last block, where it is not whole, is divided by absmax, which there is at least
// 1e-38, as stored too. A NaN makes its block's absmax one.
//
// Layouts   x [elements] f32, f16 or bf16, aligned to 16 bytes; packed and absmax as format.cuh gives them, not
//           nested; an odd element at the end is packed with the code of zero.
// Launch    NF4_QUANTIZE_THREADS threads per NF4_QUANTIZE_ELEMENTS elements: 128 blocks of 32, or one of 4096.
//           A thread holds 16 elements, in 16-byte vectors that are a block's worth of threads apart.
// Shared    16 bounds, one bank each; the maxima of at most 128 segments, one per warp and vector or smaller.
// Traffic   at least sizeof(T) elements in, elements / 2 + 4 elements / block_size bytes out; a maximum, a
//           product and 4 comparisons per element.
#include "../storage.cuh"
#include "nf4/format.cuh"

// |x| as an integer: it orders as |x| does, with NaN above infinity.
__device__ uint32_t magnitude(float x) { return __float_as_uint(x) & 0x7fffffff; }

template <typename T>
__device__ void quantize(const T *x, uint8_t *packed, float *absmax, uint64_t elements, uint32_t log2_block_size) {
    constexpr int RUN = PER_VECTOR<T>;
    constexpr int VECTORS = NF4_QUANTIZE_ELEMENTS / NF4_QUANTIZE_THREADS / RUN;
    constexpr float LEAST = 1e-38f;
    const uint32_t block_size = 1u << log2_block_size;

    __shared__ float bounds[15];
    __shared__ uint32_t segment_max[NF4_QUANTIZE_ELEMENTS / 32];
    if (threadIdx.x < 15) bounds[threadIdx.x] = (NF4_QUANT_MAP[threadIdx.x] + NF4_QUANT_MAP[threadIdx.x + 1]) / 2;

    // A segment is as much of a block as one vector of each lane of a warp holds.
    const uint32_t lanes = min(32u, block_size / RUN);
    const uint32_t segment = lanes * RUN;
    const uint64_t first = (uint64_t)blockIdx.x * NF4_QUANTIZE_ELEMENTS;

    float values[VECTORS][RUN];
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
        uint64_t start = first + (v * NF4_QUANTIZE_THREADS + threadIdx.x) * RUN;
        if (start + RUN <= elements) {
            load_run(x + start, values[v]);
        } else { // zeros do not change a maximum
            for (int i = 0; i < RUN; ++i) values[v][i] = start + i < elements ? widen(x[start + i]) : 0.0f;
        }
    }
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
        uint32_t largest = 0;
#pragma unroll
        for (int i = 0; i < RUN; ++i) largest = max(largest, magnitude(values[v][i]));
        for (uint32_t distance = lanes / 2; distance > 0; distance /= 2)
            largest = max(largest, __shfl_xor_sync(0xffffffff, largest, distance));
        if (threadIdx.x % lanes == 0) segment_max[(v * NF4_QUANTIZE_THREADS + threadIdx.x) / lanes] = largest;
    }
    __syncthreads();

    auto is_whole = [&](uint64_t block) { return (block + 1) << log2_block_size <= elements; };
    // The absmax of a block of this thread block, by its place there.
    auto block_max = [&](uint32_t place) {
        uint32_t segments = block_size / segment, largest = 0;
        for (uint32_t s = 0; s < segments; ++s) largest = max(largest, segment_max[place * segments + s]);
        return __uint_as_float(largest);
    };
    // fmaxf would lose a NaN.
    auto at_least = [](float x) { return x < LEAST ? LEAST : x; };

    if (threadIdx.x < NF4_QUANTIZE_ELEMENTS >> log2_block_size) {
        uint64_t block = (first >> log2_block_size) + threadIdx.x;
        float largest = block_max(threadIdx.x);
        if (block << log2_block_size < elements) absmax[block] = is_whole(block) ? largest : at_least(largest);
    }
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
        uint32_t place = (v * NF4_QUANTIZE_THREADS + threadIdx.x) * RUN;
        uint64_t start = first + place;
        float divisor = at_least(block_max(place >> log2_block_size));
        bool whole = is_whole(start >> log2_block_size);
        float reciprocal = 1.0f / divisor;
        uint32_t word = 0;
#pragma unroll
        for (int i = 0; i < RUN; ++i) {
            float scaled = whole ? values[v][i] * reciprocal : values[v][i] / divisor;
            // The number of bounds below it; a NaN is above all.
            uint32_t code = 0;
#pragma unroll
            for (int step = 8; step > 0; step /= 2)
                if (!(scaled <= bounds[code + step - 1])) code += step;
            word |= code << 4 * (i ^ 1);
        }
        if (start + RUN <= elements) {
            if constexpr (RUN == 4)
                *reinterpret_cast<uint16_t *>(packed + start / 2) = (uint16_t)word;
            else
                *reinterpret_cast<uint32_t *>(packed + start / 2) = word;
        } else {
            for (uint64_t i = start; i < elements; i += 2) packed[i / 2] = (uint8_t)(word >> 4 * (i - start));
        }
    }
}

#define NF4_QUANTIZE(suffix, T)                                                                            \
    extern "C" __global__ void __launch_bounds__(NF4_QUANTIZE_THREADS) nf4_quantize_##suffix(              \
        const T *x, uint8_t *packed, float *absmax, uint64_t elements, uint32_t log2_block_size) {         \
        quantize(x, packed, absmax, elements, log2_block_size);                                            \
    }

NF4_QUANTIZE(f32, float)
NF4_QUANTIZE(f16, __half)
NF4_QUANTIZE(bf16, __nv_bfloat16)
