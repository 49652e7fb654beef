// An NF4 weight as a factor of the products of gemm.cuh: dequantized in f32 on its way through registers, and
// rounded once to the type of the tile
//
// A thread makes the 16-byte chunks of a slice from the 4 bytes of their 8 codes. Blocks run along the rows of the
// weight, as chunks do in both directions, so a chunk whose index is a multiple of 8 lies in one block. The codes and
// absmax of the next slice are asked for when this one is written, a whole slice's multiplications ahead.
#pragma once

#include "gemm.cuh"
#include "nf4/format.cuh"
#include <type_traits>

// The weight is held [edge, depth] if edge_major, else [depth, edge].
template <typename T, int EDGE, int DEPTH, bool aligned, bool edge_major> struct FromNf4 {
    static constexpr int ROWS = edge_major ? EDGE : DEPTH, ROW = edge_major ? DEPTH : EDGE; // of the slice
    static constexpr int ROW_BYTES = ROW * sizeof(T);
    using Slice = std::conditional_t<edge_major, EdgeMajor<ROW_BYTES>, DepthMajor<ROW_BYTES>>;
    static constexpr int CHUNKS = ROW / 8;
    static constexpr int STRIDE = GEMM_THREADS / CHUNKS; // rows between a thread's chunks
    static constexpr int COPIES = ROWS / STRIDE;
    static_assert(ROWS % STRIDE == 0 && STRIDE % 8 == 0, "every chunk has the same place in the swizzle");

    const Nf4Weight &weight;
    const float *quant_map; // [16] in shared memory
    uint32_t rows, cols;    // of the weight
    uint32_t edge0;
    uint32_t codes[COPIES];
    float scales[COPIES];

    __device__ FromNf4(const Nf4Weight &weight, const float *quant_map, uint32_t edge, uint32_t depth, uint32_t edge0)
        : weight(weight), quant_map(quant_map), rows(edge_major ? edge : depth), cols(edge_major ? depth : edge),
          edge0(edge0) {
        if (aligned) fetch(0);
    }

    // The index of the first element of chunk i, and how many elements its row has from there on.
    __device__ uint64_t locate(int i, uint32_t depth0, uint32_t &present) const {
        uint32_t row = (edge_major ? edge0 : depth0) + threadIdx.x / CHUNKS + i * STRIDE;
        uint32_t col = (edge_major ? depth0 : edge0) + threadIdx.x % CHUNKS * 8;
        present = row < rows && col < cols ? cols - col : 0;
        return (uint64_t)row * cols + col;
    }

    __device__ void fetch(uint32_t depth0) {
#pragma unroll
        for (int i = 0; i < COPIES; ++i) {
            uint32_t present;
            uint64_t index = locate(i, depth0, present);
            codes[i] = 0;
            scales[i] = 0;
            if (present) {
                codes[i] = *reinterpret_cast<const uint32_t *>(weight.packed + index / 2);
                scales[i] = nf4_absmax(weight, index);
            }
        }
    }

    // What `fetch` and `chunk` make of codes, one element at a time.
    __device__ uint4 gather_chunk(int i, uint32_t depth0) const {
        uint32_t present;
        uint64_t index = locate(i, depth0, present);
        float values[8];
#pragma unroll
        for (int k = 0; k < 8; ++k, ++index) {
            values[k] = 0;
            if (k < present) {
                uint32_t byte = reinterpret_cast<const uint8_t *>(weight.packed)[index / 2];
                values[k] = quant_map[nf4_code(byte, index % 2)] * nf4_absmax(weight, index);
            }
        }
        return round(values);
    }

    __device__ uint4 chunk(int i) const {
        float values[8];
#pragma unroll
        for (int k = 0; k < 8; ++k) values[k] = quant_map[nf4_code(codes[i], k)] * scales[i];
        return round(values);
    }

    static __device__ uint4 round(const float (&values)[8]) {
        return make_uint4(pack<T>(values[0], values[1]), pack<T>(values[2], values[3]), pack<T>(values[4], values[5]),
                          pack<T>(values[6], values[7]));
    }

    __device__ void load(uint32_t place, uint32_t depth0) {
        uint32_t to = place + swizzled<ROW_BYTES>(threadIdx.x / CHUNKS, threadIdx.x % CHUNKS);
#pragma unroll
        for (int i = 0; i < COPIES; ++i)
            store_shared(to + i * STRIDE * ROW_BYTES, aligned ? chunk(i) : gather_chunk(i, depth0));
        if (aligned) fetch(depth0 + DEPTH);
    }
};
