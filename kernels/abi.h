// What the kernels and their Rust launchers agree on: parameter structs, passed by value, and
// constants. build.rs turns this file into the module `abi`.
#pragma once

#include <stdint.h>

// ---- nf4 ----

// A quantized weight of `elements` numbers in blocks of 2^log2_block_size: addresses on the device, with
// the layouts that nf4/format.cuh gives.
struct Nf4Weight {
    uint64_t packed;
    uint64_t absmax;
    // Double quantization; 0: absmax is f32.
    uint64_t nested_quant_map;
    uint64_t nested_absmax;
    uint64_t elements;
    uint32_t log2_block_size;
    // What was subtracted from absmax before it was quantized.
    float offset;
};

// Threads per block of nf4_dequantize_*, and 16-byte stores per thread.
constexpr uint32_t NF4_DEQUANTIZE_THREADS = 256;
constexpr uint32_t NF4_DEQUANTIZE_STORES = 2;
// Elements per block of nf4_quantize_*: the largest block of the format.
constexpr uint32_t NF4_QUANTIZE_ELEMENTS = 4096;
constexpr uint32_t NF4_QUANTIZE_THREADS = 256;
// Threads per block of nf4_gemv_*, the rows of the weight that a block takes, and the most rows of x.
constexpr uint32_t NF4_GEMV_THREADS = 256;
constexpr uint32_t NF4_GEMV_ROWS = 16;
constexpr uint32_t NF4_GEMV_TOKENS = 8;
// Blocks that a multiprocessor has at once, in f16 and bf16.
constexpr uint32_t NF4_GEMV_BLOCKS = 2;
// Absmax values that share one second-level absmax under double quantization.
constexpr uint32_t NF4_NESTED_BLOCK_SIZE = 256;

// y [tokens, out] = x . weight^T + scaling h . lora_b^T + bias, addresses on the device; bias 0: none.
struct Nf4Gemv {
    Nf4Weight weight;
    uint64_t x;
    uint64_t h;
    uint64_t lora_b;
    uint64_t bias;
    uint64_t y;
    uint32_t tokens;
    uint32_t in_features;
    uint32_t out_features;
    // 0: no update.
    uint32_t rank;
    float scaling;
};

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

// ---- products of f16 and bf16, gemm.cuh ----

constexpr uint32_t GEMM_THREADS = 256;
// A slice of the depth, and the slices in shared memory.
constexpr uint32_t GEMM_DEPTH = 64;
constexpr uint32_t GEMM_STAGES = 3;
// Tiles of the result.
constexpr uint32_t GEMM_LARGE_ROWS = 128;
constexpr uint32_t GEMM_LARGE_COLS = 256;
constexpr uint32_t GEMM_SMALL_ROWS = 64;
constexpr uint32_t GEMM_SMALL_COLS = 128;

// ---- lora_linear ----

// Dropout of an update's input; `probability` 0 is none.
struct LoraDropout {
    uint64_t seed;
    // The address of a u32 on the device: it changes from pass to pass.
    uint64_t step;
    uint32_t stream;
    float probability;
    // 1 / (1 - probability)
    float kept;
};

// One projection's part in a tile of the output: left . right + drop(scaling left_low . right_low),
// with the depth and the layouts that the kernel's file gives.
struct LoraTerm {
    uint64_t left;
    // The weight, or else, where it is NF4, `quantized`.
    uint64_t right;
    Nf4Weight quantized;
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

// Rows of a batch that one update belongs to.
struct LoraSegment {
    uint64_t lora_a;
    uint64_t lora_b;
    uint32_t begin;
    uint32_t rows;
    uint32_t rank;
    float scaling;
    // Tiles of LORA_SEGMENT_ROWS of the segments before.
    uint32_t first_tile;
};

constexpr uint32_t LORA_MAX_SEGMENTS = 64;
// What a block covers of y.
constexpr uint32_t LORA_SEGMENT_ROWS = 16;
constexpr uint32_t LORA_SEGMENT_OUTS = 512;

struct LoraSegments {
    LoraSegment segments[LORA_MAX_SEGMENTS];
    uint64_t x;
    uint64_t y;
    uint32_t count;
    uint32_t in_features;
    uint32_t out_features;
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

// Threads per block of the lora_linear kernels, but for sums of partial results.
constexpr uint32_t LORA_THREADS = 256;
constexpr uint32_t LORA_SUM_THREADS = 64;
// Ranks, and the most features with sums over tokens, of a block of a pass in f32.
constexpr uint32_t LORA_PASS_F32_RANKS = 16;
constexpr uint32_t LORA_PASS_F32_FEATURES = 256;
// In f16 and bf16: ranks, the most features and the most tokens (half of them with sums over features) of a block,
// all whole tiles of every pass; its shared memory, in bytes.
constexpr uint32_t LORA_PASS_RANKS = 16;
constexpr uint32_t LORA_PASS_FEATURES = 512;
constexpr uint32_t LORA_PASS_TOKENS = 512;
constexpr uint32_t LORA_PASS_H_SHARED = 82432;
constexpr uint32_t LORA_PASS_DH_SHARED = 81920;
constexpr uint32_t LORA_PASS_DH_DB_SHARED = 98304;
constexpr uint32_t LORA_PASS_DA_SHARED = 81920;
// Blocks are cut down to these where there are few.
constexpr uint32_t LORA_PASS_LEAST = 128;
// Rows of the weight of a block of the forward product for few tokens.
constexpr uint32_t LORA_SKINNY_OUTS = 16;

// ---- elementwise, activation ----

constexpr uint32_t ELEMENTWISE_THREADS = 256;
// Elements per thread of a cast between types of different sizes.
constexpr uint32_t ELEMENTWISE_CAST_RUN = 4;
constexpr uint32_t ACTIVATION_THREADS = 256;

// ---- embedding ----

// table [rows, width]
struct EmbeddingShape {
    uint32_t rows;
    uint32_t width;
};

constexpr uint32_t EMBEDDING_THREADS = 128;

// ---- columns ----

// Columns [from_first, from_first + width) of x [rows, from_columns] and [to_first, to_first + width) of
// y [rows, to_columns].
struct ColumnBlock {
    uint32_t rows;
    uint32_t width;
    uint32_t from_columns;
    uint32_t from_first;
    uint32_t to_columns;
    uint32_t to_first;
};

constexpr uint32_t COLUMNS_THREADS = 128;

// ---- dora ----

// Rows [first_row, first_row + rows) of a weight [out_features, in_features] with an update of this rank.
struct DoraWeight {
    uint32_t first_row;
    uint32_t rows;
    uint32_t in_features;
    uint32_t rank;
    float scaling;
};

constexpr uint32_t DORA_THREADS = 256;
// Rows of the weight of a block of dora_weight_norm_*.
constexpr uint32_t DORA_ROWS = 32;

// ---- sums over tokens, column_sum.cuh ----

// Threads along the columns, and along the tokens.
constexpr uint32_t COLUMN_SUM_LANES = 8;
constexpr uint32_t COLUMN_SUM_TOKEN_LANES = 32;
// Columns of a thread, where rows are whole runs of them; else one.
constexpr uint32_t COLUMN_SUM_RUN = 4;

// x [tokens, features]
struct ColumnSumShape {
    uint32_t tokens;
    uint32_t features;
};

// ---- norm ----

// x [tokens, width]
struct NormShape {
    uint32_t tokens;
    uint32_t width;
    float eps;
};

// The most threads per token, and the tile of the kernels that sum over tokens.
constexpr uint32_t NORM_MAX_THREADS = 256;
constexpr uint32_t NORM_COLUMNS = 32;
constexpr uint32_t NORM_ROW_LANES = 8;

// ---- rope ----

// x [tokens, heads * head_dim]; cos and sin [table_rows, half]
struct RopeShape {
    uint32_t heads;
    uint32_t head_dim;
    uint32_t half;
    uint32_t table_rows;
    // 1 turns by the positions, -1 back.
    float direction;
};

constexpr uint32_t ROPE_THREADS = 128;

// ---- loss ----

constexpr uint32_t CROSS_ENTROPY_THREADS = 512;

// ---- optimizer ----

constexpr uint32_t OPTIMIZER_THREADS = 256;
constexpr uint32_t OPTIMIZER_CHUNK = 4096;
// As many as a launch's 4 KB of parameters hold.
constexpr uint32_t OPTIMIZER_TENSORS = 60;
// Elements of a moment in 8 bits that share an absmax.
constexpr uint32_t DYNAMIC_8BIT_BLOCK = 256;

// One f32 tensor with its gradient and moments, as addresses on the device.
struct OptimizerTensor {
    uint64_t param;
    uint64_t grad;
    uint64_t m;
    uint64_t v;
    // Of moments in 8 bits.
    uint64_t m_absmax;
    uint64_t v_absmax;
    uint32_t elements;
    // The block that its first chunk belongs to.
    uint32_t first_block;
    // Which of the step's rates are its own.
    uint32_t rate;
};

// A tensor's numbers that change from step to step: they lie on the device.
struct AdamWRate {
    // 1 - lr * weight_decay
    float decay;
    // lr / (1 - beta1^t)
    float step_size;
    // 1 / sqrt(1 - beta2^t)
    float inv_sqrt_correction2;
};

struct OptimizerTable {
    OptimizerTensor tensors[OPTIMIZER_TENSORS];
    uint32_t count;
};

// What all tensors of a run share.
struct AdamWStep {
    float new1;  // 1 - beta1
    float keep2; // beta2
    float new2;  // 1 - beta2
    float eps;
    // 0: not clipped.
    float max_grad_norm;
};

// ---- attention ----

// One call of attention.
struct AttentionShape {
    uint32_t heads;
    uint32_t kv_heads;
    uint32_t head_dim;
    // Queries of all sequences.
    uint32_t tokens;
    // A query sees this many keys, the one at its own position being the last.
    uint32_t window;
    float scale;
    // Blocks that share the keys of one tile of queries.
    uint32_t splits;
    // Whether every head of every tensor starts at a multiple of 16 bytes.
    uint32_t aligned;
};

// Threads per block of attention_*, and of attention_merge_*.
constexpr uint32_t ATTENTION_THREADS = 128;
constexpr uint32_t ATTENTION_MERGE_THREADS = 256;
