// Eight elements of a row at a time, as fp32; the same roundings as common/numerics.h.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../../common/numerics.h"
#include "../../common/ptx.cuh"

namespace ep::cuda {

struct Eight {
    float v[8];
};

struct F32 {
    static constexpr int kWords = 2;  // 16-byte words of eight elements
    __device__ static void unpack(const uint4* w, Eight& e) {
        const auto* f = reinterpret_cast<const float*>(w);
#pragma unroll
        for (int i = 0; i < 8; ++i) e.v[i] = f[i];
    }
    __device__ static void pack(uint4* w, const Eight& e) {
        auto* f = reinterpret_cast<float*>(w);
#pragma unroll
        for (int i = 0; i < 8; ++i) f[i] = e.v[i];
    }
};

struct BF16 {
    static constexpr int kWords = 1;
    __device__ static void unpack(const uint4* w, Eight& e) {
        const auto* u = reinterpret_cast<const uint32_t*>(w);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            e.v[2 * i] = __uint_as_float(u[i] << 16);
            e.v[2 * i + 1] = __uint_as_float(u[i] & 0xFFFF0000u);
        }
    }
    __device__ static void pack(uint4* w, const Eight& e) {
        auto* p = reinterpret_cast<__nv_bfloat162*>(w);
#pragma unroll
        for (int i = 0; i < 4; ++i) p[i] = __floats2bfloat162_rn(e.v[2 * i], e.v[2 * i + 1]);
    }
};

struct F16 {
    static constexpr int kWords = 1;
    __device__ static void unpack(const uint4* w, Eight& e) {
        const auto* p = reinterpret_cast<const __half2*>(w);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float2 f = __half22float2(p[i]);
            e.v[2 * i] = f.x;
            e.v[2 * i + 1] = f.y;
        }
    }
    __device__ static void pack(uint4* w, const Eight& e) {
        auto* p = reinterpret_cast<__half2*>(w);
#pragma unroll
        for (int i = 0; i < 4; ++i) p[i] = __floats2half2_rn(e.v[2 * i], e.v[2 * i + 1]);
    }
};

// A row of `hidden` elements in units of eight. One of fp32 may end in half a unit, which has one word.
__device__ __forceinline__ int units_of(int hidden) {
    return (hidden + 7) / 8;
}
template <class F>
__device__ __forceinline__ bool has_word(int hidden, int unit, int word) {
    return F::kWords == 1 || word == 0 || unit * 8 + 4 < hidden;
}

template <class F>
__device__ __forceinline__ void store_eight(void* row, int hidden, int unit, const Eight& e) {
    uint4 w[F::kWords];
    F::pack(w, e);
#pragma unroll
    for (int i = 0; i < F::kWords; ++i)
        if (has_word<F>(hidden, unit, i))
            ptx::store_row(static_cast<char*>(row) + (static_cast<int64_t>(unit) * F::kWords + i) * 16, w[i]);
}

// x / scale as IEEE division rounds it, for many x: with r = 1 / scale rounded correctly, q = x * r and the
// remainder x - q * scale (exact, by fma), q + remainder * r is the rounded quotient, unless the mantissa of
// the scale is all ones or something over- or underflows (Markstein). Remainders underflow only where the
// quotient is far below half of the smallest e4m3 number.
struct Quotient {
    float scale, reciprocal;
    __device__ explicit Quotient(float s) : scale(s), reciprocal(1.0f / s) {}
    // Whether divide may be used.
    __device__ bool is_plain() const {
        const uint32_t bits = float_bits(scale);
        return (bits & 0x7FFFFF) != 0x7FFFFF && bits < 0x7E000000;
    }
    __device__ float divide(float x) const {
        const float q = x * reciprocal;
        // The sum would make -0 positive.
        return copysignf(__fmaf_rn(__fmaf_rn(-q, scale, x), reciprocal, q), x);
    }
    __device__ __noinline__ float divide_any(float x) const { return x / scale; }
};

// Four e4m3 values in a 32-bit word. The instruction (compute capability 8.9 and later) rounds as the formula
// does.
__device__ __forceinline__ uint32_t pack_e4m3(float a, float b, float c, float d) {
#if __CUDA_ARCH__ >= 890
    uint16_t low, high;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(b), "f"(a));
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(d), "f"(c));
    return static_cast<uint32_t>(low) | static_cast<uint32_t>(high) << 16;
#else
    return float_to_e4m3(a) | float_to_e4m3(b) << 8 | float_to_e4m3(c) << 16 |
           static_cast<uint32_t>(float_to_e4m3(d)) << 24;
#endif
}

}  // namespace ep::cuda
