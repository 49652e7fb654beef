// One body per operation family, compiled twice: by nvcc into a kernel that the simulator runs, and
// by the host's C++ compiler into a program. Both must give the same 64 bits for every element.
//
// As a program: `oracle NAME < inputs > outputs`, where the input is any number of pairs (a, b) of
// 64-bit words and the output one word for each.

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define HD __device__ __noinline__
#define KEEP_LOOP _Pragma("unroll 1")
#define KERNEL(name)                                                                          \
    extern "C" __global__ void name(const uint64_t *in, uint64_t *out, uint32_t n) {          \
        uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;                                   \
        if (i < n) out[i] = name##_of(in[2 * i], in[2 * i + 1]);                              \
    }
#else
#define HD static
#define KERNEL(name)
#define KEEP_LOOP
#endif

template <typename T> HD T as(uint64_t bits) {
    T value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

template <typename T> HD uint64_t bits(T value) {
    // Operations on NaN may give any NaN: both sides answer with the same one.
    if (value != value) return 0x7ff8dead;
    uint64_t result = 0;
    memcpy(&result, &value, sizeof value);
    return result;
}

HD uint64_t mix(uint64_t sum, uint64_t term) {
    return (sum ^ term) * 0x9e3779b97f4a7c15ull + (sum >> 29);
}

// ---- integers of every width: products, quotients, shifts, comparisons ----

template <typename T> HD uint64_t integer_ops(T a, T b) {
    T divisor = b == 0 ? T(1) : b == T(-1) ? T(3) : b;
    uint32_t amount = uint32_t(b) & (sizeof(T) * 8 - 1);
    uint64_t sum = mix(0, uint64_t(T(a + b)));
    sum = mix(sum, uint64_t(T(a - b)));
    sum = mix(sum, uint64_t(T(uint64_t(a) * uint64_t(b))));
    sum = mix(sum, uint64_t(T(a / divisor)));
    sum = mix(sum, uint64_t(T(a % divisor)));
    sum = mix(sum, uint64_t(T(a >> amount)));
    sum = mix(sum, uint64_t(T(T(~a) & b)) ^ uint64_t(T(a | b)));
    sum = mix(sum, (a < b) | (a <= b) << 1 | (a == b) << 2 | (a > b) << 3);
    return mix(sum, uint64_t(a < b ? a : b));
}

HD uint64_t narrow_integers_of(uint64_t a, uint64_t b) {
    uint64_t sum = mix(integer_ops<uint8_t>(a, b), integer_ops<int8_t>(a, b));
    return mix(sum, mix(integer_ops<uint16_t>(a, b), integer_ops<int16_t>(a, b)));
}
KERNEL(narrow_integers)

HD uint64_t wide_integers_of(uint64_t a, uint64_t b) {
    uint64_t sum = integer_ops<uint32_t>(a, b);
    sum = mix(sum, integer_ops<uint64_t>(a, b));
    // Signed sums wrap: done in the unsigned type, as C++ requires.
    int32_t x = int32_t(a), y = int32_t(b);
    int64_t p = int64_t(x) * y;
    sum = mix(sum, uint64_t(p >> 32));
    int64_t v = int64_t(a), w = int64_t(b) | 1;
    if (w != -1) sum = mix(sum, uint64_t(v / w) ^ uint64_t(v % w));
    sum = mix(sum, uint64_t(v >> (b & 63)));
    return mix(sum, uint64_t(x < y) + uint64_t(v < w));
}
KERNEL(wide_integers)

// ---- control flow: data-dependent loops, a switch, calls through a table ----

HD uint64_t step_a(uint64_t x) { return x * 5 + 1; }
HD uint64_t step_b(uint64_t x) { return x ^ (x >> 7); }
HD uint64_t step_c(uint64_t x) { return (x << 13) | (x >> 51); }

HD uint64_t control_flow_of(uint64_t a, uint64_t b) {
    uint64_t (*steps[3])(uint64_t) = {step_a, step_b, step_c};
    uint64_t x = a;
    for (uint32_t i = 0; i < (b & 15); i++) {
        switch (x & 7) {
        case 0: x = x / 3; break;
        case 1: x = x * 3 + b; break;
        case 2: if (x & 256) continue; x += i; break;
        case 3: { uint64_t y = x; while (y > 1000) y >>= 3; x ^= y; break; }
        case 6: return x;
        default: x = steps[x % 3](x);
        }
    }
    return x;
}
KERNEL(control_flow)

// ---- local memory: an array that registers cannot hold, sorted ----

HD uint64_t local_memory_of(uint64_t a, uint64_t b) {
    uint8_t bytes[16];
    for (int i = 0; i < 8; i++) {
        bytes[i] = uint8_t(a >> (8 * i));
        bytes[8 + i] = uint8_t(b >> (8 * i));
    }
    KEEP_LOOP
    for (int i = 1; i < 16; i++)
    KEEP_LOOP
        for (int j = i; j > 0 && bytes[j - 1] > bytes[j]; j--) {
            uint8_t t = bytes[j];
            bytes[j] = bytes[j - 1];
            bytes[j - 1] = t;
        }
    uint64_t sum = bytes[b & 15];
    KEEP_LOOP
    for (int i = 0; i < 16; i++) sum = mix(sum, bytes[i]);
    return sum;
}
KERNEL(local_memory)

// ---- floating point: IEEE operations, comparisons, conversions ----

template <typename F> HD uint64_t float_ops(F a, F b) {
    // A signalling NaN is one more NaN to PTX, and an error to the host's fmin.
    if (a != a) a = F(NAN);
    if (b != b) b = F(NAN);
    uint64_t sum = mix(0, bits(a + b));
    sum = mix(sum, bits(a - b));
    sum = mix(sum, bits(a * b));
    sum = mix(sum, bits(a / b));
    sum = mix(sum, bits(std::sqrt(a)));
    sum = mix(sum, bits(std::fma(a, b, a)));
    // Which of two zeros the host prefers is open: adding +0 makes them one.
    sum = mix(sum, bits(std::fmin(a, b) + F(0)));
    sum = mix(sum, bits(std::fmax(a, b) + F(0)));
    sum = mix(sum, bits(std::floor(a)));
    sum = mix(sum, bits(std::ceil(a)));
    sum = mix(sum, bits(std::trunc(b)));
    sum = mix(sum, bits(std::rint(b)));
    sum = mix(sum, bits(std::fabs(a)));
    sum = mix(sum, bits(std::copysign(a, b)));
    sum = mix(sum, (a < b) | (a <= b) << 1 | (a == b) << 2 | (a > b) << 3 | (a != b) << 4);
    return mix(sum, std::isnan(a) | std::isinf(a) << 1);
}

HD uint64_t float32_of(uint64_t a, uint64_t b) { return float_ops(as<float>(a), as<float>(b)); }
KERNEL(float32)

HD uint64_t float64_of(uint64_t a, uint64_t b) { return float_ops(as<double>(a), as<double>(b)); }
KERNEL(float64)

HD uint64_t conversions_of(uint64_t a, uint64_t b) {
    uint64_t sum = mix(0, bits(float(a)));
    sum = mix(sum, bits(float(int64_t(a))));
    sum = mix(sum, bits(double(a)));
    sum = mix(sum, bits(double(int64_t(a))));
    sum = mix(sum, bits(float(uint32_t(a))));
    sum = mix(sum, bits(float(int32_t(a))));
    sum = mix(sum, bits(double(int32_t(a))));
    sum = mix(sum, bits(float(int8_t(a)) + float(uint16_t(a))));
    sum = mix(sum, bits(float(as<double>(b))));
    sum = mix(sum, bits(double(as<float>(b))));
    // Only values in range: beyond it C++ leaves the result open.
    double d = as<double>(b);
    if (std::fabs(d) < 1e9) sum = mix(sum, uint64_t(int32_t(d)) ^ uint64_t(int64_t(d * 1e9)));
    float f = as<float>(b);
    if (f >= 0 && f < 4e9f) sum = mix(sum, uint64_t(uint32_t(f)) ^ uint64_t(uint8_t(uint32_t(f))));
    return sum;
}
KERNEL(conversions)

#ifndef __CUDACC__
#include <cstdio>

int main(int, char **argv) {
    struct { const char *name; uint64_t (*of)(uint64_t, uint64_t); } table[] = {
        {"narrow_integers", narrow_integers_of}, {"wide_integers", wide_integers_of},
        {"control_flow", control_flow_of},       {"local_memory", local_memory_of},
        {"float32", float32_of},                 {"float64", float64_of},
        {"conversions", conversions_of},
    };
    for (auto &entry : table)
        if (!strcmp(entry.name, argv[1])) {
            uint64_t in[2];
            while (fread(in, sizeof in, 1, stdin) == 1) {
                uint64_t out = entry.of(in[0], in[1]);
                fwrite(&out, sizeof out, 1, stdout);
            }
            return 0;
        }
    return 1;
}
#endif
