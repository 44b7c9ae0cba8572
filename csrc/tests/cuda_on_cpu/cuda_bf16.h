#pragma once
#include "../../common/numerics.h"
#include "emulator.h"

struct __nv_bfloat162 {
    uint16_t x, y;
};
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
    return {ep::float_to_bf16(x), ep::float_to_bf16(y)};
}
