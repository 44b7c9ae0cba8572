#pragma once
#include "emulator.h"

struct float2 {
    float x, y;
};
struct __half2 {
    _Float16 x, y;
};
inline __half2 __floats2half2_rn(float x, float y) {
    return {static_cast<_Float16>(x), static_cast<_Float16>(y)};
}
inline float2 __half22float2(__half2 h) {
    return {static_cast<float>(h.x), static_cast<float>(h.y)};
}
