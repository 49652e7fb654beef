// The row norms of an adapted weight, which is never stored
//
//   norm[o] = sqrt(sum over i of (W[o][i] + scaling (sum over r of B[o][r] A[r][i]))^2)
//
// Layouts   W [rows, in_features], the rows from first_row on of a weight; lora_a [rank, in_features] and
//           lora_b [out_features, rank] f32; norm [out_features] f32, of which the same rows are written.
// Launch    DORA_THREADS threads per DORA_ROWS rows. A warp takes 4 rows, COLUMNS columns at a time, a lane
//           4 x 4 elements: the update is summed in registers, RANKS ranks at a time, and then met by W.
//           The order of every sum is that of the columns, whatever the launch.
// Shared    a slice of A [RANKS, COLUMNS] and one of B [DORA_ROWS, RANKS], 10 KB.
// Traffic   W once; A once for every DORA_ROWS rows, from cache; B once for every COLUMNS columns.
//           2 rows in_features (rank + 2) FLOPs.
#include "../reduce.cuh"
#include "../storage.cuh"
#include "abi.h"

constexpr int PER_WARP = 4;               // rows
constexpr int COLUMNS = 32 * ROW_RUN;
constexpr int RANKS = 16;
constexpr int THREADS = DORA_THREADS;
static_assert(THREADS / 32 * PER_WARP == DORA_ROWS, "every row has a warp");

template <typename T>
__device__ void weight_norm(const T *w, const float *lora_a, const float *lora_b, float *norm,
                            const DoraWeight &shape) {
    __shared__ __align__(16) float a[RANKS][COLUMNS];
    __shared__ float b[DORA_ROWS][RANKS];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    uint32_t row0 = blockIdx.x * DORA_ROWS; // of the rows given
    bool whole_runs = shape.in_features % ROW_RUN == 0;
    float squares[PER_WARP] = {};

    // Fills `a` and `b` from rank `rank0` and column `col0` on, with zeros where there is nothing.
    auto load = [&](uint32_t rank0, uint32_t col0) {
        for (int i = threadIdx.x; i < RANKS * COLUMNS / ROW_RUN; i += THREADS) {
            int k = i / 32, at = i % 32 * ROW_RUN;
            uint32_t column = col0 + at;
            const float *from = lora_a + (size_t)(rank0 + k) * shape.in_features + column;
            float values[ROW_RUN] = {};
            if (rank0 + k < shape.rank) {
                if (whole_runs && column < shape.in_features) {
                    load_run(from, values);
                } else {
#pragma unroll
                    for (int j = 0; j < ROW_RUN; ++j)
                        if (column + j < shape.in_features) values[j] = from[j];
                }
            }
            store_run(&a[k][at], values);
        }
        for (int i = threadIdx.x; i < DORA_ROWS * RANKS; i += THREADS) {
            uint32_t row = row0 + i / RANKS, k = rank0 + i % RANKS;
            bool exists = row < shape.rows && k < shape.rank;
            b[i / RANKS][i % RANKS] = exists ? lora_b[(size_t)(shape.first_row + row) * shape.rank + k] : 0.0f;
        }
    };

    for (uint32_t col0 = 0; col0 < shape.in_features; col0 += COLUMNS) {
        float update[PER_WARP][ROW_RUN] = {};
        for (uint32_t rank0 = 0; rank0 < shape.rank; rank0 += RANKS) {
            __syncthreads(); // everybody has read the slices before
            load(rank0, col0);
            __syncthreads();
#pragma unroll
            for (int k = 0; k < RANKS; ++k) {
                float of_a[ROW_RUN];
                load_run(&a[k][lane * ROW_RUN], of_a);
#pragma unroll
                for (int i = 0; i < PER_WARP; ++i)
#pragma unroll
                    for (int j = 0; j < ROW_RUN; ++j) update[i][j] += b[warp * PER_WARP + i][k] * of_a[j];
            }
        }
        uint32_t column = col0 + lane * ROW_RUN;
#pragma unroll
        for (int i = 0; i < PER_WARP; ++i) {
            uint32_t row = row0 + warp * PER_WARP + i;
            if (row >= shape.rows) continue;
            const T *from = w + (size_t)row * shape.in_features + column;
            float values[ROW_RUN] = {};
            if (whole_runs && column < shape.in_features) {
                load_run(from, values);
            } else {
#pragma unroll
                for (int j = 0; j < ROW_RUN; ++j)
                    if (column + j < shape.in_features) values[j] = widen(from[j]);
            }
#pragma unroll
            for (int j = 0; j < ROW_RUN; ++j) {
                float adapted = values[j] + shape.scaling * update[i][j];
                squares[i] += adapted * adapted;
            }
        }
    }
#pragma unroll
    for (int i = 0; i < PER_WARP; ++i) {
        float sum = warp_reduce<Sum>(squares[i]);
        uint32_t row = row0 + warp * PER_WARP + i;
        if (lane == 0 && row < shape.rows) norm[shape.first_row + row] = sqrtf(sum);
    }
}

#define WEIGHT_NORM(name, T)                                                                              \
    extern "C" __global__ void __launch_bounds__(DORA_THREADS, 2)                                         \
        dora_weight_norm_##name(const T *w, const float *lora_a, const float *lora_b, float *norm,        \
                                DoraWeight shape) {                                                       \
        weight_norm(w, lora_a, lora_b, norm, shape);                                                      \
    }

WEIGHT_NORM(f32, float)
WEIGHT_NORM(f16, __half)
WEIGHT_NORM(bf16, __nv_bfloat16)
