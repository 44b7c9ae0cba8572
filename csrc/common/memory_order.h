// The only loads and stores that order anything between ranks on a CPU: plain 64-bit release stores and
// acquire loads.
#pragma once

#include <cstdint>

namespace ep {

inline uint64_t load_acquire(const void* p) {
    return __atomic_load_n(static_cast<const uint64_t*>(p), __ATOMIC_ACQUIRE);
}
inline void store_release(void* p, uint64_t v) {
    __atomic_store_n(static_cast<uint64_t*>(p), v, __ATOMIC_RELEASE);
}

}  // namespace ep
