// AdamW with moments in 8 bits, block by block
//
//   m, v    dequantized: quant_map[code] * absmax of its block
//   adamw   g *= min(1, max_grad_norm / (norm + 1e-6))          where max_grad_norm > 0
//           p *= 1 - lr weight_decay,  m += (1 - beta1)(g - m),  v = beta2 v + (1 - beta2) g^2
//           p -= step_size m / (sqrt(v) inv_sqrt_correction2 + eps)
//   m, v    quantized: absmax = max |x| of the block; the code nearest to the point nearest to x / absmax
//
// Points are 65536 from -1 to 1, by which bitsandbytes looks codes up on the CPU (docs/quantization.md). Norm and
// rates as in adamw.cu.
//
// Layouts   as in adamw.cu, with the codes of m and v [elements] one byte each, in their map in ascending order,
//           and their absmax [ceil(elements / 256)] f32.
// Launch    as in adamw.cu. A warp takes a block of 256 elements at a time, each lane two runs of four, and its
//           largest magnitude goes through shuffles: nothing depends on the order of warps.
// Shared    both maps, which each block computes, and the middles between their values, 4 KiB. Which of them a
//           lane reads is up to its element, so reads of a warp conflict as chance has it.
// Traffic   p, g, codes in; p, codes out: 16 bytes per element, and 16 per block.
#include "optimizer/chunk.cuh"

// Of the seven decades of a map, the i-th is cut into 2^i fractions (or 2^(i + 1) where there is no sign): the middle
// of fraction `i` of so many, with the ends as torch.linspace rounds them.
__device__ inline float fraction_end(int i, int fractions) {
    float step = (1.0f - 0.1f) / fractions;
    return i < (fractions + 1) / 2 ? fmaf(step, i, 0.1f) : fmaf(-step, fractions - i, 1.0f);
}

__device__ inline float fraction(int decade, int i, int fractions) {
    const float scales[7] = {1e-6f, 1e-5f, 1e-4f, 1e-3f, 1e-2f, 1e-1f, 1.0f};
    return scales[decade] * ((fraction_end(i, fractions) + fraction_end(i + 1, fractions)) * 0.5f);
}

// bitsandbytes' create_dynamic_map: what a code stands for.
__device__ inline float signed_value(int code) {
    if (code == 255) return 1.0f;
    if (code == 127) return 0.0f;
    int place = code > 127 ? code - 127 : 127 - code; // of 1..127, from 0 outwards
    int decade = 31 - __clz(place);
    float value = fraction(decade, place - (1 << decade), 1 << decade);
    return code > 127 ? value : -value;
}

__device__ inline float unsigned_value(int code) {
    if (code == 255) return 1.0f;
    if (code == 0) return 0.0f;
    int place = code + 1; // of 2..255
    int decade = 30 - __clz(place);
    return fraction(decade, place - (2 << decade), 2 << decade);
}

// A map, and the middle between each value and the next.
struct Dynamic8bit {
    float quant_map[256];
    float middles[256];

    // Fills itself with all threads of the block, a code each.
    template <typename Value> __device__ void fill(Value value) {
        static_assert(OPTIMIZER_THREADS == 256, "a code for each thread");
        int code = threadIdx.x;
        quant_map[code] = value(code);
        middles[code] = code < 255 ? (value(code) + value(code + 1)) * 0.5f : 0.0f;
    }

    // The code nearest to the point that is nearest to x, the lower of two that are as near.
    __device__ uint8_t code(float x) const {
        float in_steps = fmaf((fminf(fmaxf(x, -1.0f), 1.0f) + 1.0f) * 0.5f, 65535.0f, 0.5f);
        float point = 2.0f * (float)(uint32_t)in_steps / 65535.0f - 1.0f;
        uint32_t code = 0;
#pragma unroll
        for (uint32_t half = 128; half > 0; half /= 2)
            if (point > middles[code + half - 1]) code += half;
        return (uint8_t)code;
    }
};

// Four elements that are loaded and stored at once.
template <typename T> struct Four;
template <> struct Four<float> {
    using type = float4;
};
template <> struct Four<uint8_t> {
    using type = uchar4;
};

// The elements from i on that lie before the end, at most four; zeros in place of the others.
template <typename T> __device__ void load_four(const T *from, uint32_t i, uint32_t end, T (&values)[4]) {
    if (i + 4 <= end) {
        *reinterpret_cast<typename Four<T>::type *>(values) =
            *reinterpret_cast<const typename Four<T>::type *>(from + i);
    } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) values[j] = i + j < end ? from[i + j] : T(0);
    }
}

template <typename T> __device__ void store_four(T *to, uint32_t i, uint32_t end, const T (&values)[4]) {
    if (i + 4 <= end) {
        *reinterpret_cast<typename Four<T>::type *>(to + i) =
            *reinterpret_cast<const typename Four<T>::type *>(values);
    } else {
#pragma unroll
        for (int j = 0; j < 4; ++j)
            if (i + j < end) to[i + j] = values[j];
    }
}

// A moment of one block of 256 elements: each lane has the elements at `first` and those at `first + 128`.
struct Moment {
    const Dynamic8bit &map;
    uint8_t *codes;
    float *absmax; // of the block
    uint32_t first, end;

    __device__ Moment(const Dynamic8bit &map, uint64_t codes, uint64_t absmax, uint32_t begin, uint32_t end)
        : map(map), codes(reinterpret_cast<uint8_t *>(codes)),
          absmax(reinterpret_cast<float *>(absmax) + begin / DYNAMIC_8BIT_BLOCK), first(begin + threadIdx.x % 32 * 4),
          end(end) {}

    __device__ void load(float (&values)[2][4]) const {
        float scale = *absmax;
#pragma unroll
        for (int run = 0; run < 2; ++run) {
            alignas(4) uint8_t code[4];
            load_four(codes, first + run * 128, end, code);
#pragma unroll
            for (int j = 0; j < 4; ++j)
                values[run][j] = first + run * 128 + j < end ? map.quant_map[code[j]] * scale : 0.0f;
        }
    }

    // Values beyond the end are zeros, as `load` makes them.
    __device__ void store(const float (&values)[2][4]) const {
        float largest = 0.0f;
#pragma unroll
        for (int run = 0; run < 2; ++run)
#pragma unroll
            for (int j = 0; j < 4; ++j) largest = fmaxf(largest, fabsf(values[run][j]));
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2)
            largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, distance));
        if (threadIdx.x % 32 == 0) *absmax = largest;
        float inverse = 1.0f / largest;
#pragma unroll
        for (int run = 0; run < 2; ++run) {
            alignas(4) uint8_t code[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) code[j] = largest > 0.0f ? map.code(values[run][j] * inverse) : 0;
            store_four(codes, first + run * 128, end, code);
        }
    }
};

extern "C" __global__ void __launch_bounds__(OPTIMIZER_THREADS)
    adamw_8bit(const __grid_constant__ OptimizerTable table, const __grid_constant__ AdamWStep step,
               const AdamWRate *rates, const float *norm) {
    __shared__ Dynamic8bit signed_map, unsigned_map;
    if (!isfinite(*norm)) return;
    signed_map.fill(signed_value);
    unsigned_map.fill(unsigned_value);
    __syncthreads();
    Chunk chunk(table);
    float *param = reinterpret_cast<float *>(chunk.tensor.param);
    const float *grad = reinterpret_cast<const float *>(chunk.tensor.grad);
    AdamWRate rate = rates[chunk.tensor.rate];
    float clip = clip_factor(step, *norm);
    for (uint32_t begin = chunk.begin + threadIdx.x / 32 * DYNAMIC_8BIT_BLOCK; begin < chunk.end;
         begin += OPTIMIZER_THREADS / 32 * DYNAMIC_8BIT_BLOCK) {
        uint32_t end = min(chunk.end, begin + DYNAMIC_8BIT_BLOCK);
        Moment m_stored(signed_map, chunk.tensor.m, chunk.tensor.m_absmax, begin, end);
        Moment v_stored(unsigned_map, chunk.tensor.v, chunk.tensor.v_absmax, begin, end);
        float m[2][4], v[2][4];
        m_stored.load(m);
        v_stored.load(v);
        // No lane may write what another has yet to read.
        __syncwarp();
#pragma unroll
        for (int run = 0; run < 2; ++run) {
            uint32_t i = m_stored.first + run * 128;
            alignas(16) float p[4], g[4];
            load_four(param, i, end, p);
            load_four(grad, i, end, g);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                float clipped = g[j] * clip;
                m[run][j] += step.new1 * (clipped - m[run][j]);
                v[run][j] = step.keep2 * v[run][j] + step.new2 * clipped * clipped;
                p[j] = p[j] * rate.decay -
                       rate.step_size * m[run][j] / (sqrtf(v[run][j]) * rate.inv_sqrt_correction2 + step.eps);
            }
            store_four(param, i, end, p);
        }
        m_stored.store(m);
        v_stored.store(v);
    }
}
