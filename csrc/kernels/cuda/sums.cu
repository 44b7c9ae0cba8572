// An exchange whose rows have come by another one, in one launch: ids and weights out, then the weighted sums
// of what this rank's experts made of those rows, and the sum of what all ranks return. To the peers it is a
// dispatch and a combine. See exchange.cuh.
#include "combine.cuh"
#include "dispatch.cuh"
#include "launch.h"

namespace ep::cuda {
namespace {

// Tokens and the part of a row that a chunk covers.
struct Part {
    int chunk_of_ids, first;
    Units piece;
};
__device__ Part part_of(const Plan& plan, int hidden, int chunk) {
    const int token_chunk = plan.per_segments.divide(chunk), first_segment = token_chunk * plan.segments;
    return {first_segment, token_chunk * plan.tokens_per_chunk,
            units_of_segment(hidden, chunk - first_segment, plan.segments)};
}

// What a thread needs first of its own tokens in a chunk: of `meta` the ids and weights that it sends, and
// `id` of the first token whose ranks its warp finds.
struct Asked {
    int first, count;
    Meta meta;
    int id;
};
__device__ Asked asked_of(const Plan& plan, int tokens, const Part& part) {
    return {part.first, max(0, min(plan.tokens_per_chunk, tokens - part.first)), {}, -1};
}
template <class Id>
__device__ int load_id(const View& v, const DispatchArgs& a, int64_t token) {
    const int k = static_cast<int>(threadIdx.x) % 32;
    return k < v.top_k ? static_cast<int>(static_cast<const Id*>(a.ids)[token * v.top_k + k]) : -1;
}
template <class Id>
__device__ void load_asked(const View& v, const DispatchArgs& a, Asked& asked) {
    const int warp = threadIdx.x / 32;
    if (static_cast<int>(threadIdx.x) < asked.count * v.top_k)
        asked.meta = load_meta<Id>(v, a, asked.first, static_cast<int>(threadIdx.x));
    if (warp < asked.count) asked.id = load_id<Id>(v, a, asked.first + warp);
}

// Ids and weights go with the first segment of their tokens; the chunks of the others are flags alone.
template <class Id>
__device__ void send_ids(const View& v, const State& state, const DispatchArgs& a, uint64_t epoch, int chunk,
                         bool has_ids, const Asked& asked) {
    const Plan& plan = a.plan;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (has_ids) {
        send_meta<Id>(v, state, a, static_cast<int64_t>(v.rank) * plan.slots + asked.first, asked.first,
                      asked.count, asked.meta, to_all(v), threadIdx.x, kThreads);
        for (int t = warp; t < asked.count; t += kWarps) {
            const int64_t token = asked.first + t;
            const RankSet route = route_of(v, state, t == warp ? asked.id : load_id<Id>(v, a, token));
            store_route(v, token, route, lane);
        }
    }
    if (chunk == 0) send_headers(v, state, plan, a.tokens, to_all(v), threadIdx.x, kThreads);
    flag_chunk(v, state, Phase::kDispatch, epoch, chunk, static_cast<uint32_t>(asked.count), to_all(v));
}

// A row that a group of warps returns, and what it loads of it before the weights have come.
template <class T>
struct Answer {
    bool inside;  // the last chunk may be narrower
    int source, t;
    int64_t slot;
    Placed mine;
    PlacedWords<T> words;
};
template <class T>
__device__ void find_answer(const View& v, const CombineArgs& a, const Part& part, int number,
                            Answer<T>& row) {
    const Plan& plan = a.plan;
    const int turn = plan.per_chunk.divide(number);
    row.t = number - turn * plan.tokens_per_chunk;
    row.inside = turn < v.world && row.t < min(plan.tokens_per_chunk, plan.slots - part.first);
    if (!row.inside) return;
    row.source = hop(v, turn + 1);
    row.slot = static_cast<int64_t>(row.source) * plan.slots + part.first + row.t;
    row.mine = load_placed(a, row.slot, v.top_k);
}

// `counts`: how many tokens of the chunk each source has. `row`: the first of this warp, if it is `loaded`.
template <class T>
__device__ void answer(const View& v, const State& state, const CombineArgs& a, const Part& part,
                       const int* counts, bool loaded, Answer<T>& row) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int group = warp / a.warps_per_row, groups = kWarps / a.warps_per_row;
    const int step = a.warps_per_row * 32, begin = part.piece.begin + warp % a.warps_per_row * 32;
    for (int number = group; number < v.world * a.plan.tokens_per_chunk; number += groups) {
        const bool ahead = loaded && number == group;
        if (!ahead) find_answer(v, a, part, number, row);
        // A peer with another T may say more than there is room for.
        if (!row.inside || row.t >= counts[row.source] || state.masked(row.source)) continue;
        const char* const from = inbox(v, row.source);
        const auto* ids = reinterpret_cast<const int32_t*>(from + v.layout.id_row(v.channel, row.slot));
        const auto* weights = reinterpret_cast<const float*>(from + v.layout.weight_row(v.channel, row.slot));
        const int id = lane < v.top_k ? ids[lane] : -1;
        const float weight = lane < v.top_k ? weights[lane] : 0.0f;
        if (!__any_sync(kAll, is_local(v, id))) continue;
        char* const to = outbox(v, row.source) + v.layout.combine_row(v.channel, v.rank, part.first + row.t);
        for (int base = begin; base < part.piece.end; base += step * kPlacedUnits<T>) {
            if (!ahead || base != begin)
                load_results(a, row.mine, row.mine.live, base + lane, step, part.piece.end, row.words);
            store_placed_sum<T, T>(a, row.mine, weight, base + lane, step, part.piece.end, row.words, to);
        }
    }
}

template <class Id, class T>
__global__ void __launch_bounds__(kThreads, 2)
    sums_kernel(const __grid_constant__ View v, const __grid_constant__ SumsArgs a) {
    __shared__ int counts[kMaxWorld];
    const Plan& plan = a.ask.plan;
    const int chunks = plan.chunks(), first = static_cast<int>(blockIdx.x),
              step = static_cast<int>(gridDim.x);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int in_row = a.answer.warps_per_row;
    const Part first_part = part_of(plan, a.answer.hidden, first);
    Asked asked = asked_of(plan, a.ask.tokens, first_part);
    Answer<T> row;
    touch(v, a);
    ptx::wait_for_previous_kernel();
    // Everything that the first chunk needs is asked for at once.
    const State state = load_state(v);
    if (first_part.chunk_of_ids == first) load_asked<Id>(v, a.ask, asked);
    find_answer(v, a.answer, first_part, warp / in_row, row);
    const uint64_t epoch = next_epoch(state.epoch);
    bool alive = begin(state);
    if (alive && state.stage != Stage::kIdle) alive = close_open_exchange(v, state);
    if (alive && row.inside)
        load_results(a.answer, row.mine, row.mine.live, first_part.piece.begin + warp % in_row * 32 + lane,
                     in_row * 32, first_part.piece.end, row.words);
    for (int chunk = first; chunk < chunks && alive; chunk += step) {
        const Part part = part_of(plan, a.answer.hidden, chunk);
        const bool has_ids = part.chunk_of_ids == chunk;
        if (chunk != first) {
            asked = asked_of(plan, a.ask.tokens, part);
            if (has_ids) load_asked<Id>(v, a.ask, asked);
        }
        send_ids<Id>(v, state, a.ask, epoch, chunk, has_ids, asked);
    }
    for (int chunk = first; chunk < chunks && alive; chunk += step) {
        const Part part = part_of(plan, a.answer.hidden, chunk);
        alive = wait_chunk(v, state, Phase::kDispatch, epoch, part.chunk_of_ids, counts);
        if (!alive) break;
        if (chunk == 0) {
            const bool agree = receive_headers(v, state, plan, nullptr, epoch, threadIdx.x, kThreads);
            alive = __syncthreads_and(agree) != 0;
            if (!alive) break;
        }
        answer(v, state, a.answer, part, counts, chunk == first, row);
        flag_chunk(v, state, Phase::kCombine, epoch, chunk, 0, to_all(v));
    }
    leave(v, alive, [&](DeviceWord& w) {
        w.epoch = epoch;
        w.tokens = a.ask.tokens;
        w.chunks = static_cast<uint32_t>(chunks);
        w.stage = a.answer.receive ? Stage::kIdle : Stage::kReturned;
        // All blocks have seen all flags: every peer has read what that exchange brought, as its ids and
        // weights come behind.
        if (a.ended && a.ended->stage == Stage::kReceived) a.ended->stage = Stage::kIdle;
    });
    if (!a.answer.receive) return;
    for (int chunk = first; chunk < chunks && alive; chunk += step) {
        const int token = part_of(plan, a.answer.hidden, chunk).first + warp / plan.warps_per_token;
        RankSet route{};
        if (token < a.ask.tokens) route = load_route(v, token);
        if (wait_chunk(v, state, Phase::kCombine, epoch, chunk, counts, kClosed))
            reduce_chunk<T, T, T, true>(v, a.answer, chunk, a.ask.tokens, route);
        else
            alive = closed_by_peer(v, counts, threadIdx.x == 0);
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
