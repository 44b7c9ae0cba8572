// Combine in one launch: this rank's sums back to where the tokens came from, and the sum of what all ranks
// return. A block sends a chunk, flags it, and reduces an earlier chunk while its stores are under way. See
// exchange.cuh.
#include <algorithm>

#include "combine.cuh"
#include "launch.h"

namespace ep::cuda {
namespace {

constexpr int kLoads = 4;       // 16-byte loads that a thread issues before it stores
constexpr int kEarlyWorld = 8;  // up to so many ranks most rows are live: load them before that is known

template <class Y>
constexpr int kUnits = kLoads / Y::kWords;  // of eight elements

template <class Y>
__device__ void load_units(const char* y, int hidden, int first, int step, int end, uint4* words) {
#pragma unroll
    for (int i = 0; i < kUnits<Y>; ++i)
        if (first + i * step < end)
#pragma unroll
            for (int j = 0; j < Y::kWords; ++j)
                if (has_word<Y>(hidden, first + i * step, j))
                    words[i * Y::kWords + j] =
                        ptx::load_row(y + (static_cast<int64_t>(first + i * step) * Y::kWords + j) * 16);
}

// One row of the sending half: a token of a source, and what is loaded before it is known to be live.
struct Ahead {
    bool inside;  // the last chunk may be narrower
    int token, source;
    int64_t slot;
    const char *flag_at, *id_at, *y, *to;
    uint64_t flag;
    int id;
    uint4 words[kLoads];
};

__device__ inline void find_ahead(const View& v, const CombineArgs& a, int y_bytes, int chunk, int first,
                                  int width, int unit, Ahead& h) {
    const int turn = a.plan.per_chunk.divide(unit);
    const int t = unit - turn * a.plan.tokens_per_chunk, d = v.rank + turn + 1;
    h.token = first + t;
    h.source = d < v.world ? d : d - v.world;
    h.inside = t < width && h.source < v.world;
    if (!h.inside) return;
    const int64_t slot = static_cast<int64_t>(h.source) * a.plan.slots + h.token;
    // The flag of the dispatch still says how many tokens of the chunk are live.
    h.flag_at = own(v) + v.layout.dispatch_flag(v.channel, h.source, chunk);
    h.id_at = own(v) + v.layout.id_row(v.channel, slot) + threadIdx.x % 32 * 4;
    h.slot = slot;
    h.y = a.y + slot * a.hidden * y_bytes;
    h.to = outbox(v, h.source) + v.layout.combine_row(v.channel, source_for(v, h.source), h.token);
}

template <class Y, bool kPlaced>
__device__ void load_ahead(const View& v, const CombineArgs& a, int place, int step, Units piece, Ahead& h) {
    if (!h.inside) return;
    h.flag = ptx::load_relaxed(h.flag_at);
    h.id = static_cast<int>(threadIdx.x) % 32 < v.top_k ? *reinterpret_cast<const int*>(h.id_at) : -1;
    if (!kPlaced && v.world <= kEarlyWorld)
        load_units<Y>(h.y, a.hidden, piece.begin + place, step, piece.end, h.words);
}

template <class Y, class Wire, bool kPlaced>
__device__ void send_sums(const View& v, const State& state, const CombineArgs& a, int chunk, Hops hops,
                          bool loaded, Ahead& h) {
    const Plan& plan = a.plan;
    const int token_chunk = plan.per_segments.divide(chunk), first = token_chunk * plan.tokens_per_chunk;
    const int segment = chunk - token_chunk * plan.segments;
    const int width = min(plan.tokens_per_chunk, plan.slots - first);
    const int lane = threadIdx.x % 32;
    const auto [group, groups, place, step] = Groups::of_block(a.warps_per_row);
    const Units piece = units_of_segment(a.hidden, segment, plan);
    const int begin = (hops.first - 1) * plan.tokens_per_chunk, end = hops.last * plan.tokens_per_chunk;
    for (int unit = begin + group; unit < end; unit += groups) {
        if (!loaded || unit != group) {
            find_ahead(v, a, Y::kWords * 2, chunk, first, width, unit, h);
            load_ahead<Y, kPlaced>(v, a, place, step, piece, h);
        }
        if (!h.inside) continue;
        if (!kPlaced && keeps_own<Y, Wire>(a) && h.source == v.rank) continue;
        const bool live = h.token - first < static_cast<int>(word_low(h.flag)) && !state.masked(h.source);
        if (!__any_sync(kAll, live && is_local(v, h.id))) continue;
        char* const to = const_cast<char*>(h.to);
        if constexpr (kPlaced) {
            const Placed mine = load_placed(a, h.slot, v.top_k);
            const float weight = lane < v.top_k ? a.weights[h.slot * v.top_k + lane] : 0.0f;
            for (int base = piece.begin + place - lane; base < piece.end; base += step * kPlacedUnits<Y>) {
                PlacedWords<Y> words;
                load_results(a, mine, mine.live, base + lane, step, piece.end, words);
                store_placed_sum<Y, Wire>(a, mine, weight, base + lane, step, piece.end, words, to);
            }
        } else {
            for (int e = piece.begin + place; e < piece.end; e += step * kUnits<Y>) {
                if (v.world > kEarlyWorld || e != piece.begin + place)
                    load_units<Y>(h.y, a.hidden, e, step, piece.end, h.words);
#pragma unroll
                for (int i = 0; i < kUnits<Y>; ++i) {
                    if (e + i * step >= piece.end) continue;
                    if constexpr (std::is_same_v<Y, Wire>) {
#pragma unroll
                        for (int j = 0; j < Y::kWords; ++j)
                            if (has_word<Y>(a.hidden, e + i * step, j))
                                ptx::store_row(to + (static_cast<int64_t>(e + i * step) * Y::kWords + j) * 16,
                                               h.words[i * Y::kWords + j]);
                    } else {
                        Eight part;
                        Y::unpack(h.words + i * Y::kWords, part);
                        store_eight<Wire>(to, a.hidden, e + i * step, part);
                    }
                }
            }
        }
    }
}

template <class Y, class Wire, class Out, bool kStaggered, bool kPlaced>
__global__ void __launch_bounds__(kThreads, 2)
    combine_kernel(const __grid_constant__ View v, const __grid_constant__ CombineArgs a) {
    __shared__ int counts[kMaxWorld];
    const Plan& plan = a.plan;
    const int chunks = plan.chunks();
    const Role role = role_of(v, a.send, a.receive);
    const Groups senders = Groups::of_block(a.warps_per_row);
    const int token_chunk = plan.per_segments.divide(role.first), first = token_chunk * plan.tokens_per_chunk;
    const int width = min(plan.tokens_per_chunk, plan.slots - first);
    const Units piece = units_of_segment(a.hidden, role.first - token_chunk * plan.segments, plan);
    Ahead ahead;
    ahead.inside = false;
    if (role.sends && senders.group < v.world * plan.tokens_per_chunk)
        find_ahead(v, a, Y::kWords * 2, role.first, first, width, senders.group, ahead);
    touch(v, a);
    const int reducer = Groups::of_block(plan.warps_per_token).group, first_token = first + reducer;
    ptx::wait_for_previous_kernel();
    // Everything that the first chunk needs is asked for at once.
    const State state = load_state(v);
    if (role.sends) load_ahead<Y, kPlaced>(v, a, senders.place, senders.step, piece, ahead);
    bool alive = begin(state);
    bool left = false;
    RankSet first_route{};
    if (role.receives && first_token < plan.slots) first_route = load_route(v, first_token);
    auto end = [&](DeviceWord& w) { w.stage = a.receive ? Stage::kIdle : Stage::kReturned; };
    const int mine = (chunks - role.first + role.step - 1) / role.step;
    // With several chunks, receive one chunk behind: by then the peers have most likely sent theirs.
    const int behind = role.sends && role.receives && mine > 1 ? 1 : 0;
    const int passes = role.sends ? passes_of<kStaggered>(v) : 1;
    for (int pass = 1; pass <= passes; ++pass) {
        const Hops hops = hops_of<kStaggered>(v, pass);
        const bool last = pass == passes;  // passes before the last only send
        for (int i = 0; i < mine + (last ? behind : 0) && alive; ++i) {
            if (role.sends && i < mine) {
                const int chunk = role.first + i * role.step;
                send_sums<Y, Wire, kPlaced>(v, state, a, chunk, hops, pass == 1 && i == 0, ahead);
                flag_chunk(v, state, Phase::kCombine, state.epoch, chunk, 0, hops);
            }
            if (!left) {
                leave(v, role.sends, end);
                left = true;
            }
            if (!last || !role.receives || i < behind) continue;
            const int chunk = role.first + (i - behind) * role.step;
            RankSet route = first_route;
            if (i != behind) {
                const int token = plan.per_segments.divide(chunk) * plan.tokens_per_chunk + reducer;
                if (token < state.tokens) route = load_route(v, token);
            }
            const bool usual = wait_chunk(v, state, Phase::kCombine, state.epoch, chunk, counts, kClosed);
            if (usual)
                reduce_chunk<Y, Wire, Out, kPlaced>(v, a, chunk, state.tokens, route,
                                                    [&](int64_t token) { return load_route(v, token); });
            else
                alive = closed_by_peer(v, counts, threadIdx.x == 0);
            if (i + 1 < mine + behind) __syncthreads();  // counts are used again
        }
    }
    if (!left) leave(v, false, end);
}

template <class Y, class Wire, class Out>
cudaError_t launch_in_order(const View& v, const CombineArgs& a, const Launch& how) {
    if (a.places)
        return how.staggered ? launch(combine_kernel<Y, Wire, Out, true, true>, how, v, a)
                             : launch(combine_kernel<Y, Wire, Out, false, true>, how, v, a);
    return how.staggered ? launch(combine_kernel<Y, Wire, Out, true, false>, how, v, a)
                         : launch(combine_kernel<Y, Wire, Out, false, false>, how, v, a);
}

template <class Out>
cudaError_t launch_as(const View& v, const CombineArgs& a, const Launch& how) {
    const bool y32 = a.y_type == DType::kF32, wire32 = a.wire == DType::kF32;
    if (y32 && wire32) return launch_in_order<F32, F32, Out>(v, a, how);
    if (y32) return launch_in_order<F32, Out, Out>(v, a, how);
    if (wire32) return launch_in_order<Out, F32, Out>(v, a, how);
    return launch_in_order<Out, Out, Out>(v, a, how);
}

}  // namespace

cudaError_t launch_combine(const View& v, const CombineArgs& a, const Launch& how) {
    switch (a.out_type) {
        case DType::kF32:
            return launch_in_order<F32, F32, F32>(v, a, how);
        case DType::kF16:
            return launch_as<F16>(v, a, how);
        default:
            return launch_as<BF16>(v, a, how);
    }
}

int combine_blocks_per_sm() {
    return std::min(resident_blocks(combine_kernel<F32, F32, BF16, false, false>),
                    resident_blocks(combine_kernel<F32, F32, BF16, false, true>));
}

}  // namespace ep::cuda
