// What the dispatch and combine kernels share: the view of one rank's exchange, who works on what, waiting
// and failing.
#pragma once

#include "../../common/ptx.cuh"
#include "types.h"

namespace ep::cuda {

constexpr unsigned kAll = 0xFFFFFFFFu;

// A set of ranks. No array: it would be indexed at run time, and so live in memory.
struct RankSet {
    uint32_t a, b, c;
    __device__ bool test(int r) const { return (r < 32 ? a : r < 64 ? b : c) >> (r % 32) & 1; }
    __device__ bool any() const { return (a | b | c) != 0; }
    // Ranks r, r + 1, ... as bits 0, 1, ...; up to the next multiple of 32.
    __device__ uint32_t from(int r) const { return (r < 32 ? a : r < 64 ? b : c) >> (r % 32); }
};
static_assert(kRouteWords == 3);

// What a kernel reads first, behind the one ahead of it, in loads that do not wait for each other.
struct State {
    uint64_t epoch;
    Stage stage;
    bool stopped;
    Early early;
    int32_t tokens;
    uint32_t chunks;
    RankSet mask;
    __device__ bool masked(int r) const { return mask.test(r); }
};
__device__ inline State load_state(const View& v) {
    const uint4 a = ptx::load_fresh(v.word), m = ptx::load_fresh(v.mask);
    const uint32_t chunks = ptx::load_fresh_word(&v.word->chunks);
    const uint32_t stopped = ptx::load_fresh_word(&v.error->stopped);
    const uint32_t early = ptx::load_fresh_word(v.early);
    State s;
    s.epoch = a.x | static_cast<uint64_t>(a.y) << 32;
    s.stage = static_cast<Stage>(a.z);
    s.tokens = static_cast<int32_t>(a.w);
    s.chunks = chunks;
    s.stopped = stopped != 0;
    s.mask = {m.x, m.y, m.z};
    s.early = static_cast<Early>(early);
    return s;
}

// The block's answer, the same for all its threads, whether nothing has failed: a failure may come just now.
__device__ inline bool begin(const State& s) {
    const bool alive = __syncthreads_or(s.stopped) == 0;
    if (s.early != Early::kNever) ptx::let_next_kernel_start();
    return alive;
}

// Parameters are new to the constant cache in every launch: have them there before the wait for the kernel
// ahead, not one miss after another behind it.
template <class Args>
__device__ __forceinline__ void touch(const View& v, const Args& a) {
    uint64_t all =
        static_cast<uint64_t>(v.layout.shape.world ^ v.layout.ids ^ v.layout.channels ^ v.layout.rows) ^
        (static_cast<uint32_t>(v.world ^ v.pad_id) ^ v.mailed[0]) ^ reinterpret_cast<uint64_t>(v.word);
#pragma unroll
    for (int r = 0; r < 16; r += 4) all ^= reinterpret_cast<uint64_t>(v.windows[r]);
    const auto* words = reinterpret_cast<const uint64_t*>(&a);
#pragma unroll
    for (unsigned i = 0; i < sizeof(Args) / 8; i += 4) all ^= words[i];
    if (all == 0x9E3779B97F4A7C15) __nanosleep(0);  // never; the compiler does not know
}

__device__ inline char* own(const View& v) {
    return v.windows[v.rank];
}
__device__ inline bool in_host_memory(const View& v) {
    return v.mailbox != own(v);
}
__device__ inline bool is_mailed(const View& v, int source) {
    return v.mailed[source / 32] >> (source % 32) & 1;
}
// Where a source's flags, metadata and rows for this rank are written.
__device__ inline char* inbox(const View& v, int source) {
    return is_mailed(v, source) ? v.mailbox : own(v);
}
// The source that this rank is in the window where it writes for d.
__device__ inline int source_for(const View& v, int d) {
    return v.staged ? d : v.rank;
}
// The slot there of a token that stands in `slot` of any other window.
__device__ inline int64_t slot_for(const View& v, const Plan& plan, int d, int64_t slot) {
    return v.staged ? slot + static_cast<int64_t>(d - v.rank) * plan.slots : slot;
}
// The n-th rank to write to: each rank starts with its neighbour, so that not all write to the same one, and
// ends with itself.
__device__ inline int hop(const View& v, int n) {
    const int d = v.rank + n;
    return d < v.world ? d : d - v.world;
}
// Whom a pass over this block's chunks sends to, as hops from this rank. The usual order has one pass with
// all; the staggered one a pass for each, so that at any time about one rank writes to each, and the ranks of
// one group write to one group. Kernels are compiled for either: the usual one has no registers for a second
// loop.
struct Hops {
    int first, last;
};
__device__ inline Hops to_all(const View& v) {
    return {1, v.world};
}
template <bool kStaggered>
__device__ int passes_of(const View& v) {
    return kStaggered ? v.world : 1;
}
template <bool kStaggered>
__device__ Hops hops_of(const View& v, int pass) {
    if (!kStaggered) return to_all(v);
    const int n = staggered_target(v.rank, v.world, v.group, pass) - v.rank;
    return {n > 0 ? n : n + v.world, n > 0 ? n : n + v.world};
}
// Where a combine's rows for a rank go.
__device__ inline char* outbox(const View& v, int d) {
    return d == v.rank ? v.returns : v.windows[d];
}
__device__ inline int rank_of(const View& v, int expert) {
    if (v.expert_rank) return v.expert_rank[expert];
    const int with_more = v.experts_more * (v.experts_base + 1);
    return expert < with_more ? v.per_base_and_one.divide(expert)
                              : v.experts_more + v.per_base.divide(expert - with_more);
}
__device__ inline int local_index(const View& v, int expert) {
    if (v.expert_local) return v.expert_local[expert];
    return expert - v.rank * v.experts_base - min(v.rank, v.experts_more);
}
__device__ inline bool is_local(const View& v, int expert) {
    return expert >= 0 && rank_of(v, expert) == v.rank;
}

// What a block does in a launch: chunks first, first + step, ... Through host memory every other block sends
// and those between receive, so that both directions of the link are in use from the beginning to the end.
struct Role {
    bool sends, receives;
    int first, step;
};
__device__ inline Role role_of(const View& v, bool send, bool receive) {
    const int block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
    if (!(send && receive && in_host_memory(v) && blocks > 1)) return {send, receive, block, blocks};
    const bool sends = block % 2 == 0;
    return {sends, !sends, block / 2, (blocks + sends) / 2};
}

// The ranks of one token, masked ones left out, by the lanes of a warp together; lane k brings the k-th id,
// others -1.
__device__ inline RankSet route_of(const View& v, const State& s, int id) {
    const int r = id >= 0 && id < v.experts ? rank_of(v, id) : -1;
    const uint32_t bit = 1u << (r & 31);
    RankSet route{};
    route.a = __reduce_or_sync(kAll, r >= 0 && r < 32 ? bit : 0) & ~s.mask.a;
    if (v.world > 32) {
        route.b = __reduce_or_sync(kAll, r >= 32 && r < 64 ? bit : 0) & ~s.mask.b;
        route.c = __reduce_or_sync(kAll, r >= 64 ? bit : 0) & ~s.mask.c;
    }
    return route;
}

static __device__ __noinline__ void fail(const View& v, ErrorWord word) {
    if (atomicExch(&v.error->stopped, 1u) == 0) {
        v.error->word = word;
        v.host_error->word = word;
        __threadfence_system();
        v.host_error->stopped = 1;
        if (word.status != Status::kAborted) {
            const uint64_t abort = abort_word_of(word);
            for (int r = 0; r < v.world; ++r)
                if (r != v.rank) ptx::store_flag(v.windows[r] + v.layout.abort_word(v.rank), abort);
        }
    }
}

// A flag that was awaited since `start` (0: not known yet) is `word`. Returns false after a failure.
static __device__ __noinline__ bool may_wait_on(const View& v, Phase phase, uint64_t epoch, int source,
                                                uint64_t word, uint64_t* start) {
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
        return false;
    }
    const uint64_t now = ptx::nanoseconds();
    if (*start == 0) *start = now;
    error.waited_us = static_cast<int64_t>((now - *start) / 1000);
    for (int r = 0; r < v.world; ++r) {
        if (r == v.rank) continue;
        const uint64_t abort = ptx::load_relaxed(inbox(v, r) + v.layout.abort_word(r));
        if (word_low(abort) == 0 || epoch_distance(word_epoch(abort), v.error->floor) < 0) continue;
        if (v.mask[r / 64] >> (r % 64) & 1) continue;  // it lives, and nobody answers it
        read_abort_word(abort, r, error);
        fail(v, error);
        return false;
    }
    if (now - *start > *const_cast<volatile uint64_t*>(&v.error->timeout_ns)) {
        error.status = Status::kTimeout;
        error.missing[source / 64] = uint64_t{1} << (source % 64);
        fail(v, error);
        return false;
    }
    return *reinterpret_cast<volatile uint32_t*>(&v.error->stopped) == 0;  // else another block has failed
}

// One lane waits for one flag. Returns its count, or -1 after a failure. kPassed: a later epoch will do.
template <bool kPassed = false>
__device__ int wait_flag(const View& v, Phase phase, uint64_t epoch, int source, int chunk) {
    const char* flag =
        inbox(v, source) + (phase == Phase::kDispatch ? v.layout.dispatch_flag(v.channel, source, chunk)
                                                      : v.layout.combine_flag(v.channel, source, chunk));
    uint64_t start = 0;
    for (int spins = 1;; ++spins) {
        const uint64_t word = ptx::load_flag(flag);
        if (word_epoch(word) == epoch || (kPassed && epoch_distance(word_epoch(word), epoch) > 0))
            return static_cast<int>(word_low(word));
        if (spins % 64 == 0 && !may_wait_on(v, phase, epoch, source, word, &start)) return -1;
    }
}

// The block waits for a chunk of all sources. counts[source] is in shared memory: -1 after a failure. Returns
// whether none is negative, or `odd`.
__device__ inline bool wait_chunk(const View& v, const State& s, Phase phase, uint64_t epoch, int chunk,
                                  int* counts, uint32_t odd = ~0u) {
    int bad = 0;
#pragma unroll 1
    for (int source = threadIdx.x; source < v.world; source += kThreads) {
        counts[source] = s.masked(source) ? 0 : wait_flag(v, phase, epoch, source, chunk);
        bad |= counts[source] < 0 || counts[source] == static_cast<int>(odd);
    }
    return __syncthreads_or(bad) == 0;
}

// The same by one warp alone.
__device__ inline bool wait_chunk_warp(const View& v, const State& s, Phase phase, uint64_t epoch, int chunk,
                                       int* counts, uint32_t odd = ~0u) {
    bool bad = false;
#pragma unroll 1
    for (int source = threadIdx.x % 32; source < v.world; source += 32) {
        counts[source] = s.masked(source) ? 0 : wait_flag(v, phase, epoch, source, chunk);
        bad |= counts[source] < 0 || counts[source] == static_cast<int>(odd);
    }
    return __any_sync(kAll, bad) == 0;
}

// By one warp, after a barrier with all that have stored: the rows of a chunk are on their way to `hops`.
__device__ inline void flag_chunk_warp(const View& v, const State& s, Phase phase, uint64_t epoch, int chunk,
                                       uint32_t count, Hops hops) {
    ptx::fence_system();
#pragma unroll 1
    for (int n = hops.first + static_cast<int>(threadIdx.x) % 32; n <= hops.last; n += 32) {
        const int d = hop(v, n);
        if (s.masked(d)) continue;
        char* flag = v.windows[d] + (phase == Phase::kDispatch
                                         ? v.layout.dispatch_flag(v.channel, source_for(v, d), chunk)
                                         : v.layout.combine_flag(v.channel, source_for(v, d), chunk));
        ptx::store_flag(flag, make_word(epoch, count));
    }
}
// The same by a whole block.
__device__ inline void flag_chunk(const View& v, const State& s, Phase phase, uint64_t epoch, int chunk,
                                  uint32_t count, Hops hops) {
    __syncthreads();
    if (threadIdx.x < 32) flag_chunk_warp(v, s, phase, epoch, chunk, count, hops);
}

// The last block that has read the device word moves it; a kernel that was stopped leaves it where it was.
// `fenced`: flag_chunk has come after this block's reads.
template <class F>
__device__ void leave(const View& v, bool fenced, F&& write) {
    if (!fenced) __syncthreads();
    if (threadIdx.x != 0) return;
    if (!fenced) __threadfence();
    if (atomicAdd(&v.word->ticket, 1u) != gridDim.x - 1) return;
    v.word->ticket = v.word->sends = v.word->sums = 0;
    if (*reinterpret_cast<volatile uint32_t*>(&v.error->stopped) == 0) write(*v.word);
}

}  // namespace ep::cuda
