// A linear layer with an NF4 weight for at most 8 tokens, f16 and bf16 on tensor cores
//
//   y [tokens, out] = x . weight^T + scaling h . lora_b^T + bias
//
// Layouts   weight [out, in] as format.cuh gives it, in blocks of at least 64, in a multiple of 64; x [tokens, in]
//           and y of one type, x aligned to 16 bytes; h [tokens, rank], lora_b [out, rank], bias [out] f32.
// Launch    NF4_GEMV_THREADS threads per NF4_GEMV_ROWS rows of the weight; grid (out / rows), rounded up. The warps
//           take turns along in, CHUNK columns at a time.
// Tile      mma with the weight as its left factor, 16 rows, and the tokens as its 8 columns: 1 token costs what 8
//           do. A step is 64 columns, within one block of a row, so absmax multiplies the step's sums. Lane
//           4 g + q holds 16 neighbouring columns of rows g and g + 8: the order of the depth within a step is free
//           as long as both factors agree. Eight lanes of a step read one sector of each row.
//
//             columns  0      16      32      48      64
//             row g    | q = 0 | q = 1 | q = 2 | q = 3 |     8 bytes each
//
// Rounding  a code's value is rounded to the type of x, absmax is not; all sums are f32.
// Shared    for each of the 256 bytes its two values as one word, a copy per lane: 32 KB, one bank each, so any mix
//           of bytes reads without a conflict. The warps' sums, 5 KB.
// Registers the codes of a chunk, 32 words; each step asks for its successor's as it uses them up.
// Traffic   at least out in / 2 + 4 out in / block_size bytes, x and y; 2 tokens out in FLOPs.
#include "../mma.cuh"
#include "nf4/gemv.cuh"

constexpr int STEP = 64, STEPS = 8, CHUNK = STEP * STEPS;

template <typename T> struct Lane {
    const Nf4Gemv &shape;
    uint32_t lane, g, q;
    uint64_t starts[2]; // elements before rows g and g + 8
    uint2 codes[STEPS][2];
    float scales[STEPS / 4][2]; // of steps q and q + 4

    // Rows beyond the last repeat it: nobody looks at their sums.
    __device__ Lane(const Nf4Gemv &shape, uint32_t row0) : shape(shape), lane(threadIdx.x % 32), g(lane / 4), q(lane % 4) {
        for (int half = 0; half < 2; ++half)
            starts[half] = (uint64_t)min(row0 + g + 8 * half, shape.out_features - 1) * shape.in_features;
    }

    __device__ void load_codes(int step, uint32_t col0) {
        uint32_t col = col0 + step * STEP;
        if (col >= shape.in_features) return;
#pragma unroll
        for (int half = 0; half < 2; ++half)
            codes[step][half] =
                *reinterpret_cast<const uint2 *>(shape.weight.packed + (starts[half] + col) / 2 + q * 8);
    }

    __device__ void load_scales(uint32_t col0) {
#pragma unroll
        for (int i = 0; i < STEPS / 4; ++i) {
            uint32_t col = col0 + (4 * i + q) * STEP;
            if (col >= shape.in_features) continue;
            for (int half = 0; half < 2; ++half) scales[i][half] = nf4_absmax(shape.weight, starts[half] + col);
        }
    }

    __device__ void multiply_step(float (&sums)[4], const uint32_t (&pairs)[256][32], int step, uint32_t col) const {
        uint4 x[2] = {};
        if (g < shape.tokens) {
            auto from = reinterpret_cast<const uint4 *>(reinterpret_cast<const T *>(shape.x) +
                                                        (size_t)g * shape.in_features + col + q * 16);
            x[0] = from[0];
            x[1] = from[1];
        }
        const uint32_t words[8] = {x[0].x, x[0].y, x[0].z, x[0].w, x[1].x, x[1].y, x[1].z, x[1].w};
        auto pair = [&](int half, int byte) {
            uint2 both = codes[step][half];
            return pairs[(byte < 4 ? both.x : both.y) >> 8 * (byte % 4) & 255][lane];
        };
        float part[4] = {};
#pragma unroll
        for (int m = 0; m < 4; ++m) {
            const uint32_t rows[4] = {pair(0, 2 * m), pair(1, 2 * m), pair(0, 2 * m + 1), pair(1, 2 * m + 1)};
            multiply(T(), part, rows, words[2 * m], words[2 * m + 1]);
        }
        float scale0 = __shfl_sync(0xffffffff, scales[step / 4][0], g * 4 + step % 4);
        float scale1 = __shfl_sync(0xffffffff, scales[step / 4][1], g * 4 + step % 4);
        sums[0] += scale0 * part[0];
        sums[1] += scale0 * part[1];
        sums[2] += scale1 * part[2];
        sums[3] += scale1 * part[3];
    }
};

template <typename T> __device__ void gemv(const Nf4Gemv &shape) {
    __shared__ uint32_t pairs[256][32];
    __shared__ Partials partials;
    uint32_t row0 = blockIdx.x * NF4_GEMV_ROWS;
    int warp = threadIdx.x / 32;
    Lane<T> own(shape, row0);

    // The first codes are on their way while the table is filled.
    uint32_t col0 = warp * CHUNK;
#pragma unroll
    for (int step = 0; step < STEPS; ++step) own.load_codes(step, col0);
    own.load_scales(col0);
    for (int byte = warp; byte < 256; byte += WARPS)
        pairs[byte][own.lane] = pack<T>(NF4_QUANT_MAP[byte >> 4], NF4_QUANT_MAP[byte & 15]);

    // Rows g and g + 8 of tokens 2q and 2q + 1.
    float sums[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
        sums[i] = low_rank_share(shape, 2 * own.q + i % 2, row0 + own.g + i / 2 * 8, warp);
    __syncthreads();

    for (; col0 < shape.in_features; col0 += WARPS * CHUNK) {
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            uint32_t col = col0 + step * STEP;
            if (col < shape.in_features) own.multiply_step(sums, pairs, step, col);
            own.load_codes(step, col0 + WARPS * CHUNK);
        }
        own.load_scales(col0 + WARPS * CHUNK);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) partials[warp][2 * own.q + i % 2][own.g + i / 2 * 8] = sums[i];
    __syncthreads();
    store_sums<T>(shape, partials, row0);
}

extern "C" __global__ void __launch_bounds__(NF4_GEMV_THREADS, 2) nf4_gemv_f16(const __grid_constant__ Nf4Gemv shape) {
    gemv<__half>(shape);
}

extern "C" __global__ void __launch_bounds__(NF4_GEMV_THREADS, 2) nf4_gemv_bf16(const __grid_constant__ Nf4Gemv shape) {
    gemv<__nv_bfloat16>(shape);
}
