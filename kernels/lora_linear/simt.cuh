// How the kernels of this family read and write f32 matrices in global memory, four elements at a time.
#pragma once

#include "abi.h"

// A row-major matrix; beyond its edges it reads as zero.
struct Matrix {
    const float *data;
    uint32_t rows, cols;
    // Every row starts at a multiple of 16 bytes.
    bool aligned;

    __device__ Matrix(uint64_t address, uint32_t rows, uint32_t cols)
        : data(reinterpret_cast<const float *>(address)), rows(rows), cols(cols),
          aligned(address % 16 == 0 && cols % 4 == 0) {}

    __device__ float load(uint32_t row, uint32_t col) const {
        return row < rows && col < cols ? data[(size_t)row * cols + col] : 0.0f;
    }

    // The four elements of a row from `col` on, a multiple of 4.
    __device__ float4 load4(uint32_t row, uint32_t col) const {
        float4 values = make_float4(0, 0, 0, 0);
        if (row >= rows || col >= cols) return values;
        const float *from = data + (size_t)row * cols + col;
        if (aligned) return *reinterpret_cast<const float4 *>(from);
        values.x = from[0];
        if (col + 1 < cols) values.y = from[1];
        if (col + 2 < cols) values.z = from[2];
        if (col + 3 < cols) values.w = from[3];
        return values;
    }
};

// Writes four elements of a row-major matrix from `col` on, a multiple of 4, as far as they exist.
__device__ inline void store4(float *data, uint32_t rows, uint32_t cols, uint32_t row, uint32_t col,
                              float4 values) {
    if (row >= rows || col >= cols) return;
    float *to = data + (size_t)row * cols + col;
    if (cols % 4 == 0 && reinterpret_cast<uint64_t>(data) % 16 == 0) {
        *reinterpret_cast<float4 *>(to) = values;
        return;
    }
    to[0] = values.x;
    if (col + 1 < cols) to[1] = values.y;
    if (col + 2 < cols) to[2] = values.z;
    if (col + 3 < cols) to[3] = values.w;
}

__device__ inline float at(float4 values, int i) {
    return i == 0 ? values.x : i == 1 ? values.y : i == 2 ? values.z : values.w;
}
