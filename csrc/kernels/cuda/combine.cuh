// What the two combine kernels share. See exchange.cuh.
#pragma once

#include <type_traits>

#include "exchange.cuh"
#include "formats.cuh"

namespace ep::cuda {

constexpr int kReduceLoads = 8;  // of 16 bytes, for a row; 16 need more registers than there are

// The part of a row that a segment covers, in units of eight elements.
struct Units {
    int begin, end;
};
__device__ inline Units units_of_segment(int hidden, int segment, const Plan& plan) {
    const int units = units_of(hidden);
    return {plan.per_segments.divide(units * segment), plan.per_segments.divide(units * (segment + 1))};
}

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

constexpr int kPlacedRows = 4;  // whose loads are issued before the first is added

// What this rank's experts made of a slot, as a whole warp has it: lane k has the k-th choice's place, -1:
// none, and a set of those that have one.
struct Placed {
    int place;
    unsigned live;
};
__device__ inline Placed load_placed(const CombineArgs& a, int64_t slot, int top_k) {
    const int k = static_cast<int>(threadIdx.x) % 32;
    const int place = k < top_k ? a.places[slot * top_k + k] : -1;
    return {place, __ballot_sync(kAll, place >= 0)};
}

// Where the first row of a set is, by a whole warp.
template <class Y>
__device__ const char* find_row(const CombineArgs& a, const Placed& mine, unsigned live) {
    const int64_t row_bytes = static_cast<int64_t>(a.hidden) * (Y::kWords * 2);
    return a.y + __shfl_sync(kAll, mine.place, __ffs(live) - 1) * row_bytes;
}

template <class Y>
constexpr int kPlacedUnits = 2 / Y::kWords;  // of eight elements, of each of the first rows
template <class Y>
struct PlacedWords {
    uint4 of[kPlacedRows][kPlacedUnits<Y> * Y::kWords];
};

// The first rows of `live`, by a whole warp; of each the units from `unit` in steps before `end`. `row_at`
// knows where the i-th is, which is the first of the set that it is given.
template <class Y, class RowAt>
__device__ void load_results(const CombineArgs& a, unsigned live, const RowAt& row_at, int unit, int step,
                             int end, PlacedWords<Y>& words) {
#pragma unroll
    for (int i = 0; i < kPlacedRows; ++i, live &= live - 1) {
        if (live == 0) continue;
        const char* const row = row_at(i, live);
#pragma unroll
        for (int u = 0; u < kPlacedUnits<Y>; ++u)
            if (unit + u * step < end)
#pragma unroll
                for (int j = 0; j < Y::kWords; ++j)
                    if (has_word<Y>(a.hidden, unit + u * step, j))
                        words.of[i][u * Y::kWords + j] =
                            ptx::load_row(row + (static_cast<int64_t>(unit + u * step) * Y::kWords + j) * 16);
    }
}
template <class Y>
__device__ void load_results(const CombineArgs& a, const Placed& mine, unsigned live, int unit, int step,
                             int end, PlacedWords<Y>& words) {
    auto found = [&](int, unsigned rest) { return find_row<Y>(a, mine, rest); };
    load_results(a, live, found, unit, step, end, words);
}

// Their weighted sum, in order of k, fused, to its place in a row of the wire's format. `words`: of the first
// rows, loaded. `weight`: lane k has the k-th choice's.
template <class Y, class Wire>
__device__ void store_placed_sum(const CombineArgs& a, const Placed& mine, float weight, int unit, int step,
                                 int end, PlacedWords<Y>& words, char* to) {
    Eight sum[kPlacedUnits<Y>]{};
    for (unsigned live = mine.live; live != 0;) {
        if (live != mine.live) load_results(a, mine, live, unit, step, end, words);
#pragma unroll
        for (int i = 0; i < kPlacedRows; ++i, live &= live - 1) {
            if (live == 0) continue;
            const float factor = __shfl_sync(kAll, weight, __ffs(live) - 1);
#pragma unroll
            for (int u = 0; u < kPlacedUnits<Y>; ++u) {
                Eight part;
                Y::unpack(words.of[i] + u * Y::kWords, part);
#pragma unroll
                for (int j = 0; j < 8; ++j) sum[u].v[j] = __fmaf_rn(factor, part.v[j], sum[u].v[j]);
            }
        }
    }
#pragma unroll
    for (int u = 0; u < kPlacedUnits<Y>; ++u)
        if (unit + u * step < end) store_eight<Wire>(to, a.hidden, unit + u * step, sum[u]);
}

// The rows that this rank returns to itself stay where they are, if they are still there when it adds.
template <class Y, class Wire>
__device__ bool keeps_own(const CombineArgs& a) {
    return std::is_same_v<Y, Wire> && a.send && a.receive;
}

// The receiving half of a chunk. `route` is of this warp's first token, if it has one; the others' come from
// `route_of_token`, by whole warps.
template <class Y, class Wire, class Out, bool kPlaced, class RouteOf>
__device__ void reduce_chunk(const View& v, const CombineArgs& a, int chunk, int tokens, RankSet route,
                             const RouteOf& route_of_token) {
    const Plan& plan = a.plan;
    const int token_chunk = plan.per_segments.divide(chunk), first = token_chunk * plan.tokens_per_chunk;
    const int segment = chunk - token_chunk * plan.segments;
    const int count = min(plan.tokens_per_chunk, tokens - first);
    const Groups by = Groups::of_block(plan.warps_per_token);
    const Units piece = units_of_segment(a.hidden, segment, plan);
    for (int t = by.group; t < count; t += by.groups) {
        const int64_t token = first + t;
        if (t != by.group) route = route_of_token(token);
        const char* mine = nullptr;
        if (!kPlaced && keeps_own<Y, Wire>(a))
            mine = a.y + (static_cast<int64_t>(v.rank) * plan.slots + token) * a.hidden * (Y::kWords * 2);
        reduce_row<Wire, Out, kReduceLoads, true>(v, a, token, route, mine, piece.begin + by.place, by.step,
                                                  piece.end);
    }
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
