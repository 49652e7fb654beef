// Activations of the feed-forward block, forward and backward
//
//   swiglu  act = silu(gate) up                                     silu(x) = x sigmoid(x)
//           dgate = dact up (s + silu (1 - s)),  dup = dact silu    with s = sigmoid(gate)
//   gelu    y = x Phi(x), exactly ("erf") or by the tanh approximation of GPT-2;  dx = dy y'(x)
//
// Layouts   all [elements], aligned to 16 bytes. Backward is in place: dgate over gate, dup over up, dx
//           over dy. Arithmetic in f32.
// Launch    ACTIVATION_THREADS threads per block, 16 bytes of elements each, the last ones one by one.
// Traffic   swiglu: 2 in, 1 out; backward 3 in, 2 out. gelu: 1 in, 1 out; backward 2 in, 1 out.
#include "../storage.cuh"
#include "abi.h"
#include "fast_math.cuh"

__device__ inline float sigmoid(float x) { return __fdividef(1.0f, 1.0f + exp_fast(-x)); }

struct Swiglu {
    __device__ static float forward(float gate, float up) { return gate * sigmoid(gate) * up; }
    __device__ static void backward(float dact, float &gate, float &up) {
        float s = sigmoid(gate), silu = gate * s;
        gate = dact * up * (s + silu * (1.0f - s));
        up = dact * silu;
    }
};

struct GeluTanh {
    static constexpr float SCALE = 0.7978845608028654f;  // sqrt(2 / pi)
    static constexpr float CUBIC = 0.044715f;
    // (1 + tanh(u)) / 2 is sigmoid(2 u), which loses nothing where tanh nears -1.
    __device__ static float weight(float x) { return sigmoid(2.0f * SCALE * (x + CUBIC * x * x * x)); }
    __device__ static float forward(float x) { return x * weight(x); }
    __device__ static float derivative(float x) {
        float w = weight(x);
        return w + 2.0f * x * w * (1.0f - w) * SCALE * (1.0f + 3.0f * CUBIC * x * x);
    }
};

struct GeluErf {
    __device__ static float forward(float x) { return 0.5f * x * (1.0f + erff(x * 0.7071067811865476f)); }
    __device__ static float derivative(float x) {
        float density = 0.3989422804014327f * expf(-0.5f * x * x);
        return 0.5f * (1.0f + erff(x * 0.7071067811865476f)) + x * density;
    }
};

template <typename T>
__device__ void swiglu_forward(const T *gate, const T *up, T *act, uint64_t elements) {
    for_each_run<ACTIVATION_THREADS, PER_VECTOR<T>>(elements, [&](uint64_t i, auto count) {
        constexpr int N = decltype(count)::value;
        float g[N], u[N];
        load_run(gate + i, g);
        load_run(up + i, u);
#pragma unroll
        for (int j = 0; j < N; ++j) g[j] = Swiglu::forward(g[j], u[j]);
        store_run(act + i, g);
    });
}

template <typename T> __device__ void swiglu_backward(const T *dact, T *gate, T *up, uint64_t elements) {
    for_each_run<ACTIVATION_THREADS, PER_VECTOR<T>>(elements, [&](uint64_t i, auto count) {
        constexpr int N = decltype(count)::value;
        float d[N], g[N], u[N];
        load_run(dact + i, d);
        load_run(gate + i, g);
        load_run(up + i, u);
#pragma unroll
        for (int j = 0; j < N; ++j) Swiglu::backward(d[j], g[j], u[j]);
        store_run(gate + i, g);
        store_run(up + i, u);
    });
}

template <typename Gelu, typename T> __device__ void gelu_forward(const T *x, T *y, uint64_t elements) {
    for_each_run<ACTIVATION_THREADS, PER_VECTOR<T>>(elements, [&](uint64_t i, auto count) {
        constexpr int N = decltype(count)::value;
        float a[N];
        load_run(x + i, a);
#pragma unroll
        for (int j = 0; j < N; ++j) a[j] = Gelu::forward(a[j]);
        store_run(y + i, a);
    });
}

template <typename Gelu, typename T> __device__ void gelu_backward(T *dy, const T *x, uint64_t elements) {
    for_each_run<ACTIVATION_THREADS, PER_VECTOR<T>>(elements, [&](uint64_t i, auto count) {
        constexpr int N = decltype(count)::value;
        float d[N], a[N];
        load_run(dy + i, d);
        load_run(x + i, a);
#pragma unroll
        for (int j = 0; j < N; ++j) d[j] *= Gelu::derivative(a[j]);
        store_run(dy + i, d);
    });
}

#define KERNEL extern "C" __global__ void __launch_bounds__(ACTIVATION_THREADS)

#define ACTIVATION(name, T)                                                                       \
    KERNEL swiglu_forward_##name(const T *gate, const T *up, T *act, uint64_t elements) {         \
        swiglu_forward(gate, up, act, elements);                                                  \
    }                                                                                             \
    KERNEL swiglu_backward_##name(const T *dact, T *gate, T *up, uint64_t elements) {             \
        swiglu_backward(dact, gate, up, elements);                                                \
    }                                                                                             \
    KERNEL gelu_tanh_forward_##name(const T *x, T *y, uint64_t elements) {                        \
        gelu_forward<GeluTanh>(x, y, elements);                                                   \
    }                                                                                             \
    KERNEL gelu_tanh_backward_##name(T *dy, const T *x, uint64_t elements) {                      \
        gelu_backward<GeluTanh>(dy, x, elements);                                                 \
    }                                                                                             \
    KERNEL gelu_erf_forward_##name(const T *x, T *y, uint64_t elements) {                         \
        gelu_forward<GeluErf>(x, y, elements);                                                    \
    }                                                                                             \
    KERNEL gelu_erf_backward_##name(T *dy, const T *x, uint64_t elements) {                       \
        gelu_backward<GeluErf>(dy, x, elements);                                                  \
    }

ACTIVATION(f32, float)
ACTIVATION(f16, __half)
ACTIVATION(bf16, __nv_bfloat16)
