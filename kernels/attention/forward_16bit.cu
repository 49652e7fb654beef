// Attention, forward, f16 and bf16 on tensor cores
//
//   o = softmax(scale q kᵀ + mask) v        lse = log(sum over the row of exp(scale q kᵀ + mask))
//
// as forward_f32.cu, with the scores and the sums in f32 and the probabilities rounded to 16 bits for their
// product with v.
//
// Layouts   as forward_f32.cu.
// Launch    as forward_f32.cu: THREADS threads per tile of ROWS rows. A warp owns 16 M of them; with M = 2 every
//           fragment of k and v that it reads serves two products.
// Shared    the tiles of q [ROWS, D], k and v [KEYS, D]: 64 KB for D = 128, so that two blocks fit an A100. v is
//           on its way while the scores are computed, the next k while v is multiplied.
//
//             k0 ->|  q k0ᵀ  | softmax, p v0 |  q k1ᵀ  | ...
//                  |  v0 ->  |    k1 ->      |  v1 ->  |
//
// Registers of a warp's rows the results, 4 M D / 8 a lane, and the scores of a tile of keys, 4 M KEYS / 8.
// Traffic   at least 2 (2 tokens heads + 2 kv_tokens kv_heads) head_dim bytes; k and v move again for every
//           tile of rows that sees them. 4 head_dim FLOPs per row and visible key.
#include "../reduce.cuh"
#include "fragments.cuh"

template <int D> struct Block {
    static constexpr int M = D > 128 ? 1 : 2; // as the results of more rows do not fit the registers
    static constexpr int ROWS = 16 * M * WARPS;
    static constexpr int KEYS = D > 128 ? 32 : 64;
    static constexpr int N = KEYS / 8;
};

template <typename T, int D>
__device__ void forward(const T *q, const T *k, const T *v, void *o, float *lse, const uint32_t *q_seqlens,
                        const uint32_t *k_seqlens, AttentionShape shape) {
    using B = Block<D>;
    constexpr int M = B::M, N = B::N, KEYS = B::KEYS;
    uint32_t q_tile = shared_address(shared);
    uint32_t k_tile = q_tile + B::ROWS * Tile<D>::ROW_BYTES;
    uint32_t v_tile = k_tile + KEYS * Tile<D>::ROW_BYTES;

    Sequence sequence(q_seqlens, k_seqlens, blockIdx.y, blockIdx.x, shape);
    int tiles = gridDim.z / shape.splits;
    int split = blockIdx.z % shape.splits;
    int row0 = (tiles - 1 - blockIdx.z / shape.splits) * B::ROWS;
    int rows = sequence.rows();
    if (row0 >= rows) return;
    Range keys = {sequence.keys_of(row0).first, sequence.keys_of(min(row0 + B::ROWS, rows) - 1).end};
    int share = div_up(div_up(keys.end - keys.first, KEYS), shape.splits) * KEYS;
    keys.first += split * share;
    keys.end = min(keys.end, keys.first + share);

    // Each row sees the keys from `end` - window on. A warp may have no rows.
    int warp_row = warp() * 16 * M;
    bool idle = row0 + warp_row >= rows;
    int first_end = sequence.keys_of(row0 + warp_row).end;
    int last_end = sequence.keys_of(min(row0 + warp_row + 16 * M, rows) - 1).end;
    float largest[M][2], sum[M][2];
    Sums<M, D / 8> results = {};
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            largest[m][half] = -INFINITY;
            sum[m][half] = 0.0f;
        }

    float to_exponent = shape.scale * LOG2_E;
    uint32_t own = own_begin<D>(q_tile, warp_row);
    uint32_t k_begin = multiply_begin<D>(k_tile), v_begin = accumulate_begin<D>(v_tile, 0);
    load<D, B::ROWS>(q_tile, sequence.query_rows(q, shape), row0, rows, shape.aligned);
    load<D, KEYS>(k_tile, sequence.key_rows(k, shape), keys.first, sequence.keys, shape.aligned);
    commit_copies();
    for (int key0 = keys.first; key0 < keys.end; key0 += KEYS) {
        bool sees = !idle && first_end - sequence.window < key0 + KEYS && key0 < last_end;
        wait_for_copies<0>();
        __syncthreads(); // k is there, and nobody reads the last v any more
        load<D, KEYS>(v_tile, sequence.key_rows(v, shape), key0, sequence.keys, shape.aligned);
        commit_copies();
        Sums<M, N> scores;
        if (sees) multiply<T, D>(scores, own, k_begin);
        wait_for_copies<0>();
        __syncthreads(); // v is there, and nobody reads this k any more
        if (key0 + KEYS < keys.end) load<D, KEYS>(k_tile, sequence.key_rows(k, shape), key0 + KEYS, sequence.keys, shape.aligned);
        commit_copies();
        if (!sees) continue;

        if (key0 < last_end - sequence.window || key0 + KEYS > first_end) {
#pragma unroll
            for (int m = 0; m < M; ++m)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    Range visible = sequence.keys_of(row0 + warp_row + 16 * m + lane_row(half));
#pragma unroll
                    for (int n = 0; n < N; ++n)
#pragma unroll
                        for (int e = 2 * half; e < 2 * half + 2; ++e)
                            if (!visible.contains(key0 + 8 * n + lane_column() + e % 2)) scores[m][n][e] = -INFINITY;
                }
        }
        Weights<M, N> weights;
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float tile_largest = largest[m][half];
#pragma unroll
                for (int n = 0; n < N; ++n)
                    tile_largest =
                        fmaxf(tile_largest, fmaxf(scores[m][n][2 * half], scores[m][n][2 * half + 1]));
                tile_largest = reduce_row<Max>(tile_largest);
                // A row that has seen nothing yet: -inf - -inf is not a number.
                float shift = tile_largest == -INFINITY ? 0.0f : tile_largest * to_exponent;
                float correction = exp2_fast(largest[m][half] * to_exponent - shift);
                largest[m][half] = tile_largest;
                sum[m][half] *= correction;
#pragma unroll
                for (int n = 0; n < N; ++n) {
                    float low = exp2_fast(scores[m][n][2 * half] * to_exponent - shift);
                    float high = exp2_fast(scores[m][n][2 * half + 1] * to_exponent - shift);
                    sum[m][half] += low + high;
                    weights[m][n / 2][n % 2 * 2 + half] = pack<T>(low, high);
                }
#pragma unroll
                for (int c = 0; c < D / 8; ++c)
#pragma unroll
                    for (int e = 2 * half; e < 2 * half + 2; ++e) results[m][c][e] *= correction;
            }
        accumulate<T, D>(results, weights, v_begin);
    }
    wait_for_copies<0>();
    __syncthreads(); // where there were no keys, q is only now there: its place is about to be used
    if (idle) return;

    size_t partial = (size_t)split * shape.tokens * shape.heads;
    Rows<float> lse_rows = sequence.query_scalars(lse + partial, shape);
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float total = reduce_row<Sum>(sum[m][half]);
            float inverse = total > 0.0f ? 1.0f / total : 0.0f;
            int row = row0 + warp_row + 16 * m + lane_row(half);
            if (row < rows && lane_column() == 0)
                *lse_rows[row] = largest[m][half] * shape.scale + logf(total);
#pragma unroll
            for (int c = 0; c < D / 8; ++c)
#pragma unroll
                for (int e = 2 * half; e < 2 * half + 2; ++e) results[m][c][e] *= inverse;
        }
    if (shape.splits == 1) {
        store<D>(sequence.query_rows(static_cast<T *>(o), shape), row0, rows, 0, shape.aligned, results, q_tile,
                 warp_row);
        return;
    }
    // Partial results are f32: four lanes write a sector.
    Rows<float> o_rows = sequence.query_rows(static_cast<float *>(o) + partial * shape.head_dim, shape);
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int row = row0 + warp_row + 16 * m + lane_row(half);
            if (row >= rows) continue;
            float *to = o_rows[row];
#pragma unroll
            for (int c = 0; c < D / 8; ++c)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    uint32_t column = 8 * c + lane_column() + e;
                    if (column < shape.head_dim) to[column] = results[m][c][2 * half + e];
                }
        }
}

// Blocks that share a multiprocessor: as many as registers allow.
constexpr int blocks(int D) { return D > 64 ? 2 : 3; }

#define FORWARD(suffix, T, D)                                                                                \
    extern "C" __global__ void __launch_bounds__(THREADS, blocks(D)) attention_forward_##D##_##suffix(       \
        const T *q, const T *k, const T *v, void *o, float *lse, const uint32_t *q_seqlens,                  \
        const uint32_t *k_seqlens, AttentionShape shape) {                                                   \
        forward<T, D>(q, k, v, o, lse, q_seqlens, k_seqlens, shape);                                         \
    }

FORWARD(f16, __half, 64)
FORWARD(f16, __half, 128)
FORWARD(f16, __half, 256)
FORWARD(bf16, __nv_bfloat16, 64)
FORWARD(bf16, __nv_bfloat16, 128)
FORWARD(bf16, __nv_bfloat16, 256)
