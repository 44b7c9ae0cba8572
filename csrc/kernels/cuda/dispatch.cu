// Dispatch in one launch: rows, metadata and flags out; then wait for what the others sent. See exchange.cuh.
#include "dispatch.cuh"
#include "launch.h"

namespace ep::cuda {
namespace {

// What this thread does in a chunk.
struct Share {
    Groups by;
    int segment, first, count;  // tokens of the chunk
    Piece piece;
};
__device__ Share share_of(const View& v, const Plan& plan, int chunk, int tokens) {
    Share s{Groups::of_block(plan.warps_per_token)};
    const int token_chunk = plan.per_segments.divide(chunk);
    s.segment = chunk - token_chunk * plan.segments;
    s.first = token_chunk * plan.tokens_per_chunk;
    s.count = max(0, min(plan.tokens_per_chunk, tokens - s.first));
    s.piece = piece_of(static_cast<int>(v.layout.shape.row_bytes / 16), s.segment, plan);
    return s;
}

// What a thread loads before it knows where anything goes.
template <class F>
struct Ahead {
    const char *id_at, *x;
    int id;
    uint4 words[kLoads];
};

template <class Id, class F>
__device__ void find_ahead(const View& v, const DispatchArgs& a, int64_t token, Ahead<F>& ahead) {
    ahead.id_at = static_cast<const char*>(a.ids) + (token * v.top_k + threadIdx.x % 32) * sizeof(Id);
    ahead.x = row_of<F>(v, a, token);
}
template <class Id, class F>
__device__ void load_ahead(const View& v, const Share& s, Ahead<F>& ahead) {
    ahead.id = static_cast<int>(threadIdx.x) % 32 < v.top_k
                   ? static_cast<int>(*reinterpret_cast<const Id*>(ahead.id_at))
                   : -1;
    load_units<F>(ahead.x, s.piece.begin + s.by.place, s.by.step, s.piece.end, ahead.words);
}

// A group of warps sends a piece of a token's row to those of its ranks that are among `hops`; one load
// serves all of them. `words` are the first units.
template <class F>
__device__ void send_row(const View& v, const Plan& plan, const char* x, int64_t slot, const RankSet& route,
                         Hops hops, const Share& s, uint4* words) {
    for (int base = s.piece.begin; base < s.piece.end; base += s.by.step * kUnits<F>) {
        const int w = base + s.by.place;
        if (base != s.piece.begin) load_units<F>(x, w, s.by.step, s.piece.end, words);
        float scales[kUnits<F>];
        if constexpr (!std::is_void_v<F>)
#pragma unroll
            for (int i = 0; i < kUnits<F>; ++i)  // by whole warps, if they have any of it
                if (const int at = w + i * s.by.step; at - static_cast<int>(threadIdx.x) % 32 < s.piece.end)
                    words[i] = quantize<F>(words + i * kUnitLoads<F>, at < s.piece.end, scales[i]);
#pragma unroll 1
        for (int n = hops.first; n <= hops.last; ++n) {
            const int d = hop(v, n);
            if (!route.test(d)) continue;
            const int64_t there = slot_for(v, plan, d, slot);
            char* to = v.windows[d] + v.layout.row(v.channel, there);
#pragma unroll
            for (int i = 0; i < kUnits<F>; ++i) {
                const int at = w + i * s.by.step;
                if (at >= s.piece.end) continue;
                ptx::store_row(to + static_cast<int64_t>(at) * 16, words[i]);
                if constexpr (!std::is_void_v<F>)
                    if (at % 8 == 0)
                        reinterpret_cast<float*>(v.windows[d] +
                                                 v.layout.scale_row(v.channel, there))[at / 8] = scales[i];
            }
        }
    }
}

// Scales that the caller brought: few bytes, any multiple of 4. A chunk's part of them, as of the row.
__device__ void send_scales(const View& v, const Plan& plan, const char* scales, int64_t slot,
                            const RankSet& route, Hops hops, const Share& s) {
    const auto* from = reinterpret_cast<const uint32_t*>(scales);
    const Piece piece = scales_of(v, s.piece);
    for (int i = piece.begin + s.by.place; i < piece.end; i += s.by.step)
        for (int n = hops.first; n <= hops.last; ++n) {
            const int d = hop(v, n);
            if (route.test(d))
                reinterpret_cast<uint32_t*>(
                    v.windows[d] + v.layout.scale_row(v.channel, slot_for(v, plan, d, slot)))[i] = from[i];
        }
}

template <class Id, class F, bool kStaggered>
__global__ void __launch_bounds__(kThreads, 2)
    dispatch_kernel(const __grid_constant__ View v, const __grid_constant__ DispatchArgs a) {
    __shared__ int counts[kMaxWorld];
    const Plan& plan = a.plan;
    const int chunks = plan.chunks();
    const Role role = role_of(v, a.send, a.receive);
    Share share = share_of(v, plan, role.first, a.tokens);
    Ahead<F> ahead;
    find_ahead<Id, F>(v, a, share.first + share.by.group, ahead);
    touch(v, a);
    ptx::wait_for_previous_kernel();
    // Everything that the first chunk needs is asked for at once.
    const State state = load_state(v);
    const int tokens = a.device_tokens ? min(*a.device_tokens, a.tokens) : a.tokens;
    Meta meta{};
    if (role.sends && share.by.group < share.count) load_ahead<Id, F>(v, share, ahead);
    if (role.sends && share.segment == 0 && threadIdx.x < share.count * v.top_k)
        meta = load_meta<Id>(v, a, share.first, threadIdx.x);
    const uint64_t epoch = a.send ? next_epoch(state.epoch) : state.epoch;
    bool alive = begin(state);
    bool sent = false;
    if (a.send && alive) {
        if (state.stage != Stage::kIdle) alive = close_open_exchange(v, state);
        const int passes = alive && role.sends ? passes_of<kStaggered>(v) : 0;
        for (int pass = 1; pass <= passes; ++pass) {
            const Hops hops = hops_of<kStaggered>(v, pass);
            for (int chunk = role.first; chunk < chunks; chunk += role.step) {
                const bool loaded = pass == 1 && chunk == role.first;
                share = share_of(v, plan, chunk, tokens);
                const int64_t slot = static_cast<int64_t>(v.rank) * plan.slots + share.first;
                if (share.segment == 0) {
                    if (!loaded && threadIdx.x < share.count * v.top_k)
                        meta = load_meta<Id>(v, a, share.first, threadIdx.x);
                    send_meta<Id>(v, state, a, slot, share.first, share.count, meta, hops, threadIdx.x,
                                  kThreads);
                }
                for (int t = share.by.group; t < share.count; t += share.by.groups) {
                    const int64_t token = share.first + t;
                    if (!loaded || t != share.by.group) {
                        find_ahead<Id, F>(v, a, token, ahead);
                        load_ahead<Id, F>(v, share, ahead);
                    }
                    const RankSet route = route_of(v, state, ahead.id);
                    if (pass == 1 && share.segment == 0) store_route(v, token, route, share.by.place);
                    if (!(kStaggered ? route.test(hop(v, hops.first)) : route.any())) continue;
                    send_row<F>(v, plan, ahead.x, slot + t, route, hops, share, ahead.words);
                    if (std::is_void_v<F> && v.layout.shape.scale_bytes)
                        send_scales(v, plan, a.scales + token * v.layout.shape.scale_bytes, slot + t, route,
                                    hops, share);
                }
                if (chunk == 0) send_headers(v, state, plan, tokens, hops, threadIdx.x, kThreads);
                flag_chunk(v, state, Phase::kDispatch, epoch, chunk, static_cast<uint32_t>(share.count),
                           hops);
                sent = true;
            }
        }
    }
    leave(v, sent, [&](DeviceWord& w) {
        w.stage = a.receive ? Stage::kReceived : Stage::kSent;
        if (!a.send) return;
        w.epoch = epoch;
        w.tokens = tokens;
        w.chunks = static_cast<uint32_t>(chunks);
    });
    if (role.receives) {
        for (int chunk = role.first; chunk < chunks; chunk += role.step) {
            alive = alive && wait_chunk(v, state, Phase::kDispatch, epoch, chunk, counts);
            if (plan.segments == 1 || chunk % plan.segments == 0)
                receive_metadata(v, a, chunk, counts, alive, threadIdx.x, kThreads);
            // By the last threads of the block: the first ones have metadata to copy.
            if (chunk == 0 && alive)
                receive_headers(v, state, plan, a.tokens_per_source, epoch,
                                kThreads - 1 - static_cast<int>(threadIdx.x), kThreads);
            if (in_host_memory(v) && alive) fetch_chunk(v, a, epoch, chunk, counts);
            if (chunk + role.step < chunks) __syncthreads();  // counts are used again
        }
    }
}

template <class Id, bool kStaggered>
cudaError_t launch_in_order(const View& v, const DispatchArgs& a, const Launch& how) {
    if (!a.quantize) return launch(dispatch_kernel<Id, void, kStaggered>, how, v, a);
    switch (a.x_type) {
        case DType::kF32:
            return launch(dispatch_kernel<Id, F32, kStaggered>, how, v, a);
        case DType::kF16:
            return launch(dispatch_kernel<Id, F16, kStaggered>, how, v, a);
        default:
            return launch(dispatch_kernel<Id, BF16, kStaggered>, how, v, a);
    }
}

template <class Id>
cudaError_t launch_with_id(const View& v, const DispatchArgs& a, const Launch& how) {
    return how.staggered ? launch_in_order<Id, true>(v, a, how) : launch_in_order<Id, false>(v, a, how);
}

}  // namespace

cudaError_t launch_dispatch(const View& v, const DispatchArgs& a, const Launch& how) {
    return a.ids_are_64_bit ? launch_with_id<int64_t>(v, a, how) : launch_with_id<int32_t>(v, a, how);
}

int dispatch_blocks_per_sm() {
    return resident_blocks(dispatch_kernel<int64_t, F32, false>);
}

}  // namespace ep::cuda
