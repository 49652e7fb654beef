// Low-rank updates that differ from row to row: many adapters in one batch, after one frozen product
//
//   y[t] += scaling (x[t] . A^T) . B^T            with A, B and scaling of the segment that t lies in
//
// Layouts   row-major. x [tokens, in] and y [tokens, out] of T; of each segment A [rank, in], B [out, rank], f32.
// Launch    LORA_THREADS threads per LORA_SEGMENT_ROWS rows of a segment and LORA_SEGMENT_OUTS columns of y; grid
//           (columns, rows of all segments). A block finds its segment in the table.
// Work      each block computes the h of its rows anew: for the few rows that an adapter has in a batch that is
//           cheaper than a second launch, and no h passes through memory.
// Shared    h [rows, rank], and in turn slices of x and of B: 32 KB. The 16-byte chunks of a row of B trade places, so
//           that eight lanes find theirs in different banks, be they of two rows, as written, or of eight, as read.
// Traffic   at least 2 or 4 tokens (in + 2 out) bytes and each segment's A and B; 2 tokens rank (in + out) FLOPs, and
//           those of h again for every block of columns.
#include "../reduce.cuh"
#include "../storage.cuh"
#include "abi.h"
#include "lora_linear/simt.cuh"

constexpr int ROWS = LORA_SEGMENT_ROWS;
constexpr int FEATURES = 256;   // of a slice of x
constexpr int RANKS = 16;       // of which h is computed, or B is held, at a time
constexpr int SEGMENT_WARPS = LORA_THREADS / 32;
constexpr int OWN = RANKS / SEGMENT_WARPS; // of a warp

struct Shared {
    float h[ROWS][LORA_MAX_RANK];
    union {
        float x[ROWS][FEATURES];
        float b[LORA_THREADS][RANKS];
    };
};

template <typename T> struct Segmented {
    const LoraSegments &all;
    const LoraSegment &segment;
    Shared &shared;
    uint32_t first, rows; // of x and y
    int lane, warp;

    __device__ Segmented(const LoraSegments &all, Shared &shared)
        : all(all), segment(all.segments[index(all)]), shared(shared), lane(threadIdx.x % 32), warp(threadIdx.x / 32) {
        uint32_t begin = (blockIdx.y - segment.first_tile) * ROWS;
        first = segment.begin + begin;
        rows = min(segment.rows - begin, (uint32_t)ROWS);
    }

    // The segment that the block's rows lie in.
    static __device__ uint32_t index(const LoraSegments &all) {
        static_assert(LORA_MAX_SEGMENTS <= 64, "the steps reach every segment");
        uint32_t i = 0;
        for (uint32_t step = 32; step > 0; step /= 2)
            if (i + step < all.count && blockIdx.y >= all.segments[i + step].first_tile) i += step;
        return i;
    }

    __device__ void load_x(uint32_t feature0) const {
        const T *x = reinterpret_cast<const T *>(all.x) + (size_t)first * all.in_features;
        bool whole = all.in_features % 4 == 0 && all.x % 16 == 0;
        for (int i = threadIdx.x; i < ROWS * FEATURES / 4; i += LORA_THREADS) {
            uint32_t row = i / (FEATURES / 4), column = i % (FEATURES / 4) * 4, feature = feature0 + column;
            float values[4] = {};
            const T *from = x + (size_t)row * all.in_features + feature;
            if (row < rows && feature < all.in_features) {
                if (whole) {
                    load_run(from, values);
                } else {
#pragma unroll
                    for (int j = 0; j < 4; ++j)
                        if (feature + j < all.in_features) values[j] = widen(from[j]);
                }
            }
            *reinterpret_cast<float4 *>(&shared.x[row][column]) = make_float4(values[0], values[1], values[2], values[3]);
        }
    }

    // RANKS columns of h from rank0 on: a warp has OWN of them, its lanes share the features.
    __device__ void compute_h(uint32_t rank0) const {
        Matrix a(segment.lora_a, segment.rank, all.in_features);
        uint32_t own = rank0 + warp * OWN;
        float sums[OWN][ROWS] = {};
        for (uint32_t feature0 = 0; feature0 < all.in_features; feature0 += FEATURES) {
            __syncthreads(); // nobody reads the slice before any more
            load_x(feature0);
            __syncthreads();
#pragma unroll
            for (int part = 0; part < FEATURES / 128; ++part) {
                int column = part * 128 + lane * 4;
                float4 factors[OWN];
#pragma unroll
                for (int r = 0; r < OWN; ++r) factors[r] = a.load4(own + r, feature0 + column);
#pragma unroll
                for (int row = 0; row < ROWS; ++row) {
                    float4 x = *reinterpret_cast<const float4 *>(&shared.x[row][column]);
#pragma unroll
                    for (int r = 0; r < OWN; ++r)
                        sums[r][row] += x.x * factors[r].x + x.y * factors[r].y + x.z * factors[r].z + x.w * factors[r].w;
                }
            }
        }
#pragma unroll
        for (int r = 0; r < OWN; ++r)
#pragma unroll
            for (int row = 0; row < ROWS; ++row) {
                float sum = warp_reduce<Sum>(sums[r][row]);
                if (lane == 0) shared.h[row][own + r] = segment.scaling * sum;
            }
    }

    // Ranks r to r + 3 of a column of y in the slice of B.
    __device__ float4 *chunk(uint32_t column, uint32_t r) const {
        return reinterpret_cast<float4 *>(&shared.b[column][r ^ column / 2 % 4 * 4]);
    }

    // One column of y for each thread, from column0 on.
    __device__ void add_columns(uint32_t column0) const {
        Matrix b(segment.lora_b, all.out_features, segment.rank);
        float sums[ROWS] = {};
        for (uint32_t rank0 = 0; rank0 < segment.rank; rank0 += RANKS) {
            __syncthreads(); // h is there, and nobody reads the slice before any more
            for (int i = threadIdx.x; i < (int)LORA_THREADS * RANKS / 4; i += LORA_THREADS) {
                uint32_t column = i / (RANKS / 4), r = i % (RANKS / 4) * 4;
                *chunk(column, r) = b.load4(column0 + column, rank0 + r);
            }
            __syncthreads();
#pragma unroll
            for (int r = 0; r < RANKS; r += 4) {
                float4 own = *chunk(threadIdx.x, r);
#pragma unroll
                for (int row = 0; row < ROWS; ++row) {
                    float4 h = *reinterpret_cast<const float4 *>(&shared.h[row][rank0 + r]);
                    sums[row] += h.x * own.x + h.y * own.y + h.z * own.z + h.w * own.w;
                }
            }
        }
        uint32_t column = column0 + threadIdx.x;
        if (column >= all.out_features) return;
        T *y = reinterpret_cast<T *>(all.y) + (size_t)first * all.out_features + column;
#pragma unroll
        for (int row = 0; row < ROWS; ++row)
            if (row < rows) {
                T *to = y + (size_t)row * all.out_features;
                *to = narrow<T>(widen(*to) + sums[row]);
            }
    }

    __device__ void run() const {
        for (uint32_t rank0 = 0; rank0 < segment.rank; rank0 += RANKS) compute_h(rank0);
        uint32_t begin = blockIdx.x * LORA_SEGMENT_OUTS;
#pragma unroll 1
        for (uint32_t column = begin; column < min(begin + LORA_SEGMENT_OUTS, all.out_features); column += LORA_THREADS)
            add_columns(column);
    }
};

#define SEGMENTED(storage, T)                                                    \
    extern "C" __global__ void __launch_bounds__(LORA_THREADS)                   \
        lora_segmented_##storage(const __grid_constant__ LoraSegments segments) { \
        __shared__ __align__(16) Shared shared;                                  \
        Segmented<T>(segments, shared).run();                                    \
    }

SEGMENTED(f32, float)
SEGMENTED(f16, __half)
SEGMENTED(bf16, __nv_bfloat16)
