// NF4 dequantization
//
//   out[i] = weight[first + i]                       in f32, rounded once to the type of out
//
// Layouts   weight as format.cuh gives it; out [count] f32, f16 or bf16. first is a multiple of 8; out is
//           aligned to 16 bytes, packed to 4.
// Launch    NF4_DEQUANTIZE_THREADS threads; each makes NF4_DEQUANTIZE_STORES stores of 16 bytes, a block's
//           worth of threads apart, so that every access of a warp is one contiguous run: 512 bytes out, and
//           64 (f32) or 128 bytes of codes in.
// Shared    16 floats: one bank each, so any mix of codes reads without a conflict. Under double quantization the
//           256 of the second level too, which a store looks up once.
// Registers what the stores need is loaded before the first of them, to be on its way together.
// Traffic   at least count / 2 + 4 count / block_size bytes in and sizeof(T) count out; one multiply per
//           element. Stores dominate: 4096 x 4096 to bf16 is 9.4 MB in, 33.6 MB out.
#include "../storage.cuh"
#include "nf4/format.cuh"

// The codes behind one 16-byte store: two bytes for f32, four for the 16-bit types.
template <int BYTES> struct Codes;
template <> struct Codes<2> {
    using type = uint16_t;
};
template <> struct Codes<4> {
    using type = uint32_t;
};

// What is in memory for the absmax of a block: so all of it is on its way before any of it is needed.
struct Absmax {
    float scale; // absmax, or the second-level one
    uint8_t code;

    __device__ void load(const Nf4Weight &weight, uint64_t index) {
        uint64_t block = index >> weight.log2_block_size;
        bool nested = weight.nested_quant_map;
        if (nested) code = reinterpret_cast<const uint8_t *>(weight.absmax)[block];
        scale = nested ? reinterpret_cast<const float *>(weight.nested_absmax)[block / NF4_NESTED_BLOCK_SIZE]
                       : reinterpret_cast<const float *>(weight.absmax)[block];
    }

    __device__ float value(const Nf4Weight &weight, const float *nested_quant_map) const {
        return weight.nested_quant_map ? nf4_nested(nested_quant_map[code], scale, weight.offset) : scale;
    }
};

template <typename T> __device__ void dequantize(const Nf4Weight &weight, uint64_t first, uint64_t count, T *out) {
    constexpr int RUN = PER_VECTOR<T>;
    using Word = typename Codes<RUN / 2>::type;
    const uint8_t *packed = reinterpret_cast<const uint8_t *>(weight.packed) + first / 2;

    uint64_t vector0 = (uint64_t)blockIdx.x * NF4_DEQUANTIZE_THREADS * NF4_DEQUANTIZE_STORES + threadIdx.x;
    uint32_t words[NF4_DEQUANTIZE_STORES];
    Absmax absmax[NF4_DEQUANTIZE_STORES];
#pragma unroll
    for (int store = 0; store < NF4_DEQUANTIZE_STORES; ++store) {
        uint64_t vector = vector0 + store * NF4_DEQUANTIZE_THREADS;
        // A vector never straddles two blocks: the smallest block holds 32 elements.
        if (vector * RUN < count) absmax[store].load(weight, first + vector * RUN);
        if (vector * RUN + RUN <= count) words[store] = reinterpret_cast<const Word *>(packed)[vector];
    }

    __shared__ float quant_map[16];
    __shared__ float nested_quant_map[NF4_DEQUANTIZE_THREADS];
    static_assert(NF4_DEQUANTIZE_THREADS == 256, "each thread copies an entry");
    if (threadIdx.x < 16) quant_map[threadIdx.x] = NF4_QUANT_MAP[threadIdx.x];
    if (weight.nested_quant_map)
        nested_quant_map[threadIdx.x] = reinterpret_cast<const float *>(weight.nested_quant_map)[threadIdx.x];
    __syncthreads();

#pragma unroll
    for (int store = 0; store < NF4_DEQUANTIZE_STORES; ++store) {
        float scale = absmax[store].value(weight, nested_quant_map);
        uint64_t start = (vector0 + store * NF4_DEQUANTIZE_THREADS) * RUN;
        if (start + RUN <= count) {
            float values[RUN];
#pragma unroll
            for (int i = 0; i < RUN; ++i) values[i] = quant_map[nf4_code(words[store], i)] * scale;
            store_run(out + start, values);
        } else { // the ragged tail, one element at a time
            for (uint64_t i = start; i < count; ++i)
                out[i] = narrow<T>(quant_map[nf4_code(packed[i / 2], i % 2)] * scale);
        }
    }
}

#define NF4_DEQUANTIZE(suffix, T)                                                                     \
    extern "C" __global__ void __launch_bounds__(NF4_DEQUANTIZE_THREADS) nf4_dequantize_##suffix(     \
        const __grid_constant__ Nf4Weight weight, uint64_t first, uint64_t count, T *out) {           \
        dequantize<T>(weight, first, count, out);                                                     \
    }

NF4_DEQUANTIZE(f32, float)
NF4_DEQUANTIZE(f16, __half)
NF4_DEQUANTIZE(bf16, __nv_bfloat16)
