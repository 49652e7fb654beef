// Attention, backward, f16 and bf16 on tensor cores
//
//   p  = exp(scale q kᵀ + mask - lse)         delta = sum over the row of do * o
//   ds = p * (do vᵀ - delta)
//   dq = scale ds k        dk = scale dsᵀ q        dv = pᵀ do
//
// in the two kernels of backward_f32.cu: _q owns a tile of rows and streams the keys that they see, _kv owns a
// tile of keys and streams the rows that see them. Each computes the products whose left factor it owns, pᵀ as
// k qᵀ, so that weights go from one product into the next without leaving the registers. p and ds are
// rounded to 16 bits there; all sums are f32.
//
// Layouts   as backward_f32.cu.
// Launch    THREADS threads per tile: grid (kv_heads, sequences, tiles of the longest sequence), so that the tiles
//           with the most work, of every head and sequence, start first. For D = 256, two blocks of _kv share a tile
//           of keys: the sums of a whole head do not fit the registers, so each computes the weights and adds up
//           half of the columns.
// Shared    the two own tiles, and two stages of the streamed ones: while one is multiplied, the other is on its
//           way. _kv streams a tile's statistics too. D = 128: _q 96 KB, _kv 64 KB.
// Registers of a warp's rows the results, and the scores of the streamed tile and their gradients.
// Traffic   at least 2 (4 tokens heads + 4 kv_tokens kv_heads) head_dim bytes; the streamed tensors move
//           again for every tile that owns. 14 head_dim FLOPs per row and visible key.
#include "../reduce.cuh"
#include "fragments.cuh"

// What a block of _q owns and streams.
template <int D> struct RowBlock {
    static constexpr int M = D > 128 ? 1 : 2;
    static constexpr int ROWS = 16 * M * WARPS;
    static constexpr int KEYS = 32;
    static constexpr int N = KEYS / 8;
    static constexpr int OWN_BYTES = ROWS * Tile<D>::ROW_BYTES, STREAMED_BYTES = KEYS * Tile<D>::ROW_BYTES;
};

// And of _kv.
template <int D> struct KeyBlock {
    static constexpr int M = 1;
    static constexpr int KEYS = 16 * M * WARPS;
    static constexpr int ROWS = D > 128 ? 16 : 32;
    static constexpr int N = ROWS / 8;
    static constexpr int COLUMNS = D > 128 ? 128 : D; // of the results
    static constexpr int OWN_BYTES = KEYS * Tile<D>::ROW_BYTES, STREAMED_BYTES = ROWS * Tile<D>::ROW_BYTES;
};

template <typename T, int D>
__device__ void backward_q(const T *d_o, const T *q, const T *k, const T *v, const T *o, const float *lse,
                           Statistics *statistics, T *dq, const uint32_t *q_seqlens, const uint32_t *k_seqlens,
                           AttentionShape shape) {
    using B = RowBlock<D>;
    constexpr int M = B::M, N = B::N;
    uint32_t q_tile = shared_address(shared);
    uint32_t d_o_tile = q_tile + B::OWN_BYTES;
    uint32_t stages = d_o_tile + B::OWN_BYTES; // of k, then v

    Sequence sequence(q_seqlens, k_seqlens, blockIdx.y, blockIdx.x, shape);
    int row0 = (gridDim.z - 1 - blockIdx.z) * B::ROWS;
    int rows = sequence.rows();
    if (row0 >= rows) return;
    Range keys = {sequence.keys_of(row0).first, sequence.keys_of(min(row0 + B::ROWS, rows) - 1).end};
    auto load_keys = [&](int key0, int stage) {
        uint32_t tile = stages + stage * 2 * B::STREAMED_BYTES;
        load<D, B::KEYS>(tile, sequence.key_rows(k, shape), key0, sequence.keys, shape.aligned);
        load<D, B::KEYS>(tile + B::STREAMED_BYTES, sequence.key_rows(v, shape), key0, sequence.keys, shape.aligned);
        commit_copies();
    };
    load<D, B::ROWS>(q_tile, sequence.query_rows(q, shape), row0, rows, shape.aligned);
    load<D, B::ROWS>(d_o_tile, sequence.query_rows(d_o, shape), row0, rows, shape.aligned);
    load_keys(keys.first, 0);

    // Each row sees the keys from `end` - window on. A warp may have no rows.
    int warp_row = warp() * 16 * M;
    bool idle = row0 + warp_row >= rows;
    int first_end = sequence.keys_of(row0 + warp_row).end;
    int last_end = sequence.keys_of(min(row0 + warp_row + 16 * M, rows) - 1).end;
    // Opaque, or the compiler would keep what they follow from in registers as well.
    asm("" : "+r"(first_end), "+r"(last_end));
    int end[M][2];
    float row_lse[M][2], delta[M][2];
    wait_for_copies<0>();
    __syncthreads();
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int own = warp_row + 16 * m + lane_row(half), row = row0 + own;
            end[m][half] = sequence.keys_of(row).end;
            float sum = 0.0f;
            row_lse[m][half] = 0.0f;
            if (row < rows) {
                const T *o_row = sequence.query_rows(o, shape)[row];
                // Odd rows take the other four of eight chunks first: the two rows that eight lanes read at once
                // would otherwise meet in the same banks.
                for (uint32_t i = lane() % 4; i < Tile<D>::CHUNKS; i += 4) {
                    uint32_t chunk = i ^ own % 2 * 4;
                    if (chunk * 8 >= shape.head_dim) continue;
                    uint4 left = load_shared(d_o_tile + swizzled<Tile<D>::ROW_BYTES>(own, chunk));
                    uint4 right = shape.aligned ? *reinterpret_cast<const uint4 *>(o_row + chunk * 8)
                                                : gather(o_row + chunk * 8, shape.head_dim - chunk * 8);
#pragma unroll
                    for (int e = 0; e < 8; ++e)
                        sum += widen(reinterpret_cast<T *>(&left)[e]) * widen(reinterpret_cast<T *>(&right)[e]);
                }
                row_lse[m][half] = *sequence.query_scalars(lse, shape)[row] * LOG2_E;
            }
            delta[m][half] = reduce_row<Sum>(sum);
            if (row < rows && lane() % 4 == 0)
                sequence.statistics(statistics, shape)[row] = {row_lse[m][half], delta[m][half]};
        }

    float to_exponent = shape.scale * LOG2_E;
    Sums<M, D / 8> results = {};
    uint32_t q_begin = own_begin<D>(q_tile, warp_row), d_o_begin = own_begin<D>(d_o_tile, warp_row);
    for (int key0 = keys.first, stage = 0; key0 < keys.end; key0 += B::KEYS, stage ^= 1) {
        wait_for_copies<0>();
        __syncthreads(); // these keys are there, and nobody reads the ones before any more
        if (key0 + B::KEYS < keys.end) load_keys(key0 + B::KEYS, stage ^ 1);
        if (idle || first_end - sequence.window >= key0 + B::KEYS || key0 >= last_end) continue;
        uint32_t k_tile = stages + stage * 2 * B::STREAMED_BYTES, v_tile = k_tile + B::STREAMED_BYTES;
        Sums<M, N> p, ds;
        multiply<T, D>(p, q_begin, multiply_begin<D>(k_tile));
        multiply<T, D>(ds, d_o_begin, multiply_begin<D>(v_tile));
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int n = 0; n < N; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    ds[m][n][e] = exp2_fast(p[m][n][e] * to_exponent - row_lse[m][e / 2]) *
                                  (ds[m][n][e] - delta[m][e / 2]);
        if (key0 < last_end - sequence.window || key0 + B::KEYS > first_end) {
#pragma unroll
            for (int m = 0; m < M; ++m)
#pragma unroll
                for (int n = 0; n < N; ++n)
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        int distance = end[m][e / 2] - (key0 + 8 * n + lane_column() + e % 2);
                        if (distance <= 0 || distance > sequence.window) ds[m][n][e] = 0.0f;
                    }
        }
        Weights<M, N> weights;
        round<T>(weights, ds);
        accumulate<T, D>(results, weights, accumulate_begin<D>(k_tile, 0));
    }
    if (idle) return;
    scale(results, shape.scale);
    store<D>(sequence.query_rows(dq, shape), row0, rows, 0, shape.aligned, results, q_tile, warp_row);
}

// Copies 8 bytes to shared memory, or fills them with zeros.
__device__ inline void copy_async(uint32_t to, const Statistics *from, bool present) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(from), "r"(present ? 8 : 0)
                 : "memory");
}

template <typename T, int D>
__device__ void backward_kv(const T *d_o, const T *q, const T *k, const T *v, const Statistics *statistics, T *dk,
                            T *dv, const uint32_t *q_seqlens, const uint32_t *k_seqlens, AttentionShape shape) {
    using B = KeyBlock<D>;
    constexpr int M = B::M, N = B::N, PARTS = D / B::COLUMNS;
    uint32_t k_tile = shared_address(shared);
    uint32_t v_tile = k_tile + B::OWN_BYTES;
    uint32_t stages = v_tile + B::OWN_BYTES; // of q, then do
    uint32_t streamed_statistics = stages + 4 * B::STREAMED_BYTES;

    Sequence sequence(q_seqlens, k_seqlens, blockIdx.y, blockIdx.x, shape);
    int key0 = blockIdx.z / PARTS * B::KEYS;
    if (key0 >= sequence.keys) return;
    int column = blockIdx.z % PARTS * B::COLUMNS;
    Range rows = {sequence.rows_of(key0).first, sequence.rows_of(min(key0 + B::KEYS, sequence.keys) - 1).end};
    auto load_rows = [&](int row0, int stage) {
        uint32_t tile = stages + stage * 2 * B::STREAMED_BYTES;
        load<D, B::ROWS>(tile, sequence.query_rows(q, shape), row0, sequence.rows(), shape.aligned);
        load<D, B::ROWS>(tile + B::STREAMED_BYTES, sequence.query_rows(d_o, shape), row0, sequence.rows(),
                         shape.aligned);
        if (threadIdx.x < B::ROWS) {
            int row = row0 + threadIdx.x;
            bool exists = row < sequence.rows();
            copy_async(streamed_statistics + (stage * B::ROWS + threadIdx.x) * sizeof(Statistics),
                       sequence.statistics(statistics, shape) + (exists ? row : 0), exists);
        }
        commit_copies();
    };
    load<D, B::KEYS>(k_tile, sequence.key_rows(k, shape), key0, sequence.keys, shape.aligned);
    load<D, B::KEYS>(v_tile, sequence.key_rows(v, shape), key0, sequence.keys, shape.aligned);
    if (rows.first < rows.end) load_rows(rows.first, 0);
    commit_copies();

    // What rows see some of the warp's keys, and all. A warp may have no keys.
    int warp_key = warp() * 16 * M;
    bool idle = key0 + warp_key >= sequence.keys;
    Range first = sequence.rows_of(key0 + warp_key);
    Range last = sequence.rows_of(min(key0 + warp_key + 16 * M, sequence.keys) - 1);
    float to_exponent = shape.scale * LOG2_E;
    Sums<M, B::COLUMNS / 8> dk_sums = {}, dv_sums = {};
    uint32_t k_begin = own_begin<D>(k_tile, warp_key), v_begin = own_begin<D>(v_tile, warp_key);
    for (int row0 = rows.first, stage = 0; row0 < rows.end; row0 += B::ROWS, stage ^= 1) {
        wait_for_copies<0>();
        __syncthreads(); // these rows are there, and nobody reads the ones before any more
        if (row0 + B::ROWS < rows.end) load_rows(row0 + B::ROWS, stage ^ 1);
        if (idle || row0 + B::ROWS <= first.first || row0 >= last.end) continue;
        uint32_t q_tile = stages + stage * 2 * B::STREAMED_BYTES, d_o_tile = q_tile + B::STREAMED_BYTES;
        Sums<M, N> p, ds;
        multiply<T, D>(p, k_begin, multiply_begin<D>(q_tile));
        multiply<T, D>(ds, v_begin, multiply_begin<D>(d_o_tile));
#pragma unroll
        for (int n = 0; n < N; ++n) {
            // Of the two rows that are a lane's columns.
            uint4 raw = load_shared(streamed_statistics +
                                    (stage * B::ROWS + 8 * n + lane_column()) * sizeof(Statistics));
            const Statistics *row = reinterpret_cast<const Statistics *>(&raw);
#pragma unroll
            for (int m = 0; m < M; ++m)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    p[m][n][e] = exp2_fast(p[m][n][e] * to_exponent - row[e % 2].lse);
                    ds[m][n][e] = p[m][n][e] * (ds[m][n][e] - row[e % 2].delta);
                }
        }
        if (row0 < last.first || row0 + B::ROWS > first.end) {
#pragma unroll
            for (int m = 0; m < M; ++m)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    Range visible = sequence.rows_of(key0 + warp_key + 16 * m + lane_row(half));
#pragma unroll
                    for (int n = 0; n < N; ++n)
#pragma unroll
                        for (int e = 2 * half; e < 2 * half + 2; ++e)
                            if (!visible.contains(row0 + 8 * n + lane_column() + e % 2))
                                p[m][n][e] = ds[m][n][e] = 0.0f;
                }
        }
        Weights<M, N> weights;
        round<T>(weights, p);
        accumulate<T, D>(dv_sums, weights, accumulate_begin<D>(d_o_tile, column));
        round<T>(weights, ds);
        accumulate<T, D>(dk_sums, weights, accumulate_begin<D>(q_tile, column));
    }
    wait_for_copies<0>();
    __syncthreads(); // where no row saw a key, k and v are only now there: their places are about to be used
    if (idle) return;
    scale(dk_sums, shape.scale);
    store<D>(sequence.key_rows(dk, shape), key0, sequence.keys, column, shape.aligned, dk_sums, k_tile, warp_key);
    store<D>(sequence.key_rows(dv, shape), key0, sequence.keys, column, shape.aligned, dv_sums, v_tile, warp_key);
}

#define BACKWARD(suffix, T, D)                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS, D > 64 ? 2 : 3) attention_backward_q_##D##_##suffix(  \
        const T *d_o, const T *q, const T *k, const T *v, const T *o, const float *lse, Statistics *statistics, \
        T *dq, const uint32_t *q_seqlens, const uint32_t *k_seqlens, AttentionShape shape) {                    \
        backward_q<T, D>(d_o, q, k, v, o, lse, statistics, dq, q_seqlens, k_seqlens, shape);                    \
    }                                                                                                           \
    extern "C" __global__ void __launch_bounds__(THREADS, D > 64 ? 2 : 3) attention_backward_kv_##D##_##suffix( \
        const T *d_o, const T *q, const T *k, const T *v, const Statistics *statistics, T *dk, T *dv,           \
        const uint32_t *q_seqlens, const uint32_t *k_seqlens, AttentionShape shape) {                           \
        backward_kv<T, D>(d_o, q, k, v, statistics, dk, dv, q_seqlens, k_seqlens, shape);                       \
    }

BACKWARD(f16, __half, 64)
BACKWARD(f16, __half, 128)
BACKWARD(f16, __half, 256)
BACKWARD(bf16, __nv_bfloat16, 64)
BACKWARD(bf16, __nv_bfloat16, 128)
BACKWARD(bf16, __nv_bfloat16, 256)
