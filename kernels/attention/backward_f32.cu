// Attention, backward, f32 without tensor cores
//
//   p  = exp(scale q kᵀ + mask - lse)         delta = sum over the row of do * o
//   ds = p * (do vᵀ - delta)
//   dq = scale ds k        dk = scale dsᵀ q        dv = pᵀ do
//
// in two kernels that each compute p and ds again, tile by tile: _q owns a tile of rows and streams the keys
// that they see, _kv owns a tile of keys and streams the rows that see them, all query heads of the group
// among them. A block writes only its own rows, so nothing is added up in memory and every run gives
// the same bits.
//
// Layouts   as forward_f32.cu. statistics [kv_heads, tokens, group] of two floats is written by _q, which
//           has do at hand, and read by _kv.
// Launch    ATTENTION_THREADS threads per tile: grid (kv_heads, sequences, tiles of the longest sequence), so that the
//           tiles with the most work, of every head and sequence, start first.
// Shared    the two own tiles, the two streamed ones, weights: 74 KB for D = 128; _kv also a tile's
//           statistics.
// Traffic   at least 4 (4 tokens heads + 4 kv_tokens kv_heads) head_dim bytes; the streamed tensors move
//           again for every tile that owns. 14 head_dim FLOPs per row and visible key, 4 of them because
//           two kernels compute the scores and do vᵀ.
#include "simt.cuh"

extern __shared__ float4 shared[];

template <int D>
__device__ void backward_q(const float *d_o, const float *q, const float *k, const float *v,
                           const float *o, const float *lse, Statistics *statistics, float *dq,
                           const uint32_t *q_seqlens, const uint32_t *k_seqlens, AttentionShape shape) {
    using T = Tile<D>;
    float *q_tile = reinterpret_cast<float *>(shared);
    float *d_o_tile = q_tile + T::SIZE;
    float *k_tile = d_o_tile + T::SIZE;
    float *v_tile = k_tile + T::SIZE;
    float *weights = v_tile + T::SIZE;

    Sequence sequence(q_seqlens, k_seqlens, blockIdx.y, blockIdx.x, shape);
    int row0 = (gridDim.z - 1 - blockIdx.z) * T::EDGE;
    int rows = sequence.rows();
    if (row0 >= rows) return;
    load<D>(q_tile, sequence.query_rows(q, shape), row0, rows, shape.aligned);
    load<D>(d_o_tile, sequence.query_rows(d_o, shape), row0, rows, shape.aligned);
    // Until the first keys arrive, v's tile holds o.
    load<D>(v_tile, sequence.query_rows(o, shape), row0, rows, shape.aligned);
    __syncthreads();

    Rows<const float> lse_rows = sequence.query_scalars(lse, shape);
    Range visible[T::ROWS];
    Statistics own[T::ROWS];
    for (int i = 0; i < T::ROWS; ++i) {
        int row = lane_y() + STRIPES * i;
        float delta = 0.0f;
        for (int d = 4 * lane_x(); d < D; d += 4 * LANES) {
            float4 left = *reinterpret_cast<const float4 *>(d_o_tile + row * T::STRIDE + d);
            float4 right = *reinterpret_cast<const float4 *>(v_tile + row * T::STRIDE + d);
            delta += left.x * right.x + left.y * right.y + left.z * right.z + left.w * right.w;
        }
        own[i].delta = reduce_row(delta, [](float a, float b) { return a + b; });
        visible[i] = sequence.keys_of(row0 + row);
        own[i].lse = 0.0f;
        if (row0 + row < rows) {
            own[i].lse = *lse_rows[row0 + row] * LOG2_E;
            if (lane_x() == 0) sequence.statistics(statistics, shape)[row0 + row] = own[i];
        }
    }

    float sums[T::ROWS][T::VECTORS][4] = {};
    Range keys = {sequence.keys_of(row0).first,
                  sequence.keys_of(min(row0 + T::EDGE, rows) - 1).end};
    for (int key0 = keys.first; key0 < keys.end; key0 += T::EDGE) {
        __syncthreads();
        load<D>(k_tile, sequence.key_rows(k, shape), key0, sequence.keys, shape.aligned);
        load<D>(v_tile, sequence.key_rows(v, shape), key0, sequence.keys, shape.aligned);
        __syncthreads();
        float p[T::ROWS][T::COLUMNS], ds[T::ROWS][T::COLUMNS];
        multiply<D>(p, q_tile, k_tile);
        multiply<D>(ds, d_o_tile, v_tile);
        for (int i = 0; i < T::ROWS; ++i)
            for (int j = 0; j < T::COLUMNS; ++j) {
                bool seen = visible[i].contains(key0 + lane_x() + LANES * j);
                float exponent = p[i][j] * shape.scale * LOG2_E - own[i].lse;
                ds[i][j] = seen ? exp2f(exponent) * (ds[i][j] - own[i].delta) : 0.0f;
            }
        store_weights<D>(weights, ds);
        accumulate<D>(sums, weights, k_tile);
    }
    float factor[T::ROWS];
    for (int i = 0; i < T::ROWS; ++i) factor[i] = shape.scale;
    store<D>(sequence.query_rows(dq, shape), row0, rows, shape.aligned, sums, factor);
}

template <int D>
__device__ void backward_kv(const float *d_o, const float *q, const float *k, const float *v,
                            const Statistics *statistics, float *dk, float *dv,
                            const uint32_t *q_seqlens, const uint32_t *k_seqlens, AttentionShape shape) {
    using T = Tile<D>;
    float *k_tile = reinterpret_cast<float *>(shared);
    float *v_tile = k_tile + T::SIZE;
    float *q_tile = v_tile + T::SIZE;
    float *d_o_tile = q_tile + T::SIZE;
    float *weights = d_o_tile + T::SIZE;
    Statistics *streamed = reinterpret_cast<Statistics *>(weights + T::WEIGHTS_SIZE);

    Sequence sequence(q_seqlens, k_seqlens, blockIdx.y, blockIdx.x, shape);
    int key0 = blockIdx.z * T::EDGE;
    if (key0 >= sequence.keys) return;
    load<D>(k_tile, sequence.key_rows(k, shape), key0, sequence.keys, shape.aligned);
    load<D>(v_tile, sequence.key_rows(v, shape), key0, sequence.keys, shape.aligned);

    Range visible[T::ROWS];
    for (int i = 0; i < T::ROWS; ++i) visible[i] = sequence.rows_of(key0 + lane_y() + STRIPES * i);
    float dk_sums[T::ROWS][T::VECTORS][4] = {}, dv_sums[T::ROWS][T::VECTORS][4] = {};
    Range rows = {sequence.rows_of(key0).first,
                  sequence.rows_of(min(key0 + T::EDGE, sequence.keys) - 1).end};
    for (int row0 = rows.first; row0 < rows.end; row0 += T::EDGE) {
        __syncthreads();
        load<D>(q_tile, sequence.query_rows(q, shape), row0, sequence.rows(), shape.aligned);
        load<D>(d_o_tile, sequence.query_rows(d_o, shape), row0, sequence.rows(), shape.aligned);
        if (threadIdx.x < T::EDGE) {
            int row = row0 + threadIdx.x;
            streamed[threadIdx.x] = row < sequence.rows()
                                        ? sequence.statistics(statistics, shape)[row]
                                        : Statistics{};
        }
        __syncthreads();
        float p[T::ROWS][T::COLUMNS], ds[T::ROWS][T::COLUMNS];
        multiply<D>(p, k_tile, q_tile);
        multiply<D>(ds, v_tile, d_o_tile);
        for (int j = 0; j < T::COLUMNS; ++j) {
            int column = lane_x() + LANES * j;
            Statistics row = streamed[column];
            for (int i = 0; i < T::ROWS; ++i) {
                bool seen = visible[i].contains(row0 + column);
                p[i][j] = seen ? exp2f(p[i][j] * shape.scale * LOG2_E - row.lse) : 0.0f;
                ds[i][j] = p[i][j] * (ds[i][j] - row.delta);
            }
        }
        store_weights<D>(weights, p);
        accumulate<D>(dv_sums, weights, d_o_tile);
        store_weights<D>(weights, ds);
        accumulate<D>(dk_sums, weights, q_tile);
    }
    float factor[T::ROWS];
    for (int i = 0; i < T::ROWS; ++i) factor[i] = shape.scale;
    store<D>(sequence.key_rows(dk, shape), key0, sequence.keys, shape.aligned, dk_sums, factor);
    for (int i = 0; i < T::ROWS; ++i) factor[i] = 1.0f;
    store<D>(sequence.key_rows(dv, shape), key0, sequence.keys, shape.aligned, dv_sums, factor);
}

#define BACKWARD(D)                                                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_backward_q_##D##_f32(             \
        const float *d_o, const float *q, const float *k, const float *v, const float *o,           \
        const float *lse, Statistics *statistics, float *dq, const uint32_t *q_seqlens,             \
        const uint32_t *k_seqlens, AttentionShape shape) {                                          \
        backward_q<D>(d_o, q, k, v, o, lse, statistics, dq, q_seqlens, k_seqlens, shape);           \
    }                                                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_backward_kv_##D##_f32(            \
        const float *d_o, const float *q, const float *k, const float *v,                           \
        const Statistics *statistics, float *dk, float *dv, const uint32_t *q_seqlens,              \
        const uint32_t *k_seqlens, AttentionShape shape) {                                          \
        backward_kv<D>(d_o, q, k, v, statistics, dk, dv, q_seqlens, k_seqlens, shape);              \
    }

BACKWARD(64)
BACKWARD(128)
BACKWARD(256)
