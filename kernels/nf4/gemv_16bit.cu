// A linear layer with an NF4 weight for at most 8 tokens, f16 and bf16 on tensor cores
//
//   y [tokens, out] = x . weight^T + scaling h . lora_b^T + bias
//
// Layouts   weight [out, in] as format.cuh gives it, in blocks of at least 64, in a multiple of 64; x [tokens, in]
//           and y of one type, x aligned to 16 bytes; h [tokens, rank], lora_b [out, rank], bias [out] f32.
// Launch    NF4_GEMV_THREADS threads; as many blocks as fit the GPU at once, which take NF4_GEMV_ROWS rows of the weight
//           after the other. The warps take turns along in, CHUNK columns at a time.
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
//           Sums of two groups of rows, so that one barrier between them is enough: 10 KB.
// Registers the codes of a chunk, 32 words; each step asks for its successor's as it uses them up, be it of the same
//           rows or of the next, and for the x of the step after it: memory is never idle.
// Traffic   at least out in / 2 + 4 out in / block_size bytes, x and y; 2 tokens out in FLOPs.
#include "../mma.cuh"
#include "nf4/gemv.cuh"

constexpr int STEP = 64, STEPS = 8, CHUNK = STEP * STEPS;

// Where a warp is: its rows and the first of its columns.
struct Place {
    uint32_t row0, col0;
};

template <typename T> struct Lane {
    const Nf4Gemv &shape;
    uint32_t lane, g, q, warp;
    uint2 codes[STEPS][2];
    float scales[STEPS / 4][2]; // of steps q and q + 4
    uint4 x[2];                 // of the next step

    __device__ Lane(const Nf4Gemv &shape)
        : shape(shape), lane(threadIdx.x % 32), g(lane / 4), q(lane % 4), warp(threadIdx.x / 32) {}

    __device__ Place first() const { return {blockIdx.x * NF4_GEMV_ROWS, warp * CHUNK}; }

    // The next columns of the same rows, or the first of the block's next rows.
    __device__ Place after(Place place) const {
        if (place.col0 + WARPS * CHUNK < shape.in_features) return {place.row0, place.col0 + WARPS * CHUNK};
        return {place.row0 + gridDim.x * NF4_GEMV_ROWS, warp * CHUNK};
    }

    __device__ bool exists(Place place, int step) const {
        return place.row0 < shape.out_features && place.col0 + step * STEP < shape.in_features;
    }

    // Elements before row g or g + 8. Rows beyond the last repeat it: nobody looks at their sums.
    __device__ uint64_t start(Place place, int half) const {
        return (uint64_t)min(place.row0 + g + 8 * half, shape.out_features - 1) * shape.in_features;
    }

    __device__ void load_codes(Place place, int step) {
        if (!exists(place, step)) return;
#pragma unroll
        for (int half = 0; half < 2; ++half)
            codes[step][half] = *reinterpret_cast<const uint2 *>(
                shape.weight.packed + (start(place, half) + place.col0 + step * STEP) / 2 + q * 8);
    }

    __device__ void load_scales(float (&scales)[STEPS / 4][2], Place place) const {
#pragma unroll
        for (int i = 0; i < STEPS / 4; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                if (exists(place, 4 * i + q))
                    scales[i][half] = nf4_absmax(shape.weight, start(place, half) + place.col0 + (4 * i + q) * STEP);
    }

    __device__ void load_x(Place place, int step) {
        x[0] = x[1] = make_uint4(0, 0, 0, 0);
        if (g >= shape.tokens || !exists(place, step)) return;
        auto from = reinterpret_cast<const uint4 *>(reinterpret_cast<const T *>(shape.x) +
                                                    (size_t)g * shape.in_features + place.col0 + step * STEP + q * 16);
        x[0] = from[0];
        x[1] = from[1];
    }

    __device__ void multiply_step(float (&sums)[4], const uint32_t (&pairs)[256][32], int step,
                                  const uint32_t (&words)[8]) const {
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

    // Adds a chunk, and asks for the next one meanwhile.
    __device__ void multiply_chunk(float (&sums)[4], const uint32_t (&pairs)[256][32], Place place, Place next) {
        float next_scales[STEPS / 4][2] = {};
        load_scales(next_scales, next);
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            const uint32_t words[8] = {x[0].x, x[0].y, x[0].z, x[0].w, x[1].x, x[1].y, x[1].z, x[1].w};
            if (step + 1 < STEPS)
                load_x(place, step + 1);
            else
                load_x(next, 0);
            if (exists(place, step)) multiply_step(sums, pairs, step, words);
            load_codes(next, step);
        }
#pragma unroll
        for (int i = 0; i < STEPS / 4; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half) scales[i][half] = next_scales[i][half];
    }
};

template <typename T> __device__ void gemv(const Nf4Gemv &shape) {
    __shared__ __align__(16) uint32_t pairs[256][32];
    __shared__ Partials partials[2];
    Lane<T> own(shape);

    // The first codes are on their way while the table is filled.
    Place place = own.first();
#pragma unroll
    for (int step = 0; step < STEPS; ++step) own.load_codes(place, step);
    own.load_scales(own.scales, place);
    own.load_x(place, 0);
    for (int i = threadIdx.x; i < 256 * 8; i += NF4_GEMV_THREADS) {
        int byte = i / 8;
        uint32_t pair = pack<T>(NF4_QUANT_MAP[byte >> 4], NF4_QUANT_MAP[byte & 15]);
        *reinterpret_cast<uint4 *>(&pairs[byte][i % 8 * 4]) = make_uint4(pair, pair, pair, pair);
    }
    __syncthreads();

    uint32_t rows = gridDim.x * NF4_GEMV_ROWS;
    int turn = 0;
    for (uint32_t row0 = blockIdx.x * NF4_GEMV_ROWS; row0 < shape.out_features; row0 += rows, turn ^= 1) {
        // Rows g and g + 8 of tokens 2q and 2q + 1.
        float sums[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
            sums[i] = low_rank_share(shape, 2 * own.q + i % 2, row0 + own.g + i / 2 * 8, own.warp);
        while (place.row0 == row0) {
            Place next = own.after(place);
            own.multiply_chunk(sums, pairs, place, next);
            place = next;
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) partials[turn][own.warp][2 * own.q + i % 2][own.g + i / 2 * 8] = sums[i];
        __syncthreads();
        store_sums<T>(shape, partials[turn], row0);
    }
}

extern "C" __global__ void __launch_bounds__(NF4_GEMV_THREADS, NF4_GEMV_BLOCKS) nf4_gemv_f16(const __grid_constant__ Nf4Gemv shape) {
    gemv<__half>(shape);
}

extern "C" __global__ void __launch_bounds__(NF4_GEMV_THREADS, NF4_GEMV_BLOCKS) nf4_gemv_bf16(const __grid_constant__ Nf4Gemv shape) {
    gemv<__nv_bfloat16>(shape);
}
