// Arithmetic on single rows: fp32 accumulation, explicit fma, one rounding at the end (docs/architecture.md,
// "Numerics").
#pragma once

#include <cstdint>

#include "../../common/numerics.h"

namespace ep::cpu {

// dst[i] = round(src[i]); float formats.
void convert_row(void* dst, DType dst_type, const void* src, DType src_type, int64_t n);
// acc[i] += src[i]
void add_row(float* acc, const void* src, DType src_type, int64_t n);
// acc[i] = fma(weight, src[i], acc[i])
void fma_row(float* acc, float weight, const void* src, DType src_type, int64_t n);
// Blocks of 1 x 128: n values of e4m3 and n / 128 fp32 scales.
void quantize_row(uint8_t* q, float* scales, const void* src, DType src_type, int64_t n);

}  // namespace ep::cpu
