// What operators on the CPU and on CUDA translate alike.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <vector>

#include "../common/layout.h"
#include "../common/numerics.h"
#include "../common/status.h"

namespace ep::ops {

inline DType format_of(const torch::stable::Tensor& t) {
    using torch::headeronly::ScalarType;
    switch (t.scalar_type()) {
        case ScalarType::Float:
            return DType::kF32;
        case ScalarType::Half:
            return DType::kF16;
        case ScalarType::BFloat16:
            return DType::kBF16;
        case ScalarType::Float8_e4m3fn:
            return DType::kE4M3;
        default:
            return DType::kBytes;
    }
}

inline ExchangeShape shape_of(const std::vector<int64_t>& s) {
    STD_TORCH_CHECK(s.size() == 9, "ep_backend: a window shape has 9 fields");
    return {s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8]};
}

// The fields of an error word in order.
inline std::vector<int64_t> fields_of(const ErrorWord& e) {
    return {static_cast<int64_t>(e.status),
            e.peer,
            e.reporter,
            static_cast<int64_t>(e.phase),
            e.channel,
            static_cast<int64_t>(e.epoch_expected),
            static_cast<int64_t>(e.epoch_seen),
            e.waited_us,
            static_cast<int64_t>(e.cause),
            static_cast<int64_t>(e.missing[0]),
            static_cast<int64_t>(e.missing[1])};
}

}  // namespace ep::ops
