// Number formats of rows, and the one formula for fp8. Every kernel rounds with these, so that results do not
// depend on the transport. Round to nearest, ties to even, everywhere.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace ep {

// Part of the interface with ep_backend/_native.py.
enum class DType : int32_t { kF32 = 0, kF16 = 1, kBF16 = 2, kE4M3 = 3, kBytes = 4 };

// Bytes of an element; 1 for opaque bytes.
EP_HD constexpr int64_t element_bytes(DType type) {
    return type == DType::kF32 ? 4 : type == DType::kF16 || type == DType::kBF16 ? 2 : 1;
}

constexpr int64_t kScaleBlock = 128;  // elements that share one fp8 scale
constexpr float kE4M3Max = 448.0f;
constexpr float kMinAmax = 1e-10f;  // keeps the scale of an all-zero block positive

EP_HD inline uint32_t float_bits(float x) {
    uint32_t u;
    std::memcpy(&u, &x, 4);
    return u;
}
EP_HD inline float bits_float(uint32_t u) {
    float x;
    std::memcpy(&x, &u, 4);
    return x;
}

EP_HD inline float bf16_to_float(uint16_t b) {
    return bits_float(static_cast<uint32_t>(b) << 16);
}
EP_HD inline uint16_t float_to_bf16(float x) {
    const uint32_t u = float_bits(x);
    const uint32_t rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16;
    return static_cast<uint16_t>((u & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
}

// fp8 block scale: scale = max(amax, 1e-10) / 448 in fp32, then q = e4m3(x / scale) with IEEE division.
EP_HD inline float fp8_scale(float amax) {
    return (amax > kMinAmax ? amax : kMinAmax) / kE4M3Max;
}

// fp32 -> e4m3 (bias 7, no infinity), saturating to +-448; NaN stays NaN.
EP_HD inline uint8_t float_to_e4m3(float x) {
    const uint32_t u = float_bits(x);
    const uint32_t sign = (u >> 24) & 0x80;
    const uint32_t a = u & 0x7FFFFFFF;
    // Normal numbers: keep 3 mantissa bits, rebias 127 -> 7.
    const uint32_t normal = ((a + 0x7FFFF + ((a >> 20) & 1)) >> 20) - (120u << 3);
    // Below 2^-6 the unit is 2^-9: adding 2^14 leaves exactly that unit at the end of the fp32 mantissa.
    const uint32_t subnormal = float_bits(bits_float(a) + 16384.0f) - float_bits(16384.0f);
    uint32_t q = a < (121u << 23) ? subnormal : normal;
    q = a >= float_bits(kE4M3Max) ? 0x7E : q;
    q = a > 0x7F800000 ? 0x7F : q;
    return static_cast<uint8_t>(sign | q);
}

}  // namespace ep
