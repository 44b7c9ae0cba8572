// What the two combine kernels share. See exchange.cuh.
#pragma once

#include <type_traits>

#include "exchange.cuh"
#include "formats.cuh"

namespace ep::cuda {

constexpr int kReduceLoads = 8;  // of 16 bytes, for a row; 16 need more registers than there are

__device__ inline RankSet load_route(const View& v, int64_t token) {
    const uint32_t* words = v.routes + token * kRouteWords;
    RankSet route{ptx::load_fresh_word(words), 0, 0};
    if (v.world > 32) route.b = ptx::load_fresh_word(words + 1), route.c = ptx::load_fresh_word(words + 2);
    return route;
}

// One row: fp32, in order of rank, rounded once. From `begin` to `end`, in steps, in units of eight elements.
// `mine`, if not null, is this rank's own part, which then was not sent. `kMailed`: there may be a mailbox.
template <class Wire, class Out, int kLoads, bool kMailed>
__device__ void reduce_row(const View& v, const CombineArgs& a, int64_t token, const RankSet& route,
                           const char* mine, int begin, int step, int end) {
    constexpr int kAhead = 4;                         // rows whose loads are issued before the first is added
    constexpr int kWide = kLoads / 4 / Wire::kWords;  // units of eight elements at a time
    const int64_t rank_stride = v.layout.shape.max_tokens * v.layout.shape.wire_bytes;
    constexpr int kBytes = Wire::kWords * 16;  // of eight elements
    const int64_t rows = v.layout.combine_row(v.channel, 0, token);
    char* const out = a.out + token * a.hidden * (Out::kWords * 2);
#pragma unroll 1
    for (int e = begin; e < end; e += step * kWide) {
        Eight sum[kWide]{};
#pragma unroll 1
        for (int r = 0; r < v.world; r += kAhead) {
            const uint32_t has = route.from(r), mailed = kMailed ? v.mailed[r / 32] >> (r % 32) : 0;
            uint4 part[kAhead][kWide * Wire::kWords];
#pragma unroll
            for (int i = 0; i < kAhead; ++i)
                if (has >> i & 1)
#pragma unroll
                    for (int k = 0; k < kWide; ++k)
                        if (e + k * step < end)
#pragma unroll
                            for (int j = 0; j < Wire::kWords; ++j)
                                if (has_word<Wire>(a.hidden, e + k * step, j))
                                    part[i][k * Wire::kWords + j] = ptx::load_row(
                                        (mine && r + i == v.rank ? mine
                                                                 : (mailed >> i & 1 ? v.mailbox : v.returns) +
                                                                       rows + (r + i) * rank_stride) +
                                        static_cast<int64_t>(e + k * step) * kBytes + j * 16);
#pragma unroll
            for (int i = 0; i < kAhead; ++i)
                if (has >> i & 1)
#pragma unroll
                    for (int k = 0; k < kWide; ++k) {
                        Eight add;
                        Wire::unpack(part[i] + k * Wire::kWords, add);
#pragma unroll
                        for (int j = 0; j < 8; ++j) sum[k].v[j] += add.v[j];
                    }
        }
#pragma unroll
        for (int k = 0; k < kWide; ++k)
            if (e + k * step < end) store_eight<Out>(out, a.hidden, e + k * step, sum[k]);
    }
}

// Where a slot's results stand, and their weights: lane k has the k-th.
struct Placed {
    int place;
    float weight;
};
// By a whole warp, of one slot. `weights`: of the slot.
__device__ inline Placed load_placed(const CombineArgs& a, int64_t slot, const float* weights, int top_k) {
    const int k = static_cast<int>(threadIdx.x) % 32;
    if (k >= top_k) return {-1, 0.0f};
    return {a.places[slot * top_k + k], weights[k]};
}

// Eight elements of the weighted sum of what this rank's experts made of a slot, in order of k, fused. By a
// whole warp, of which the lanes with a unit before `end` have something to do.
template <class Y, class Wire>
__device__ void store_placed_sum(const CombineArgs& a, const Placed& mine, int top_k, int unit, int end,
                                 char* to) {
    constexpr int kAhead = 4;  // rows whose loads are issued before the first is added
    const int64_t row_bytes = static_cast<int64_t>(a.hidden) * (Y::kWords * 2);
    Eight sum{};
    for (int first = 0; first < top_k; first += kAhead) {
        uint4 words[kAhead][Y::kWords];
        int place[kAhead];
        float weight[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            place[i] = __shfl_sync(kAll, mine.place, first + i);
            weight[i] = __shfl_sync(kAll, mine.weight, first + i);
        }
#pragma unroll
        for (int i = 0; i < kAhead; ++i)
            if (place[i] >= 0 && unit < end)
#pragma unroll
                for (int j = 0; j < Y::kWords; ++j)
                    if (has_word<Y>(a.hidden, unit, j))
                        words[i][j] = ptx::load_row(a.y + place[i] * row_bytes +
                                                    (static_cast<int64_t>(unit) * Y::kWords + j) * 16);
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            if (place[i] < 0) continue;
            Eight part;
            Y::unpack(words[i], part);
#pragma unroll
            for (int j = 0; j < 8; ++j) sum.v[j] = __fmaf_rn(weight[i], part.v[j], sum.v[j]);
        }
    }
    if (unit < end) store_eight<Wire>(to, a.hidden, unit, sum);
}

// The rows that this rank returns to itself stay where they are, if they are still there when it adds.
template <class Y, class Wire>
__device__ bool keeps_own(const CombineArgs& a) {
    return std::is_same_v<Y, Wire> && a.send && a.receive;
}

// What stands in counts if not all sources have sent a chunk. False after a failure. Else a peer has closed
// the exchange, and has not sent the rows that this rank waits for. The exchange is over for everybody, so
// nothing stops; the host is told that this result is lost.
__device__ inline bool closed_by_peer(const View& v, const int* counts, bool speaker) {
    int closed_by = 0;
#pragma unroll 1
    for (int source = v.world - 1; source >= 0; --source) {
        if (counts[source] < 0) return false;
        if (counts[source] == static_cast<int>(kClosed)) closed_by = source + 1;
    }
    if (speaker) *const_cast<volatile int32_t*>(&v.host_error->closed_by) = closed_by;
    return true;
}

}  // namespace ep::cuda
