// Attention, forward, f32 without tensor cores
//
//   o = softmax(scale q kᵀ + mask) v        lse = log(sum over the row of exp(scale q kᵀ + mask))
//
// for every sequence and head, with the softmax of a row kept up to date tile by tile (FlashAttention 2,
// Dao 2023): the scores never leave the chip.
//
// Layouts   q, o [tokens, heads * head_dim]; k, v [kv_tokens, kv_heads * head_dim]; lse [tokens, heads];
//           q_seqlens, k_seqlens [sequences + 1]. Rows are those of sequence.cuh.
// Launch    ATTENTION_THREADS threads per tile of EDGE rows: grid (kv_heads, sequences, tiles of the longest
//           sequence * splits). The last tiles, of every head and sequence, see the most keys and start first.
//           With splits > 1 a block takes its share of the keys, and o and lse are partial results [splits, ...] for
//           attention_merge_*.
// Shared    q, k and v tiles of EDGE x (D + 4), weights EDGE x (EDGE | 16): 56 KB for D = 128.
// Registers of a row its maximum, its sum and its results, spread over 16 lanes.
// Traffic   at least 4 (2 tokens heads + 2 kv_tokens kv_heads) head_dim bytes; k and v move again for every
//           tile of rows that sees them. 4 head_dim FLOPs per row and visible key.
#include "simt.cuh"

extern __shared__ float4 shared[];

template <int D>
__device__ void forward(const float *q, const float *k, const float *v, float *o, float *lse,
                        const uint32_t *q_seqlens, const uint32_t *k_seqlens, AttentionShape shape) {
    using T = Tile<D>;
    float *q_tile = reinterpret_cast<float *>(shared);
    float *k_tile = q_tile + T::SIZE;
    float *v_tile = k_tile + T::SIZE;
    float *weights = v_tile + T::SIZE;

    Sequence sequence(q_seqlens, k_seqlens, blockIdx.y, blockIdx.x, shape);
    int tiles = gridDim.z / shape.splits;
    int split = blockIdx.z % shape.splits;
    int row0 = (tiles - 1 - blockIdx.z / shape.splits) * T::EDGE;
    int rows = sequence.rows();
    if (row0 >= rows) return;
    Range keys = {sequence.keys_of(row0).first,
                  sequence.keys_of(min(row0 + T::EDGE, rows) - 1).end};
    int share = div_up(div_up(keys.end - keys.first, T::EDGE), shape.splits) * T::EDGE;
    keys.first += split * share;
    keys.end = min(keys.end, keys.first + share);

    Range visible[T::ROWS];
    float largest[T::ROWS], sum[T::ROWS], results[T::ROWS][T::VECTORS][4] = {};
    for (int i = 0; i < T::ROWS; ++i) {
        visible[i] = sequence.keys_of(row0 + lane_y() + STRIPES * i);
        largest[i] = -INFINITY;
        sum[i] = 0.0f;
    }
    load<D>(q_tile, sequence.query_rows(q, shape), row0, rows, shape.aligned);

    for (int key0 = keys.first; key0 < keys.end; key0 += T::EDGE) {
        load<D>(k_tile, sequence.key_rows(k, shape), key0, sequence.keys, shape.aligned);
        load<D>(v_tile, sequence.key_rows(v, shape), key0, sequence.keys, shape.aligned);
        __syncthreads();
        float scores[T::ROWS][T::COLUMNS];
        multiply<D>(scores, q_tile, k_tile);
        for (int i = 0; i < T::ROWS; ++i) {
            float tile_largest = largest[i];
            for (int j = 0; j < T::COLUMNS; ++j) {
                bool seen = visible[i].contains(key0 + lane_x() + LANES * j);
                scores[i][j] = seen ? scores[i][j] * shape.scale * LOG2_E : -INFINITY;
                tile_largest = fmaxf(tile_largest, scores[i][j]);
            }
            tile_largest = reduce_row(tile_largest, fmaxf);
            // A row that has seen nothing yet: -inf - -inf is not a number.
            float shift = tile_largest == -INFINITY ? 0.0f : tile_largest;
            float correction = exp2f(largest[i] - shift);
            largest[i] = tile_largest;
            sum[i] *= correction;
            for (int j = 0; j < T::COLUMNS; ++j) {
                scores[i][j] = exp2f(scores[i][j] - shift);
                sum[i] += scores[i][j];
            }
            for (int c = 0; c < T::VECTORS; ++c)
                for (int e = 0; e < 4; ++e) results[i][c][e] *= correction;
        }
        store_weights<D>(weights, scores);
        accumulate<D>(results, weights, v_tile);
        __syncthreads();
    }

    size_t partial = (size_t)split * shape.tokens * shape.heads;
    Rows<float> lse_rows = sequence.query_scalars(lse + partial, shape);
    float inverse[T::ROWS];
    for (int i = 0; i < T::ROWS; ++i) {
        float total = reduce_row(sum[i], [](float a, float b) { return a + b; });
        inverse[i] = total > 0.0f ? 1.0f / total : 0.0f;
        int row = row0 + lane_y() + STRIPES * i;
        if (row < rows && lane_x() == 0) *lse_rows[row] = largest[i] * LN_2 + logf(total);
    }
    Rows<float> o_rows = sequence.query_rows(o + partial * shape.head_dim, shape);
    store<D>(o_rows, row0, rows, shape.aligned, results, inverse);
}

#define FORWARD(D)                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_forward_##D##_f32(                \
        const float *q, const float *k, const float *v, float *o, float *lse,                       \
        const uint32_t *q_seqlens, const uint32_t *k_seqlens, AttentionShape shape) {               \
        forward<D>(q, k, v, o, lse, q_seqlens, k_seqlens, shape);                                   \
    }

FORWARD(64)
FORWARD(128)
FORWARD(256)
