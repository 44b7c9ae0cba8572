// How a rank waits for its peers on a CPU.
#pragma once

#include <time.h>

#include <algorithm>
#include <chrono>
#include <cstdint>

namespace ep::cpu {

using Clock = std::chrono::steady_clock;

inline int64_t microseconds_since(Clock::time_point start) {
    return std::chrono::duration_cast<std::chrono::microseconds>(Clock::now() - start).count();
}

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

// More ranks than cores is normal on a CPU, so waiting must leave the core to the peer that is waited for. A
// nap does; sched_yield does not when others want the core too (docs/benchmarking.md, "How a rank waits").
inline void back_off(int64_t round) {
    constexpr int64_t kSpins = 64, kLongestNapUs = 100;
    if (round < kSpins) {
        pause();
    } else {
        const timespec nap{0, std::min<int64_t>(round - kSpins + 1, kLongestNapUs) * 1000};
        nanosleep(&nap, nullptr);
    }
}

}  // namespace ep::cpu
