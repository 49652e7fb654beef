// A tile of a matrix product on tensor cores, of f16 or bf16 with f32 sums
//
//   sums [ROWS, COLS] += left [ROWS, depth] . right [depth, COLS]
//
// Slices of DEPTH of both factors pass through a ring of STAGES places in shared memory: asynchronous copies
// fill it STAGES - 1 slices ahead, and the ring turns with one barrier per slice. The warps stand
// ROW_WARPS x (8 / ROW_WARPS) and keep their part of the sums in registers, as well as two sets of fragments,
// so that `ldmatrix` fetches one while `mma` works on the other.
//
//                  COLS                              ring
//            +------+------+                +-----+-----+-----+-----+
//       ROWS | warp | warp | ...            | mma | full| on its way|
//            +------+------+                +-----+-----+-----+-----+
//
// Where a slice comes from is the business of a source, which has
//   using Slice     how the slice lies in shared memory: EdgeMajor or DepthMajor;
//   load(place, d)  begins to fill the slice at shared address `place` from depth `d` on, with zeros where
//                   there is nothing; it is complete after the group's copies have landed and a barrier.
//                   It is called for one slice after the other, so a source may keep the next in registers.
#pragma once

#include "abi.h"
#include "mma.cuh"

constexpr int WARPS = GEMM_THREADS / 32;

// ---- slices in shared memory ----

// Rows of ROW_BYTES along the depth, one per element along the edge.
template <int ROW_BYTES> struct EdgeMajor {
    // Where the lane begins in the slice as the left factor, for a warp whose part begins at `edge`.
    static __device__ uint32_t left_begin(int edge, int lane) {
        return swizzled<ROW_BYTES>(edge + lane % 16, lane / 16);
    }
    // The fragment of 16 rows, `fragment` times 16 further along the edge, and of 32 bytes, `step` times 32
    // further along the depth.
    static __device__ void read_left(uint32_t (&fragment)[4], uint32_t begin, int i, int step) {
        load_matrices(fragment, (begin ^ step * 32) + i * 16 * ROW_BYTES);
    }
    static __device__ uint32_t right_begin(int edge, int lane) {
        return swizzled<ROW_BYTES>(edge + lane % 8 + lane / 16 * 8, lane / 8 % 2);
    }
    // The fragments of 16 columns: two words of the first eight, two of the others.
    static __device__ void read_right(uint32_t (&fragment)[4], uint32_t begin, int j, int step) {
        load_matrices(fragment, (begin ^ step * 32) + j * 16 * ROW_BYTES);
    }
};

// Rows of ROW_BYTES along the edge, one per element of the depth.
template <int ROW_BYTES> struct DepthMajor {
    static __device__ uint32_t left_begin(int edge, int lane) {
        return swizzled<ROW_BYTES>(lane % 8 + lane / 16 * 8, edge / 8 + lane / 8 % 2);
    }
    static __device__ void read_left(uint32_t (&fragment)[4], uint32_t begin, int i, int step) {
        load_matrices_transposed(fragment, (begin ^ i * 32) + step * 16 * ROW_BYTES);
    }
    static __device__ uint32_t right_begin(int edge, int lane) {
        return swizzled<ROW_BYTES>(lane % 16, edge / 8 + lane / 16);
    }
    static __device__ void read_right(uint32_t (&fragment)[4], uint32_t begin, int j, int step) {
        load_matrices_transposed(fragment, (begin ^ j * 32) + step * 16 * ROW_BYTES);
    }
};

// ---- sources ----

// What a thread copies of a slice lies in one column of 16-byte chunks. `aligned`: rows are whole chunks that start at
// multiples of 16 bytes.

// A factor that is held [edge, depth].
template <typename T, int EDGE, int DEPTH, bool aligned> struct FromEdgeMajor {
    using Slice = EdgeMajor<DEPTH * sizeof(T)>;
    static constexpr int CHUNKS = DEPTH / 8;                // per row
    static constexpr int STRIDE = GEMM_THREADS / CHUNKS;    // rows between a thread's copies
    static constexpr int COPIES = EDGE / STRIDE;
    static_assert(EDGE % STRIDE == 0 && STRIDE % 8 == 0, "every copy has the same place in the swizzle");

    const T *next; // the thread's first chunk of the next slice
    uint32_t row, edge, depth;

    // `data` [edge, depth] from row edge0 on.
    __device__ FromEdgeMajor(uint64_t data, uint32_t edge, uint32_t depth, uint32_t edge0)
        : row(edge0 + threadIdx.x / CHUNKS), edge(edge), depth(depth) {
        next = reinterpret_cast<const T *>(data) + (size_t)row * depth + threadIdx.x % CHUNKS * 8;
    }

    __device__ void load(uint32_t place, uint32_t depth0) {
        uint32_t d = depth0 + threadIdx.x % CHUNKS * 8;
        uint32_t to = place + swizzled<DEPTH * sizeof(T)>(threadIdx.x / CHUNKS, threadIdx.x % CHUNKS);
#pragma unroll
        for (int i = 0; i < COPIES; ++i) {
            uint32_t at = to + i * STRIDE * DEPTH * sizeof(T);
            const T *from = next + (uint64_t)depth * (i * STRIDE);
            bool exists = d < depth && row + i * STRIDE < edge;
            if (aligned)
                copy_async(at, from, exists);
            else
                store_shared(at, gather(from, exists ? depth - d : 0));
        }
        next += DEPTH;
    }
};

// A factor that is held [depth, edge].
template <typename T, int EDGE, int DEPTH, bool aligned> struct FromDepthMajor {
    using Slice = DepthMajor<EDGE * sizeof(T)>;
    static constexpr int CHUNKS = EDGE / 8;
    static constexpr int STRIDE = GEMM_THREADS / CHUNKS;
    static constexpr int COPIES = DEPTH / STRIDE;
    static_assert(DEPTH % STRIDE == 0 && STRIDE % 8 == 0, "every copy has the same place in the swizzle");

    const T *next; // the thread's first chunk of the next slice
    uint32_t edge, depth;
    uint32_t present; // elements that the thread's chunks have, if any

    __device__ FromDepthMajor(uint64_t data, uint32_t edge, uint32_t depth, uint32_t edge0)
        : edge(edge), depth(depth) {
        uint32_t col = edge0 + threadIdx.x % CHUNKS * 8;
        present = col < edge ? edge - col : 0;
        next = reinterpret_cast<const T *>(data) + col + (size_t)(threadIdx.x / CHUNKS) * edge;
    }

    __device__ void load(uint32_t place, uint32_t depth0) {
        uint32_t left = present ? depth - depth0 - threadIdx.x / CHUNKS : 0; // rows from the thread's first on
        if (depth0 + threadIdx.x / CHUNKS >= depth) left = 0;
        uint32_t to = place + swizzled<EDGE * sizeof(T)>(threadIdx.x / CHUNKS, threadIdx.x % CHUNKS);
#pragma unroll
        for (int i = 0; i < COPIES; ++i) {
            uint32_t at = to + i * STRIDE * EDGE * sizeof(T);
            const T *from = next + (uint64_t)edge * (i * STRIDE);
            bool exists = i * STRIDE < left;
            if (aligned)
                copy_async(at, from, exists);
            else
                store_shared(at, gather(from, exists ? present : 0));
        }
        next += (size_t)DEPTH * edge;
    }
};

// ---- the tile ----

template <typename T, int ROWS_, int COLS_, int DEPTH_, int STAGES_, int ROW_WARPS> struct Gemm {
    static constexpr int ROWS = ROWS_, COLS = COLS_, DEPTH = DEPTH_, STAGES = STAGES_;
    static constexpr int COL_WARPS = WARPS / ROW_WARPS;
    static constexpr int WARP_ROWS = ROWS / ROW_WARPS, WARP_COLS = COLS / COL_WARPS;
    static constexpr int M = WARP_ROWS / 16, N = WARP_COLS / 8; // fragments of a warp's sums
    static constexpr int STEPS = DEPTH / 16;
    static constexpr int LEFT_BYTES = ROWS * DEPTH * sizeof(T), RIGHT_BYTES = COLS * DEPTH * sizeof(T);
    static constexpr int STAGE_BYTES = LEFT_BYTES + RIGHT_BYTES;
    static constexpr int SHARED_BYTES = STAGES * STAGE_BYTES;
    static_assert(STEPS % 2 == 0, "the sets of fragments alternate from slice to slice too");
    static_assert(N % 2 == 0, "fragments of the right factor come in pairs");
    static_assert(ROWS * COLS * sizeof(T) <= SHARED_BYTES, "the results pass through shared memory");

    // What a warp multiplies at a time.
    struct Fragments {
        uint32_t left[M][4];
        uint32_t right[N / 2][4];
    };

    uint32_t shared; // SHARED_BYTES
    uint32_t row0, col0;
    int lane, warp_row, warp_col; // the warp's part begins there in the tile
    float sums[M][N][4];

    __device__ Gemm(const void *shared, uint32_t row0, uint32_t col0)
        : shared(shared_address(shared)), row0(row0), col0(col0), lane(threadIdx.x % 32),
          warp_row(threadIdx.x / 32 / COL_WARPS * WARP_ROWS), warp_col(threadIdx.x / 32 % COL_WARPS * WARP_COLS),
          sums{} {}

    // The first row and column of a fragment's sums that the lane holds, see mma.cuh.
    __device__ uint32_t row(int i) const { return row0 + warp_row + i * 16 + lane / 4; }
    __device__ uint32_t col(int j) const { return col0 + warp_col + j * 8 + lane % 4 * 2; }

    __device__ uint32_t left_place(int stage) const { return shared + stage * STAGE_BYTES; }
    __device__ uint32_t right_place(int stage) const { return left_place(stage) + LEFT_BYTES; }

    template <typename Element> __device__ void multiply_all(const Fragments &fragments) {
#pragma unroll
        for (int i = 0; i < M; ++i)
#pragma unroll
            for (int j = 0; j < N; ++j)
                multiply(Element(), sums[i][j], fragments.left[i], fragments.right[j / 2][j % 2 * 2],
                         fragments.right[j / 2][j % 2 * 2 + 1]);
    }

    // sums += what `first` makes of its slices + left . right. Shared memory is free afterwards. `first` has
    //   count              its slices, which pass through the ring before those of the factors, so that the ring
    //                      turns on from one product to the other;
    //   load(place, i)     begins to fill slice i, as a source does;
    //   add(tile, place)   adds what has landed there to the sums.
    template <typename First, typename Left, typename Right>
    __device__ void add(First &first, Left &left, Right &right, uint32_t depth) {
        uint32_t slice = 0, next = 0; // of `first` and of the factors, that are to be loaded
        int full = 0, free = 0;       // the stage to multiply, the stage to fill
        auto turn = [](int &stage) { stage = stage + 1 == STAGES ? 0 : stage + 1; };
        auto load = [&] {
            left.load(left_place(free), next);
            right.load(right_place(free), next);
            next += DEPTH;
        };
        auto load_next = [&] {
            if (slice < first.count)
                first.load(left_place(free), slice++);
            else
                load();
            commit_copies();
            turn(free);
        };
#pragma unroll 1
        for (int stage = 0; stage < STAGES - 1; ++stage) load_next();
#pragma unroll 1
        for (uint32_t i = 0; i < first.count; ++i) {
            wait_for_copies<STAGES - 2>();
            __syncthreads(); // this slice has landed, and everybody has read the one before
            load_next();
            first.add(*this, left_place(full));
            turn(full);
        }

        uint32_t left_begin = Left::Slice::left_begin(warp_row, lane);
        uint32_t right_begin = Right::Slice::right_begin(warp_col, lane);
        Fragments fragments[2];
        auto read = [&](Fragments &to, int stage, int step) {
#pragma unroll
            for (int i = 0; i < M; ++i)
                Left::Slice::read_left(to.left[i], left_place(stage) + left_begin, i, step);
#pragma unroll
            for (int j = 0; j < N / 2; ++j)
                Right::Slice::read_right(to.right[j], right_place(stage) + right_begin, j, step);
        };

        wait_for_copies<STAGES - 2>();
        __syncthreads();
        read(fragments[0], full, 0);
        for (uint32_t d = 0; d < depth; d += DEPTH) {
#pragma unroll
            for (int step = 0; step < STEPS; ++step) {
                if (step == STEPS - 1) {
                    // The next slice has landed, and everybody has read this one.
                    wait_for_copies<STAGES - 2>();
                    __syncthreads();
                    turn(full);
                }
                read(fragments[(step + 1) % 2], full, (step + 1) % STEPS);
                if (step == 0) {
                    load();
                    commit_copies();
                    turn(free);
                }
                multiply_all<T>(fragments[step % 2]);
            }
        }
        wait_for_copies<0>();
        __syncthreads();
    }

    // Writes the sums, rounded, to out [rows, cols] as far as it reaches, with `bias` [cols], which may be null,
    // added to each row. A warp's part passes through shared memory, so that its stores are of 16 bytes.
    template <bool aligned>
    __device__ void store(T *out, uint32_t rows, uint32_t cols, const float *bias) const {
        constexpr int ROW_BYTES = WARP_COLS * sizeof(T), CHUNKS = WARP_COLS / 8;
        uint32_t own = shared + threadIdx.x / 32 * WARP_ROWS * ROW_BYTES;
#pragma unroll
        for (int j = 0; j < N; ++j) {
            float bias0 = bias && col(j) < cols ? bias[col(j)] : 0.0f;
            float bias1 = bias && col(j) + 1 < cols ? bias[col(j) + 1] : 0.0f;
#pragma unroll
            for (int i = 0; i < M; ++i)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    uint32_t to = own + swizzled<ROW_BYTES>(i * 16 + half * 8 + lane / 4, j) + lane % 4 * 4;
                    store_shared(to, pack<T>(sums[i][j][2 * half] + bias0, sums[i][j][2 * half + 1] + bias1));
                }
        }
        __syncwarp();
        uint32_t c = col0 + warp_col + lane % CHUNKS * 8;
        for (int i = lane / CHUNKS; i < WARP_ROWS; i += 32 / CHUNKS) {
            uint4 chunk = load_shared(own + swizzled<ROW_BYTES>(i, lane % CHUNKS));
            uint32_t r = row0 + warp_row + i;
            if (r >= rows || c >= cols) continue;
            T *to = out + (size_t)r * cols + c;
            if constexpr (aligned) {
                *reinterpret_cast<uint4 *>(to) = chunk;
            } else {
                const T *elements = reinterpret_cast<const T *>(&chunk);
#pragma unroll
                for (int k = 0; k < 8; ++k)
                    if (c + k < cols) to[k] = elements[k];
            }
        }
    }
};

// Nothing before the product of the factors.
struct NoSlices {
    static constexpr uint32_t count = 0;
    __device__ void load(uint32_t, uint32_t) {}
    template <typename Tile> __device__ void add(Tile &, uint32_t) {}
};

// ---- the grid ----

// Rows of tiles whose blocks run together: they share slices of the right factor in the second-level cache, and
// a group of columns of tiles shares those of the left.
constexpr uint32_t TILE_GROUP = 8;

// The row and column of this block's tile, for a grid of as many blocks as there are tiles.
template <typename Tile> __device__ uint2 own_tile(uint32_t rows, uint32_t cols) {
    uint32_t tile_rows = (rows + Tile::ROWS - 1) / Tile::ROWS, tile_cols = (cols + Tile::COLS - 1) / Tile::COLS;
    uint32_t in_group = TILE_GROUP * tile_cols;
    uint32_t first = blockIdx.x / in_group * TILE_GROUP;
    uint32_t height = min(TILE_GROUP, tile_rows - first);
    uint32_t i = blockIdx.x % in_group;
    return make_uint2((first + i % height) * Tile::ROWS, i / height * Tile::COLS);
}

// The tiles of this file's kernels; gemm.rs chooses. `large` fills a GPU of its own block by block, `small` does so
// with few tokens; rows that are not whole chunks of 16 bytes are read and written an element at a time.
template <typename T>
using LargeTile = Gemm<T, GEMM_LARGE_ROWS, GEMM_LARGE_COLS, GEMM_DEPTH, GEMM_STAGES, GEMM_LARGE_ROWS / 64>;
template <typename T>
using SmallTile = Gemm<T, GEMM_SMALL_ROWS, GEMM_SMALL_COLS, GEMM_DEPTH, GEMM_STAGES, GEMM_SMALL_ROWS / 32>;
