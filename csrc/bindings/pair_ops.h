// Operators of csrc/kernels/cuda/pair_check.h and order_check.h; library_cuda.cpp registers them. See ops.h.
#pragma once

#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

namespace ep::ops {

// {source may access target's memory, with atomics}, each 0 or 1.
std::vector<int64_t> gpu_pair_attributes(int64_t source, int64_t target);
int64_t gpu_pair_create(int64_t source, int64_t target, int64_t bytes);
void gpu_pair_destroy(int64_t pair);
// {rounds that came, words that were not as they were stored}.
std::vector<int64_t> gpu_pair_store(int64_t pair, int64_t seed, int64_t expected, int64_t rounds,
                                    bool announce, int64_t timeout_us);
double gpu_pair_latency(int64_t pair, int64_t rounds, int64_t timeout_us);
double gpu_pair_bandwidth(int64_t pair, bool copy_engine);
std::string gpu_fabric_handle(int64_t device);
// {together, staggered}: bytes per second and GPU.
std::tuple<double, double> gpu_order_rates(std::vector<int64_t> devices, int64_t group, int64_t bytes);

}  // namespace ep::ops
