// Sums over the rows of a matrix, a sum for each column, in one fixed order
//
// A block of COLUMN_SUM_LANES x COLUMN_SUM_TOKEN_LANES threads takes COLUMN_SUM_LANES runs of N columns, with N
// COLUMN_SUM_RUN or 1. A thread adds up its run over every COLUMN_SUM_TOKEN_LANES-th row; then the rows' threads are
// added up in shared memory, 4 KB.
#pragma once

#include "abi.h"
#include "storage.cuh"

// Calls `add(row, column, sums)` for the runs of this thread, which adds to its N sums, then `finish(column, sum)` once
// for each column.
template <int N, typename Add, typename Finish>
__device__ void column_sum(ColumnSumShape shape, Add add, Finish finish) {
    constexpr uint32_t COLUMNS = COLUMN_SUM_LANES * N;
    __shared__ __align__(16) float all[COLUMN_SUM_TOKEN_LANES][COLUMNS];
    uint32_t first = blockIdx.x * COLUMNS;
    uint32_t column = first + threadIdx.x * N;
    float sums[N] = {};
    if (column < shape.features)
        for (uint32_t row = threadIdx.y; row < shape.tokens; row += COLUMN_SUM_TOKEN_LANES) add(row, column, sums);
    store_run(&all[threadIdx.y][threadIdx.x * N], sums);
    __syncthreads();
    uint32_t own = threadIdx.y * COLUMN_SUM_LANES + threadIdx.x;
    if (own >= COLUMNS || first + own >= shape.features) return;
    float sum = 0.0f;
    for (uint32_t lane = 0; lane < COLUMN_SUM_TOKEN_LANES; ++lane) sum += all[lane][own];
    finish(first + own, sum);
}
