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

// ---- lora_linear ----

// Dropout of an update's input; `probability` 0 is none.
struct LoraDropout {
    uint64_t seed;
    uint32_t stream;
    uint32_t step;
    float probability;
    // 1 / (1 - probability)
    float kept;
};

// One projection's part in a tile of the output: left . right + drop(scaling left_low . right_low),
// with the depth and the layouts that the kernel's file gives.
struct LoraTerm {
    uint64_t left;
    uint64_t right;
    uint64_t left_low;
    uint64_t right_low;
    LoraDropout dropout;
    uint32_t depth;
    // 0: no update.
    uint32_t rank;
    float scaling;
};

// Projections that may share an input.
constexpr uint32_t LORA_MAX_GROUP = 4;
constexpr uint32_t LORA_MAX_RANK = 256;

struct LoraProduct {
    LoraTerm terms[LORA_MAX_GROUP];
    uint32_t count;
    uint32_t rows;
    uint32_t cols;
};

// A pass over activations z [tokens, features]: partial sums over features of drop(z) . wide, over
// tokens of drop(z)^T . tall, for each projection that shares z.
struct LoraSide {
    uint64_t wide;
    uint64_t tall;
    uint64_t row_partials;
    uint64_t column_partials;
    LoraDropout dropout;
    uint32_t rank;
};

struct LoraPass {
    LoraSide sides[LORA_MAX_GROUP];
    uint64_t z;
    uint32_t tokens;
    uint32_t features;
    // What a block covers.
    uint32_t block_tokens;
    uint32_t block_features;
    // Blocks along the rank of each side.
    uint32_t rank_blocks;
};

// out [count] = (accumulate ? out : 0) + scaling (sum of partials [splits, count])
struct LoraSum {
    uint64_t partials;
    uint64_t out;
    uint64_t count;
    uint32_t splits;
    float scaling;
    uint32_t accumulate;
};

// An update's gradients and its dH: at most two sums of each projection at a time.
constexpr uint32_t LORA_MAX_SUMS = 8;

struct LoraSums {
    LoraSum sums[LORA_MAX_SUMS];
};

// Threads per block of every lora_linear kernel.
constexpr uint32_t LORA_THREADS = 256;
// Ranks, and the most features with sums over tokens, of a block of a pass in f32.
constexpr uint32_t LORA_PASS_F32_RANKS = 16;
constexpr uint32_t LORA_PASS_F32_FEATURES = 256;
