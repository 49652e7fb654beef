// Which queries see which keys, and where their rows lie in memory: shared by all attention kernels.
//
// The query heads that share a key head work as one: a *row* is a query of one of them,
//   row = query * group + head in the group,     group = heads / kv_heads,
// so that a tile of rows reads each key once for the whole group, and a single query of each head (a
// decoding step) fills a tile as well as it can. Rows are in the order of memory.
#pragma once

#include <stdint.h>

#include "abi.h"

// Kernels ask for one block per multiprocessor: shared memory keeps others out sooner than registers, so
// there is nothing to gain from spilling some.
constexpr int THREADS = ATTENTION_THREADS;
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;

struct Range {
    int first, end;

    __device__ bool contains(int i) const { return first <= i && i < end; }
};

// Rows of head_dim elements: those of a group follow each other, then comes the next token.
template <typename T> struct Rows {
    T *data;
    int group;
    uint32_t token_stride;
    uint32_t head_dim;

    __device__ T *operator[](int row) const {
        uint32_t token = group == 1 ? row : row / group;
        return data + (size_t)token * token_stride + (uint32_t)(row - token * group) * head_dim;
    }
};

// One sequence and one key head.
struct Sequence {
    uint32_t q_begin, k_begin; // in the concatenation
    int queries, keys;
    int group;
    int kv_head;
    int offset; // the position of the first query among the keys: the last ones stand side by side
    int window;

    __device__ Sequence(const uint32_t *q_seqlens, const uint32_t *k_seqlens, int sequence, int kv_head,
                        const AttentionShape &shape)
        : q_begin(q_seqlens[sequence]), k_begin(k_seqlens[sequence]),
          queries(q_seqlens[sequence + 1] - q_begin), keys(k_seqlens[sequence + 1] - k_begin),
          group(shape.heads / shape.kv_heads), kv_head(kv_head), offset(keys - queries),
          window(shape.window) {}

    __device__ int rows() const { return queries * group; }

    // The keys that a row sees.
    __device__ Range keys_of(int row) const {
        int position = row / group + offset;
        return {max(position + 1 - window, 0), position + 1};
    }

    // The rows that see a key.
    __device__ Range rows_of(int key) const {
        int first = min(max(key - offset, 0), queries);
        int end = min(max(key - offset + window, 0), queries);
        return {first * group, end * group};
    }

    // Of q, o and their gradients, [tokens, heads * head_dim].
    template <typename T> __device__ Rows<T> query_rows(T *tensor, const AttentionShape &shape) const {
        uint32_t stride = shape.heads * shape.head_dim;
        T *data = tensor + (size_t)q_begin * stride + (size_t)kv_head * group * shape.head_dim;
        return {data, group, stride, shape.head_dim};
    }

    // Of k, v and their gradients, [kv_tokens, kv_heads * head_dim].
    template <typename T> __device__ Rows<T> key_rows(T *tensor, const AttentionShape &shape) const {
        uint32_t stride = shape.kv_heads * shape.head_dim;
        T *data = tensor + (size_t)k_begin * stride + (size_t)kv_head * shape.head_dim;
        return {data, 1, stride, shape.head_dim};
    }

    // Of lse, [tokens, heads].
    template <typename T> __device__ Rows<T> query_scalars(T *tensor, const AttentionShape &shape) const {
        T *data = tensor + (size_t)q_begin * shape.heads + kv_head * group;
        return {data, group, shape.heads, 1};
    }

    // Of the backward pass's statistics, [kv_heads, tokens, group]: a tile of rows is one run.
    template <typename T> __device__ T *statistics(T *tensor, const AttentionShape &shape) const {
        return tensor + ((size_t)kv_head * shape.tokens + q_begin) * group;
    }
};

// What the backward pass needs to know of a row: p = exp2(score * log2(e) - lse), ds = p (dp - delta).
struct Statistics {
    float lse;   // to the base of 2
    float delta; // the row's sum of do * o
};

__device__ inline int div_up(int a, int b) { return (a + b - 1) / b; }
