// What the dispatch and combine kernels share: the view of one rank's exchange, who works on what, waiting
// and failing.
#pragma once

#include "../../common/ptx.cuh"
#include "types.h"

namespace ep::cuda {

constexpr unsigned kAll = 0xFFFFFFFFu;

__device__ inline char* own(const View& v) {
    return v.windows[v.rank];
}
__device__ inline bool masked(const View& v, int r) {
    return v.mask[r / 64] >> (r % 64) & 1;
}
__device__ inline int rank_of(const View& v, int expert) {
    if (v.expert_rank) return v.expert_rank[expert];
    const int with_more = v.experts_more * (v.experts_base + 1);
    return expert < with_more ? expert / (v.experts_base + 1)
                              : v.experts_more + (expert - with_more) / v.experts_base;
}
__device__ inline int local_index(const View& v, int expert) {
    if (v.expert_local) return v.expert_local[expert];
    return expert - v.rank * v.experts_base - min(v.rank, v.experts_more);
}
__device__ inline bool is_local(const View& v, int expert) {
    return expert >= 0 && rank_of(v, expert) == v.rank;
}

struct Route {
    uint32_t words[kRouteWords];
    __device__ bool test(int r) const { return words[r / 32] >> (r % 32) & 1; }
    __device__ bool any() const {
        uint32_t all = 0;
        for (uint32_t w : words) all |= w;
        return all != 0;
    }
};

// The ranks of one token, by the lanes of a warp together; ids[k] in any memory, -1 for none.
template <class Id>
__device__ Route route_of(const View& v, const Id* ids, int lane) {
    Route route{};
    const int id = lane < v.top_k ? static_cast<int>(ids[lane]) : -1;
    const int r = id >= 0 && id < v.experts ? rank_of(v, id) : -1;
    for (int w = 0; w < kRouteWords && w * 32 < v.world; ++w)
        route.words[w] = __reduce_or_sync(kAll, r >= 0 && r / 32 == w ? 1u << (r % 32) : 0u);
    return route;
}

__device__ inline void fail(const View& v, ErrorWord word) {
    if (atomicExch(&v.error->stopped, 1u) == 0) {
        v.error->word = word;
        v.host_error->word = word;
        __threadfence_system();
        v.host_error->stopped = 1;
        if (word.status != Status::kAborted) {
            const uint64_t abort = make_word(word.epoch_expected, static_cast<uint32_t>(word.peer + 1));
            for (int r = 0; r < v.world; ++r)
                if (r != v.rank) ptx::store_flag(v.windows[r] + v.layout.abort_word(v.rank), abort);
        }
    }
}

// One lane waits for one flag. Returns its count, or -1 after a failure.
__device__ inline int wait_flag(const View& v, Phase phase, uint64_t epoch, int source, int chunk) {
    const char* flag = own(v) + (phase == Phase::kDispatch ? v.layout.dispatch_flag(v.channel, source, chunk)
                                                           : v.layout.combine_flag(v.channel, source, chunk));
    uint64_t start = 0;
    for (int spins = 0;; ++spins) {
        const uint64_t word = ptx::load_flag(flag);
        if (word_epoch(word) == epoch) return static_cast<int>(word_low(word));
        ErrorWord error;
        error.peer = source;
        error.reporter = v.rank;
        error.phase = phase;
        error.channel = v.channel;
        error.epoch_expected = epoch;
        error.epoch_seen = word_epoch(word);
        if (epoch_distance(word_epoch(word), epoch) > 0) {
            error.status = Status::kAhead;
            fail(v, error);
            return -1;
        }
        if ((spins & 63) != 63) continue;
        const uint64_t now = ptx::nanoseconds();
        if (start == 0) start = now;
        error.waited_us = static_cast<int64_t>((now - start) / 1000);
        for (int r = 0; r < v.world; ++r) {
            if (r == v.rank) continue;
            const uint64_t abort = ptx::load_relaxed(own(v) + v.layout.abort_word(r));
            if (word_low(abort) == 0 || epoch_distance(word_epoch(abort), v.error->floor) < 0) continue;
            error.status = Status::kAborted;
            error.peer = static_cast<int32_t>(word_low(abort)) - 1;
            error.reporter = r;
            error.epoch_seen = word_epoch(abort);
            fail(v, error);
            return -1;
        }
        if (now - start > v.timeout_ns) {
            error.status = Status::kTimeout;
            error.missing[source / 64] = uint64_t{1} << (source % 64);
            fail(v, error);
            return -1;
        }
        if (*reinterpret_cast<volatile uint32_t*>(&v.error->stopped)) return -1;  // another block has failed
    }
}

// The block waits for a chunk of all sources. counts[source] is in shared memory: -1 after a failure.
__device__ inline bool wait_chunk(const View& v, Phase phase, uint64_t epoch, int chunk, int* counts) {
    int bad = 0;
    for (int source = threadIdx.x; source < v.world; source += kThreads) {
        counts[source] = masked(v, source) ? 0 : wait_flag(v, phase, epoch, source, chunk);
        bad |= counts[source] < 0;
    }
    return __syncthreads_or(bad) == 0;
}

// The block's rows of a chunk are on their way: say so to every rank. Called by all threads; warp 0 does it.
__device__ inline void flag_chunk(const View& v, Phase phase, uint64_t epoch, int chunk, uint32_t count) {
    __syncthreads();
    if (threadIdx.x >= 32) return;
    ptx::fence_system();
    for (int d = threadIdx.x; d < v.world; d += 32) {
        if (masked(v, d)) continue;
        char* flag =
            v.windows[d] + (phase == Phase::kDispatch ? v.layout.dispatch_flag(v.channel, v.rank, chunk)
                                                      : v.layout.combine_flag(v.channel, v.rank, chunk));
        ptx::store_flag(flag, make_word(epoch, count));
    }
}

// The last block to leave moves the device word; `stopped` kernels leave it where it was.
template <class F>
__device__ void leave(const View& v, F&& write) {
    __syncthreads();
    if (threadIdx.x != 0) return;
    __threadfence();
    if (atomicAdd(&v.word->ticket, 1u) != gridDim.x - 1) return;
    v.word->ticket = 0;
    if (*reinterpret_cast<volatile uint32_t*>(&v.error->stopped) == 0) write(*v.word);
}

}  // namespace ep::cuda
