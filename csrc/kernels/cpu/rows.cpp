#include "rows.h"

#include <cstring>
#include <stdexcept>

// One binary serves every x86-64 CPU: the loader picks the clone that the machine can run. Sanitizers cannot
// follow the indirect functions that this makes and get the plain build.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(EP_SANITIZE)
#define EP_CLONES __attribute__((target_clones("default", "arch=x86-64-v3")))
#else
#define EP_CLONES
#endif

namespace ep::cpu {
namespace {

struct F32 {
    using T = float;
    static float load(T x) { return x; }
    static T store(float x) { return x; }
};
struct F16 {
    using T = _Float16;
    static float load(T x) { return static_cast<float>(x); }
    static T store(float x) { return static_cast<T>(x); }
};
struct BF16 {
    using T = uint16_t;
    static float load(T x) { return bf16_to_float(x); }
    static T store(float x) { return float_to_bf16(x); }
};

template <class F>
void with_format(DType type, F&& f) {
    switch (type) {
        case DType::kF32:
            return f(F32{});
        case DType::kF16:
            return f(F16{});
        case DType::kBF16:
            return f(BF16{});
        default:
            throw std::logic_error("ep_backend: arithmetic on a row that has no float format");
    }
}

template <class D, class S>
EP_CLONES void convert(typename D::T* __restrict d, const typename S::T* __restrict s, int64_t n) {
    for (int64_t i = 0; i < n; ++i) d[i] = D::store(S::load(s[i]));
}

template <class S>
EP_CLONES void add(float* __restrict acc, const typename S::T* __restrict s, int64_t n) {
    for (int64_t i = 0; i < n; ++i) acc[i] += S::load(s[i]);
}

template <class S>
EP_CLONES void fma(float* __restrict acc, float weight, const typename S::T* __restrict s, int64_t n) {
    for (int64_t i = 0; i < n; ++i) acc[i] = __builtin_fmaf(weight, S::load(s[i]), acc[i]);
}

template <class S>
EP_CLONES void quantize(uint8_t* __restrict q, float* __restrict scales, const typename S::T* __restrict s,
                        int64_t n) {
    for (int64_t b = 0; b < n / kScaleBlock; ++b, q += kScaleBlock, s += kScaleBlock) {
        float amax = 0;
        for (int i = 0; i < kScaleBlock; ++i) {
            const float a = __builtin_fabsf(S::load(s[i]));
            amax = a > amax ? a : amax;
        }
        const float scale = fp8_scale(amax);
        for (int i = 0; i < kScaleBlock; ++i) q[i] = float_to_e4m3(S::load(s[i]) / scale);
        scales[b] = scale;
    }
}

}  // namespace

void convert_row(void* dst, DType dst_type, const void* src, DType src_type, int64_t n) {
    if (dst_type == src_type) {
        std::memcpy(dst, src, n * element_bytes(src_type));
        return;
    }
    with_format(dst_type, [&](auto d) {
        with_format(src_type, [&](auto s) {
            using D = decltype(d);
            using S = decltype(s);
            convert<D, S>(static_cast<typename D::T*>(dst), static_cast<const typename S::T*>(src), n);
        });
    });
}

void add_row(float* acc, const void* src, DType src_type, int64_t n) {
    with_format(src_type,
                [&](auto s) { add<decltype(s)>(acc, static_cast<const typename decltype(s)::T*>(src), n); });
}

void fma_row(float* acc, float weight, const void* src, DType src_type, int64_t n) {
    with_format(src_type, [&](auto s) {
        fma<decltype(s)>(acc, weight, static_cast<const typename decltype(s)::T*>(src), n);
    });
}

void quantize_row(uint8_t* q, float* scales, const void* src, DType src_type, int64_t n) {
    with_format(src_type, [&](auto s) {
        quantize<decltype(s)>(q, scales, static_cast<const typename decltype(s)::T*>(src), n);
    });
}

}  // namespace ep::cpu
