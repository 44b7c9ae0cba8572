// Operators of the checks between GPUs; see pair_ops.h.
#include "pair_ops.h"

#include "../kernels/cuda/order_check.h"
#include "../kernels/cuda/pair_check.h"

namespace ep::ops {
namespace {

cuda::GpuPair& at(int64_t pair) {
    return *reinterpret_cast<cuda::GpuPair*>(pair);
}

}  // namespace

std::vector<int64_t> gpu_pair_attributes(int64_t source, int64_t target) {
    const auto a = cuda::pair_attributes(static_cast<int>(source), static_cast<int>(target));
    return {a.access, a.atomics};
}

int64_t gpu_pair_create(int64_t source, int64_t target, int64_t bytes) {
    return reinterpret_cast<int64_t>(
        new cuda::GpuPair(static_cast<int>(source), static_cast<int>(target), bytes));
}

void gpu_pair_destroy(int64_t pair) {
    delete &at(pair);
}

std::vector<int64_t> gpu_pair_store(int64_t pair, int64_t seed, int64_t expected, int64_t rounds,
                                    bool announce, int64_t timeout_us) {
    const auto result = at(pair).store({static_cast<uint32_t>(seed), static_cast<uint32_t>(expected),
                                        static_cast<int>(rounds), announce, timeout_us});
    return {result.rounds, result.wrong};
}

double gpu_pair_latency(int64_t pair, int64_t rounds, int64_t timeout_us) {
    return at(pair).latency(static_cast<int>(rounds), timeout_us);
}

double gpu_pair_bandwidth(int64_t pair, bool copy_engine) {
    return at(pair).bandwidth(copy_engine);
}

std::string gpu_fabric_handle(int64_t device) {
    return cuda::fabric_handle(static_cast<int>(device));
}

std::tuple<double, double> gpu_order_rates(std::vector<int64_t> devices, int64_t group, int64_t bytes) {
    const auto rates = cuda::order_rates({devices.begin(), devices.end()}, static_cast<int>(group), bytes);
    return {rates.together, rates.staggered};
}

}  // namespace ep::ops
