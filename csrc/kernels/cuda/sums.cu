// An exchange whose rows have come by another one, in one launch: ids and weights out, then the weighted sums
// of what this rank's experts made of those rows, and the sum of what all ranks return. To the peers it is a
// dispatch and a combine. See exchange.cuh.
#include "combine.cuh"
#include "dispatch.cuh"
#include "launch.h"

namespace ep::cuda {
namespace {

// Tokens and the part of a row that a chunk covers; the latter in units of eight elements.
struct Part {
    int chunk_of_ids, first, begin, end;
};
__device__ Part part_of(const Plan& plan, int hidden, int chunk) {
    const int token_chunk = plan.per_segments.divide(chunk), units = units_of(hidden);
    const int segment = chunk - token_chunk * plan.segments;
    return {token_chunk * plan.segments, token_chunk * plan.tokens_per_chunk, units * segment / plan.segments,
            units * (segment + 1) / plan.segments};
}

// Ids and weights go with the first segment of their tokens; the chunks of the others are flags alone.
template <class Id>
__device__ void send_ids(const View& v, const State& state, const DispatchArgs& a, uint64_t epoch,
                         int chunk) {
    const Plan& plan = a.plan;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int token_chunk = plan.per_segments.divide(chunk), first = token_chunk * plan.tokens_per_chunk;
    const int count = max(0, min(plan.tokens_per_chunk, a.tokens - first));
    if (chunk == token_chunk * plan.segments) {
        Meta meta{};
        if (threadIdx.x < count * v.top_k) meta = load_meta<Id>(v, a, first, threadIdx.x);
        send_meta<Id>(v, state, a, static_cast<int64_t>(v.rank) * plan.slots + first, first, count, meta,
                      to_all(v), threadIdx.x, kThreads);
        for (int t = warp; t < count; t += kWarps) {
            const int64_t token = first + t;
            const int id =
                lane < v.top_k ? static_cast<int>(static_cast<const Id*>(a.ids)[token * v.top_k + lane]) : -1;
            const RankSet route = route_of(v, state, id);
            if (lane < kRouteWords)
                v.routes[token * kRouteWords + lane] = lane == 0 ? route.a : lane == 1 ? route.b : route.c;
        }
    }
    if (chunk == 0)
        for (int d = threadIdx.x; d < v.world; d += kThreads)
            if (!state.masked(d))
                *reinterpret_cast<SourceHeader*>(v.windows[d] + v.layout.header(v.channel, v.rank)) = {
                    static_cast<uint32_t>(a.tokens), static_cast<uint32_t>(plan.slots)};
    flag_chunk(v, state, Phase::kDispatch, epoch, chunk, static_cast<uint32_t>(count), to_all(v));
}

// `counts`: how many tokens of the chunk each source has.
template <class T>
__device__ void answer(const View& v, const State& state, const CombineArgs& a, const Part& part,
                       const int* counts) {
    const Plan& plan = a.plan;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int groups = kWarps / a.warps_per_row, step = a.warps_per_row * 32;
    const int width = min(plan.tokens_per_chunk, plan.slots - part.first);
    for (int unit = warp / a.warps_per_row; unit < v.world * plan.tokens_per_chunk; unit += groups) {
        const int turn = plan.per_chunk.divide(unit), t = unit - turn * plan.tokens_per_chunk;
        const int source = hop(v, turn + 1);
        // A peer with another T may say more than there is room for.
        if (t >= min(counts[source], width) || state.masked(source)) continue;
        const int64_t slot = static_cast<int64_t>(source) * plan.slots + part.first + t;
        const char* const from = inbox(v, source);
        const auto* ids = reinterpret_cast<const int32_t*>(from + v.layout.id_row(v.channel, slot));
        if (!__any_sync(kAll, is_local(v, lane < v.top_k ? ids[lane] : -1))) continue;
        const Placed mine = load_placed(
            a, slot, reinterpret_cast<const float*>(from + v.layout.weight_row(v.channel, slot)), v.top_k);
        char* const to = outbox(v, source) + v.layout.combine_row(v.channel, v.rank, part.first + t);
        for (int base = part.begin + warp % a.warps_per_row * 32; base < part.end; base += step)
            store_placed_sum<T, T>(a, mine, v.top_k, base + lane, part.end, to);
    }
}

template <class Id, class T>
__global__ void __launch_bounds__(kThreads, 2)
    sums_kernel(const __grid_constant__ View v, const __grid_constant__ SumsArgs a) {
    __shared__ int counts[kMaxWorld];
    ptx::let_next_kernel_start();
    const Plan& plan = a.ask.plan;
    const int chunks = plan.chunks(), first = static_cast<int>(blockIdx.x),
              step = static_cast<int>(gridDim.x);
    touch(v, a);
    ptx::wait_for_previous_kernel();
    const State state = load_state(v);
    const uint64_t epoch = next_epoch(state.epoch);
    bool alive =
        __syncthreads_or(state.stopped) == 0;  // one answer for the block: a failure may come just now
    if (alive && state.stage != Stage::kIdle) alive = close_open_exchange(v, state);
    for (int chunk = first; chunk < chunks && alive; chunk += step)
        send_ids<Id>(v, state, a.ask, epoch, chunk);
    for (int chunk = first; chunk < chunks && alive; chunk += step) {
        const Part part = part_of(plan, a.answer.hidden, chunk);
        alive = wait_chunk(v, state, Phase::kDispatch, epoch, part.chunk_of_ids, counts);
        if (!alive) break;
        if (chunk == 0) {
            const bool agree = receive_headers(v, state, plan, nullptr, epoch, threadIdx.x, kThreads);
            alive = __syncthreads_and(agree) != 0;
            if (!alive) break;
        }
        answer<T>(v, state, a.answer, part, counts);
        flag_chunk(v, state, Phase::kCombine, epoch, chunk, 0, to_all(v));
    }
    leave(v, alive, [&](DeviceWord& w) {
        w.epoch = epoch;
        w.tokens = a.ask.tokens;
        w.chunks = static_cast<uint32_t>(chunks);
        w.stage = a.answer.receive ? Stage::kIdle : Stage::kReturned;
    });
    if (!a.answer.receive) return;
    const int warp = threadIdx.x / 32, wide = plan.warps_per_token;
    for (int chunk = first; chunk < chunks && alive; chunk += step) {
        const Part part = part_of(plan, a.answer.hidden, chunk);
        if (!wait_chunk(v, state, Phase::kCombine, epoch, chunk, counts, kClosed)) {
            alive = closed_by_peer(v, counts, threadIdx.x == 0);
        } else {
            const int count = min(plan.tokens_per_chunk, a.ask.tokens - part.first);
            for (int t = warp / wide; t < count; t += kWarps / wide) {
                const int64_t token = part.first + t;
                reduce_row<T, T, kReduceLoads, true>(v, a.answer, token, load_route(v, token), nullptr,
                                                     part.begin + warp % wide * 32 + threadIdx.x % 32,
                                                     wide * 32, part.end);
            }
        }
        __syncthreads();  // counts are used again
    }
}

template <class Id>
cudaError_t launch_with_id(const View& v, const SumsArgs& a, const Launch& how) {
    switch (a.answer.wire) {
        case DType::kF32:
            return launch(sums_kernel<Id, F32>, how, v, a);
        case DType::kF16:
            return launch(sums_kernel<Id, F16>, how, v, a);
        default:
            return launch(sums_kernel<Id, BF16>, how, v, a);
    }
}

}  // namespace

cudaError_t launch_sums(const View& v, const SumsArgs& a, const Launch& how) {
    return a.ask.ids_are_64_bit ? launch_with_id<int64_t>(v, a, how) : launch_with_id<int32_t>(v, a, how);
}

int sums_blocks_per_sm() {
    return resident_blocks(sums_kernel<int64_t, F32>);
}

}  // namespace ep::cuda
