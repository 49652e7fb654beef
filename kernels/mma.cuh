// Tensor cores and what feeds them, from sm_80 on: asynchronous copies into shared memory, swizzled tiles
// there, and the fragments of `mma.sync` that a warp's lanes hold.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

// ---- asynchronous copies ----

// The address of a place in shared memory, as the instructions below take it.
__device__ inline uint32_t shared_address(const void *place) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(place));
}

// Copies 16 bytes to shared memory, or fills them with zeros where `present` is false: then nothing is read.
__device__ inline void copy_async(uint32_t to, const void *from, bool present) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(present ? 16 : 0)
                 : "memory");
}

// Ends a group of this thread's copies.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until all of this thread's groups but the last PENDING have landed. Other threads see them after the
// next barrier.
template <int PENDING> __device__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// What `copy_async` copies, of 16-bit elements and one at a time, for rows that do not start at multiples of 16
// bytes: zeros for those from `present` on.
template <typename T> __device__ uint4 gather(const T *from, uint32_t present) {
    uint32_t words[4];
    const uint16_t *elements = reinterpret_cast<const uint16_t *>(from);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        uint32_t low = 2 * i < present ? elements[2 * i] : 0;
        uint32_t high = 2 * i + 1 < present ? elements[2 * i + 1] : 0;
        words[i] = low | high << 16;
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}

// ---- tiles in shared memory ----

// Where the 16-byte chunk `chunk` of row `row` lies in a tile with rows of ROW_BYTES. Chunks trade places
// within 128 bytes, so that the same chunk of eight rows in a row covers all banks: those are the eight
// addresses of one matrix of `ldmatrix`. Flipping bits of `chunk` that row and lane do not decide flips
// the same bits of the offset, from bit 4 on.
template <int ROW_BYTES> __device__ constexpr uint32_t swizzled(uint32_t row, uint32_t chunk) {
    static_assert(ROW_BYTES == 64 || ROW_BYTES % 128 == 0, "rows of 64 bytes or of whole sets of banks");
    return row * ROW_BYTES + (chunk ^ (ROW_BYTES == 64 ? row / 2 % 4 : row % 8)) * 16;
}

__device__ inline uint4 load_shared(uint32_t from) {
    uint4 value;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "r"(from)
                 : "memory");
    return value;
}

__device__ inline uint32_t load_shared_word(uint32_t from) {
    uint32_t value;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(from) : "memory");
    return value;
}

__device__ inline void store_shared(uint32_t to, uint4 value) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(value.x), "r"(value.y), "r"(value.z),
                 "r"(value.w)
                 : "memory");
}

__device__ inline void store_shared(uint32_t to, uint32_t value) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(value) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8, and gets
// elements 2 (i % 4) and the next of row i / 4 of each.
__device__ inline void load_matrices(uint32_t (&fragment)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(address)
                 : "memory");
}

// The same of the transposed matrices.
__device__ inline void load_matrices_transposed(uint32_t (&fragment)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(address)
                 : "memory");
}

// ---- multiplication ----
//
// sums [16, 8] += a [16, K] . b [K, 8], f32. With g = lane / 4 and t = lane % 4, a lane holds
//   sums: row g, columns 2t and 2t + 1; row g + 8, the same.
//   a:    32-bit word t of row g, of row g + 8, then word t + 4 of both.
//   b:    32-bit word t of column g, then word t + 4.
// A row of a, and a column of b, is eight words of two elements (K = 16) or of one tf32 (K = 8).

// An f32 of which tensor cores see the first 11 significant bits.
struct Tf32 {};

__device__ inline uint32_t to_tf32(float x) {
    uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
    return bits;
}

// The two numbers of a word as tf32, which holds f16 and bf16 exactly.
template <typename T> __device__ void unpack_tf32(uint32_t pair, uint32_t &low, uint32_t &high);
template <> __device__ inline void unpack_tf32<__half>(uint32_t pair, uint32_t &low, uint32_t &high) {
    float2 values = __half22float2(*reinterpret_cast<__half2 *>(&pair));
    low = __float_as_uint(values.x);
    high = __float_as_uint(values.y);
}
template <> __device__ inline void unpack_tf32<__nv_bfloat16>(uint32_t pair, uint32_t &low, uint32_t &high) {
    low = pair << 16;
    high = pair & 0xffff0000;
}

// Two numbers as one word, the first in its lower half.
template <typename T> __device__ uint32_t pack(float low, float high);
template <> __device__ inline uint32_t pack<__half>(float low, float high) {
    __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<uint32_t *>(&pair);
}
template <> __device__ inline uint32_t pack<__nv_bfloat16>(float low, float high) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<uint32_t *>(&pair);
}

#define MULTIPLY(type, instruction)                                                                          \
    __device__ inline void multiply(type, float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { \
        asm volatile(instruction " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"          \
                     : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                            \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                        \
    }
MULTIPLY(__half, "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32")
MULTIPLY(__nv_bfloat16, "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32")
MULTIPLY(Tf32, "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32")
#undef MULTIPLY
