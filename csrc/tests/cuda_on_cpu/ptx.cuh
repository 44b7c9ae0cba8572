// In the place of csrc/common/ptx.cuh.
#pragma once

#include "emulator.h"

namespace ep::ptx {

inline void fence_system() {
    std::atomic_thread_fence(std::memory_order_seq_cst);
}
inline void store_flag(void* p, uint64_t v) {
    __atomic_store_n(static_cast<uint64_t*>(p), v, __ATOMIC_RELAXED);
}
inline uint64_t load_flag(const void* p) {
    emulated::let_others();
    return __atomic_load_n(static_cast<const uint64_t*>(p), __ATOMIC_ACQUIRE);
}
inline uint64_t load_relaxed(const void* p) {
    emulated::let_others();
    return __atomic_load_n(static_cast<const uint64_t*>(p), __ATOMIC_RELAXED);
}
inline uint4 load_fresh(const void* p) {
    uint4 v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
inline uint32_t load_fresh_word(const void* p) {
    return __atomic_load_n(static_cast<const uint32_t*>(p), __ATOMIC_RELAXED);
}
inline uint4 load_row(const void* p) {
    return load_fresh(p);
}
inline void store_row(void* p, uint4 v) {
    std::memcpy(p, &v, sizeof v);
}
inline uint64_t nanoseconds() {
    return static_cast<uint64_t>(std::chrono::steady_clock::now().time_since_epoch().count());
}
inline void wait_for_previous_kernel() {}
inline void let_next_kernel_start() {}

}  // namespace ep::ptx
