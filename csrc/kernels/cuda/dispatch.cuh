// What the two dispatch kernels share: quantising, metadata, closing. See exchange.cuh.
#pragma once

#include <type_traits>

#include "exchange.cuh"
#include "formats.cuh"

namespace ep::cuda {

constexpr int kLoads = 4;  // 16-byte loads that a thread issues before it stores

// A row is copied in units of one 16-byte word, or quantised in units of 16 values, which become one.
template <class F>
constexpr int kUnitLoads = 2 * F::kWords;
template <>
constexpr int kUnitLoads<void> = 1;
template <class F>
constexpr int kUnits = kLoads / kUnitLoads<F>;

template <class F>
__device__ void load_units(const char* x, int first, int step, int end, uint4* words) {
#pragma unroll
    for (int i = 0; i < kUnits<F>; ++i)
        if (first + i * step < end)
#pragma unroll
            for (int j = 0; j < kUnitLoads<F>; ++j)
                words[i * kUnitLoads<F> + j] =
                    ptx::load_row(x + (static_cast<int64_t>(first + i * step) * kUnitLoads<F> + j) * 16);
}

template <class F>
__device__ const char* row_of(const View& v, const DispatchArgs& a, int64_t token) {
    return a.x + token * v.layout.shape.row_bytes * kUnitLoads<F>;
}

// 16 values to one word; 8 lanes, which all come here, share a scale.
template <class F>
__device__ uint4 quantize(const uint4* words, bool mine, float& scale) {
    Eight a{}, b{};
    if (mine) {
        F::unpack(words, a);
        F::unpack(words + F::kWords, b);
    }
    float amax = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) amax = fmaxf(amax, fmaxf(fabsf(a.v[i]), fabsf(b.v[i])));
#pragma unroll
    for (int lane = 4; lane > 0; lane /= 2) amax = fmaxf(amax, __shfl_xor_sync(kAll, amax, lane));
    scale = fp8_scale(amax);
    const Quotient by(scale);
    if (by.is_plain()) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            a.v[i] = by.divide(a.v[i]);
            b.v[i] = by.divide(b.v[i]);
        }
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            a.v[i] = by.divide_any(a.v[i]);
            b.v[i] = by.divide_any(b.v[i]);
        }
    }
    return {pack_e4m3(a.v[0], a.v[1], a.v[2], a.v[3]), pack_e4m3(a.v[4], a.v[5], a.v[6], a.v[7]),
            pack_e4m3(b.v[0], b.v[1], b.v[2], b.v[3]), pack_e4m3(b.v[4], b.v[5], b.v[6], b.v[7])};
}

// Ids and weights of a chunk's tokens; the first of them may have been loaded already.
struct Meta {
    int id;
    float weight;
};
template <class Id>
__device__ Meta load_meta(const View& v, const DispatchArgs& a, int64_t first, int i) {
    return {static_cast<int>(static_cast<const Id*>(a.ids)[first * v.top_k + i]),
            a.weights[first * v.top_k + i]};
}
template <class Id>
__device__ void send_meta(const View& v, const State& state, const DispatchArgs& a, int64_t slot, int first,
                          int count, Meta meta, Hops hops, int thread, int threads) {
    for (int i = thread; i < count * v.top_k; i += threads) {
        if (i >= threads) meta = load_meta<Id>(v, a, first, i);
        const int id = meta.id >= 0 && meta.id < v.experts ? meta.id : -1;
#pragma unroll 1
        for (int n = hops.first; n <= hops.last; ++n) {
            const int d = hop(v, n);
            if (state.masked(d)) continue;
            const int64_t to = slot_for(v, a.plan, d, slot);
            reinterpret_cast<int32_t*>(v.windows[d] + v.layout.id_row(v.channel, to))[i] = id;
            reinterpret_cast<float*>(v.windows[d] + v.layout.weight_row(v.channel, to))[i] = meta.weight;
        }
    }
}

// How many tokens this rank has in all, and its T; chunk 0 covers them.
__device__ inline void send_headers(const View& v, const State& state, const Plan& plan, int tokens,
                                    Hops hops, int thread, int threads) {
    for (int n = hops.first + thread; n <= hops.last; n += threads)
        if (const int d = hop(v, n); !state.masked(d))
            *reinterpret_cast<SourceHeader*>(v.windows[d] + v.layout.header(v.channel, source_for(v, d))) = {
                static_cast<uint32_t>(tokens), static_cast<uint32_t>(plan.slots)};
}

// The ranks of a token, for combine; by threads 0, 1, ... of those that have its route.
__device__ inline void store_route(const View& v, int64_t token, const RankSet& route, int thread) {
    if (thread < kRouteWords)
        v.routes[token * kRouteWords + thread] = thread == 0 ? route.a : thread == 1 ? route.b : route.c;
}

// Ids and weights leave the window; rows that are not for this rank, or were never sent, get the padding id,
// and so do the foreign experts of others if ids are local. 16 threads take a row.
__device__ inline void receive_metadata(const View& v, const DispatchArgs& a, int chunk, const int* counts,
                                        bool arrived, int thread, int threads) {
    const Plan& plan = a.plan;
    const int first = plan.per_segments.divide(chunk) * plan.tokens_per_chunk;
    const int width = min(plan.tokens_per_chunk, plan.slots - first), k = thread % 16;
    const unsigned row_lanes = 0xFFFFu << (thread & 16);
#pragma unroll 1
    for (int i = thread / 16; i < v.world * plan.tokens_per_chunk; i += threads / 16) {
        const int source = plan.per_chunk.divide(i), t = i - source * plan.tokens_per_chunk;
        if (t >= width) continue;
        const int64_t slot = static_cast<int64_t>(source) * plan.slots + first + t;
        int id = -1;
        float weight = 0.0f;
        if (arrived && t < counts[source] && k < v.top_k) {
            const char* const from = inbox(v, source);
            id = reinterpret_cast<const int32_t*>(from + v.layout.id_row(v.channel, slot))[k];
            weight = reinterpret_cast<const float*>(from + v.layout.weight_row(v.channel, slot))[k];
            if (from != own(v))  // combine reads them again
                reinterpret_cast<int32_t*>(own(v) + v.layout.id_row(v.channel, slot))[k] = id;
        }
        const bool local = is_local(v, id);
        const bool kept = v.local_ids ? local : __any_sync(row_lanes, local) && id >= 0;
        if (k >= v.top_k) continue;
        a.out_ids[slot * v.top_k + k] = !kept ? v.pad_id : v.local_ids ? local_index(v, id) : id;
        a.out_weights[slot * v.top_k + k] = kept ? weight : 0.0f;
    }
}

// A source must have the same T as this rank; else nobody goes on.
__device__ inline void check_slots(const View& v, const Plan& plan, int source, uint32_t slots,
                                   uint64_t epoch) {
    if (slots == static_cast<uint32_t>(plan.slots)) return;
    ErrorWord error;
    error.status = Status::kSlotsDiffer;
    error.peer = source;
    error.reporter = v.rank;
    error.channel = v.channel;
    error.epoch_expected = error.epoch_seen = epoch;
    fail(v, error);
}

// Chunk 0 of every source covers its header: how many tokens it has in all, and whether it agrees on T.
__device__ inline void receive_headers(const View& v, const State& s, const Plan& plan,
                                       int32_t* tokens_per_source, uint64_t epoch, int thread, int threads) {
    for (int source = thread; source < v.world; source += threads) {
        const auto header =
            *reinterpret_cast<const SourceHeader*>(inbox(v, source) + v.layout.header(v.channel, source));
        tokens_per_source[source] = s.masked(source) ? 0 : static_cast<int32_t>(header.tokens);
        if (!s.masked(source)) check_slots(v, plan, source, header.slots, epoch);
    }
}

// The part of a row that a chunk covers, in 16-byte words: whole groups of 8 (a block of fp8 scales).
struct Piece {
    int begin, end;
};
__device__ inline Piece piece_of(int words, int segment, const Plan& plan) {
    auto cut = [&](int s) { return s == plan.segments ? words : plan.per_segments.divide(words * s) & ~7; };
    return {cut(segment), cut(segment + 1)};
}
// The part of its scales, in 4-byte words.
__device__ inline Piece scales_of(const View& v, Piece piece) {
    const int words = static_cast<int>(v.layout.shape.row_bytes / 16);
    const int scales = static_cast<int>(v.layout.shape.scale_bytes / 4);
    return {piece.begin * scales / words, piece.end * scales / words};
}

// What came by the mailbox: the block brings a chunk's flags, rows and scales to this GPU, where experts read
// them. Ids have been brought before, unless rows are cut: they come with a row's first segment, and the
// others are fetched whatever the ids.
static __device__ __noinline__ void fetch_chunk(const View& v, const DispatchArgs& a, uint64_t epoch,
                                                int chunk, const int* counts) {
    constexpr int kAhead = 8;  // loads that a thread issues before it stores
    const Plan& plan = a.plan;
    const int token_chunk = plan.per_segments.divide(chunk), first = token_chunk * plan.tokens_per_chunk;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Piece whole =
        piece_of(static_cast<int>(v.layout.shape.row_bytes / 16), chunk - token_chunk * plan.segments, plan);
    if (plan.segments == 1) __syncthreads();  // ids are there
    for (int source = threadIdx.x; source < v.world; source += kThreads)
        if (is_mailed(v, source))  // combine reads them again
            *reinterpret_cast<uint64_t*>(own(v) + v.layout.dispatch_flag(v.channel, source, chunk)) =
                make_word(epoch, static_cast<uint32_t>(counts[source]));
    const int rows = (v.world - 1) * plan.tokens_per_chunk, parts = max(1, kWarps / max(1, rows));
    for (int i = warp; i < rows * parts; i += kWarps) {
        const int row = i / parts, part = i - row * parts, turn = plan.per_chunk.divide(row);
        const int source = turn + (turn >= v.rank), t = row - turn * plan.tokens_per_chunk;
        if (!is_mailed(v, source) || t >= counts[source]) continue;
        const int64_t slot = static_cast<int64_t>(source) * plan.slots + first + t;
        if (plan.segments == 1) {
            const auto* ids = reinterpret_cast<const int32_t*>(own(v) + v.layout.id_row(v.channel, slot));
            if (!__any_sync(kAll, is_local(v, lane < v.top_k ? ids[lane] : -1))) continue;
        }
        const int length = whole.end - whole.begin;
        const Piece piece{whole.begin + length * part / parts, whole.begin + length * (part + 1) / parts};
        const char* const from = v.mailbox + v.layout.row(v.channel, slot);
        char* const to = own(v) + v.layout.row(v.channel, slot);
        for (int base = piece.begin + lane; base < piece.end; base += 32 * kAhead) {
            uint4 words[kAhead];
#pragma unroll
            for (int k = 0; k < kAhead; ++k)
                if (base + 32 * k < piece.end)
                    words[k] = ptx::load_row(from + static_cast<int64_t>(base + 32 * k) * 16);
#pragma unroll
            for (int k = 0; k < kAhead; ++k)
                if (base + 32 * k < piece.end)
                    ptx::store_row(to + static_cast<int64_t>(base + 32 * k) * 16, words[k]);
        }
        if (part != 0) continue;
        const Piece scales = scales_of(v, whole);
        const int64_t at = v.layout.scale_row(v.channel, slot);
        for (int s = scales.begin + lane; s < scales.end; s += 32)
            reinterpret_cast<uint32_t*>(own(v) + at)[s] =
                reinterpret_cast<const uint32_t*>(v.mailbox + at)[s];
    }
}

// The block waits for all flags of an exchange at once, a flag to a thread; false after a failure. Other
// blocks may have gone on already, here or on peers, and have written the next exchange's flags.
__device__ inline bool wait_all_chunks(const View& v, const State& s, Phase phase, int chunks) {
    bool bad = false;
#pragma unroll 1
    for (int i = threadIdx.x; i < chunks * v.world; i += kThreads)
        if (const int source = i % v.world; !s.masked(source))
            bad |= wait_flag<true>(v, phase, s.epoch, source, i / v.world) < 0;
    return __syncthreads_or(bad) == 0;
}

// An exchange that nobody combined ends without data, before this one writes where that one was read.
static __device__ __noinline__ bool close_open_exchange(const View& v, const State& s) {
    const int chunks = static_cast<int>(s.chunks);
    // Only a rank that has seen all rows of an exchange may say that it is done with them.
    if (s.stage == Stage::kSent && !wait_all_chunks(v, s, Phase::kDispatch, chunks)) return false;
    for (int chunk = blockIdx.x; chunk < chunks && s.stage != Stage::kReturned; chunk += gridDim.x)
        flag_chunk(v, s, Phase::kCombine, s.epoch, chunk, kClosed, to_all(v));
    return wait_all_chunks(v, s, Phase::kCombine, chunks);
}

}  // namespace ep::cuda
