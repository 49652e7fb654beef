// What the kernels and their Rust launchers agree on: parameter structs, passed by value, and
// constants. build.rs turns this file into the module `abi`.
#pragma once

#include <stdint.h>

// ---- nf4 ----

// The statistics of one quantized weight of `elements` numbers in blocks of 2^log2_block_size.
struct Nf4Shape {
    uint64_t elements;
    uint32_t log2_block_size;
    // Double quantization only: what was subtracted from absmax before it was quantized.
    float offset;
};

// Threads per block of nf4_dequantize_*, and 16-byte stores per thread.
constexpr uint32_t NF4_DEQUANTIZE_THREADS = 256;
constexpr uint32_t NF4_DEQUANTIZE_STORES = 4;
// Absmax values that share one second-level absmax under double quantization.
constexpr uint32_t NF4_NESTED_BLOCK_SIZE = 256;

// ---- matmul ----

// C [m, n] = A [m, k] . B [k, n]
struct MatmulShape {
    uint32_t m;
    uint32_t n;
    uint32_t k;
};

// One block of MATMUL_THREADS threads computes a square tile of C with this edge.
constexpr uint32_t MATMUL_TILE = 64;
constexpr uint32_t MATMUL_THREADS = 256;
