// An exchange whose rows have come by another one, in one launch: weights out, then the weighted sums of what
// this rank's experts made of those rows, and the sum of what all ranks return. Weights travel as words that
// say themselves that they have come (make_ask): no fence and no flag. What returns is a combine. See
// exchange.cuh.
#include "combine.cuh"
#include "dispatch.cuh"
#include "launch.h"

namespace ep::cuda {
namespace {

// Tokens and the part of a row that a chunk covers.
struct Part {
    int first;
    Units piece;
    bool sends;  // the first segment of its tokens: weights go with that
};
__device__ Part part_of(const Plan& plan, int hidden, int chunk) {
    const int token_chunk = plan.per_segments.divide(chunk);
    const int segment = chunk - token_chunk * plan.segments;
    return {token_chunk * plan.tokens_per_chunk, units_of_segment(hidden, segment, plan), segment == 0};
}

// The k-th choice of an own token; none behind the last token.
template <class Id>
__device__ Meta load_choice(const View& v, const DispatchArgs& a, int64_t token, int k) {
    return token < a.tokens && k < v.top_k ? load_meta<Id>(v, a, token, k) : Meta{-1, 0.0f};
}
// The id alone, by a whole warp for route_of.
template <class Id>
__device__ int load_id(const View& v, const DispatchArgs& a, int64_t token) {
    const int k = static_cast<int>(threadIdx.x) % 32;
    const auto* const ids = static_cast<const Id*>(a.ids);
    return token < a.tokens && k < v.top_k ? static_cast<int>(ids[token * v.top_k + k]) : -1;
}

// The words of a chunk's slots, those without a token too: nobody has to know how many there are. 16 threads
// take a slot. `choice`: this thread's in its first slot, if it is `loaded`.
template <class Id>
__device__ void send_words(const View& v, const State& state, const DispatchArgs& a, uint64_t epoch,
                           const Part& part, bool loaded, Meta choice) {
    const int width = min(a.plan.tokens_per_chunk, a.plan.slots - part.first);
    const int first = static_cast<int>(threadIdx.x) / 16, k = static_cast<int>(threadIdx.x) % 16;
    for (int t = first; t < width; t += kThreads / 16) {
        if (!loaded || t != first) choice = load_choice<Id>(v, a, part.first + t, k);
        if (k >= v.top_k) continue;
        const int owner = choice.id >= 0 && choice.id < v.experts ? rank_of(v, choice.id) : -1;
        const int64_t at = v.layout.weight_words(v.channel, v.rank, part.first + t) + 8 * k;
#pragma unroll 1
        for (int n = 1; n <= v.world; ++n)
            if (const int d = hop(v, n); !state.masked(d))
                ptx::store_flag(v.windows[d] + at,
                                make_ask(epoch, d == owner, __float_as_uint(choice.weight)));
    }
}

// For the kernel of combine's second half.
template <class Id>
__device__ void store_routes(const View& v, const State& state, const DispatchArgs& a, const Part& part) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int count = min(a.plan.tokens_per_chunk, a.tokens - part.first);
    for (int t = warp; t < count; t += kWarps) {
        const int64_t token = part.first + t;
        const RankSet route = route_of(v, state, load_id<Id>(v, a, token));
        store_route(v, token, route, lane);
    }
}

// One lane waits for one word. False after a failure. kPassed: the next epoch will do.
template <bool kPassed = false>
__device__ bool wait_word(const View& v, uint64_t epoch, int source, int64_t at, uint64_t& word) {
    const char* const from = inbox(v, source) + at;
    uint64_t start = 0;
    for (int spins = 1;; ++spins) {
        word = ptx::load_relaxed(from);
        if (ask_is_of(word, epoch) || (kPassed && ask_is_of(word, next_epoch(epoch)))) return true;
        // No word can be further ahead: its source lacks flags of this rank.
        if (spins % 64 == 0 &&
            !may_wait_on(v, Phase::kDispatch, epoch, source, make_word(epoch - 1, 0), &start))
            return false;
    }
}

// T as a word of its own: ranks with different ones would wait for words that nobody sends. A thread asks a
// source. Those with the least T find all the words that they wait for, so they come to ask and stop all
// (not where a larger T makes it an exchange of rows: nobody's words come then, and all time out). A
// source that has gone on to the next exchange has asked before: it had the same T, else it would have
// stopped.
__device__ inline void send_slots(const View& v, const State& state, const Plan& plan, uint64_t epoch) {
    for (int d = threadIdx.x; d < v.world; d += kThreads)
        if (!state.masked(d))
            ptx::store_flag(v.windows[d] + v.layout.slots_word(v.channel, v.rank),
                            make_ask(epoch, false, static_cast<uint32_t>(plan.slots)));
}
__device__ inline void receive_slots(const View& v, const State& state, const Plan& plan, uint64_t epoch) {
    for (int source = threadIdx.x; source < v.world; source += kThreads) {
        uint64_t word = 0;
        if (!state.masked(source) &&
            wait_word<true>(v, epoch, source, v.layout.slots_word(v.channel, source), word) &&
            ask_is_of(word, epoch))
            check_slots(v, plan, source, ask_low(word), epoch);
    }
}

// A row that a group of warps returns, and what it loads of it before the weights have come.
template <class T>
struct Answer {
    bool inside;  // the last chunk may be narrower
    int source, t;
    int64_t slot;
    Placed mine;
    const char* first_rows[kPlacedRows];  // found once, not in each turn over their columns
    PlacedWords<T> words;

    __device__ void load(const CombineArgs& a, int unit, int step, int end) {
        auto known = [&](int i, unsigned) { return first_rows[i]; };
        load_results(a, mine.live, known, unit, step, end, words);
    }
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
    unsigned live = row.mine.live;
#pragma unroll
    for (int i = 0; i < kPlacedRows; ++i, live &= live - 1)
        if (live != 0) row.first_rows[i] = find_row<T>(a, row.mine, live);
}

// `row`: the first of this warp, if it is `loaded`. The warp's answer: false after a failure.
template <class T>
__device__ bool answer(const View& v, const State& state, const CombineArgs& a, uint64_t epoch,
                       const Part& part, bool loaded, Answer<T>& row) {
    const int lane = threadIdx.x % 32;
    const auto [group, groups, place, step] = Groups::of_block(a.warps_per_row);
    const int begin = part.piece.begin + place - lane;
    for (int number = group; number < v.world * a.plan.tokens_per_chunk; number += groups) {
        const bool ahead = loaded && number == group;
        if (!ahead) find_answer(v, a, part, number, row);
        if (!row.inside || state.masked(row.source)) continue;
        uint64_t word = 0;
        bool came = true;
        if (lane < v.top_k) {
            const int64_t at = v.layout.weight_words(v.channel, row.source, part.first + row.t) + 8 * lane;
            came = wait_word(v, epoch, row.source, at, word);
        }
        if (!__all_sync(kAll, came)) return false;
        if (!__any_sync(kAll, ask_is_mine(word))) continue;
        const float weight = __uint_as_float(ask_low(word));
        char* const to = outbox(v, row.source) + v.layout.combine_row(v.channel, v.rank, part.first + row.t);
        for (int base = begin; base < part.piece.end; base += step * kPlacedUnits<T>) {
            if (!ahead || base != begin) row.load(a, base + lane, step, part.piece.end);
            store_placed_sum<T, T>(a, row.mine, weight, base + lane, step, part.piece.end, row.words, to);
        }
    }
    return true;
}

template <class Id, class T>
__global__ void __launch_bounds__(kThreads, 2)
    sums_kernel(const __grid_constant__ View v, const __grid_constant__ SumsArgs a) {
    __shared__ int counts[kMaxWorld];
    const Plan& plan = a.ask.plan;
    const int chunks = plan.chunks(), first = static_cast<int>(blockIdx.x),
              step = static_cast<int>(gridDim.x);
    const Groups answerers = Groups::of_block(a.answer.warps_per_row);
    const int reducer = Groups::of_block(plan.warps_per_token).group;
    const Part first_part = part_of(plan, a.answer.hidden, first);
    Meta choice{-1, 0.0f};  // that this thread sends first
    int id = -1;            // of the first token that this warp reduces
    Answer<T> row;
    touch(v, a);
    ptx::wait_for_previous_kernel();
    // Everything that the first chunk needs is asked for at once.
    const State state = load_state(v);
    if (first_part.sends)
        choice = load_choice<Id>(v, a.ask, first_part.first + static_cast<int>(threadIdx.x) / 16,
                                 static_cast<int>(threadIdx.x) % 16);
    if (a.answer.receive) id = load_id<Id>(v, a.ask, first_part.first + reducer);
    find_answer(v, a.answer, first_part, answerers.group, row);
    const uint64_t epoch = next_epoch(state.epoch);
    bool alive = begin(state);
    if (alive && state.stage != Stage::kIdle) alive = close_open_exchange(v, state);
    if (alive && row.inside)
        row.load(a.answer, first_part.piece.begin + answerers.place, answerers.step, first_part.piece.end);
    if (alive && first == 0) send_slots(v, state, plan, epoch);
    for (int chunk = first; chunk < chunks && alive; chunk += step) {
        const Part part = part_of(plan, a.answer.hidden, chunk);
        if (!part.sends) continue;
        send_words<Id>(v, state, a.ask, epoch, part, chunk == first, choice);
        if (!a.answer.receive) store_routes<Id>(v, state, a.ask, part);
    }
    for (int chunk = first; chunk < chunks && alive; chunk += step) {
        const Part part = part_of(plan, a.answer.hidden, chunk);
        const bool answered = answer(v, state, a.answer, epoch, part, chunk == first, row);
        alive = __syncthreads_and(answered) != 0;
        if (alive && threadIdx.x < 32) flag_chunk_warp(v, state, Phase::kCombine, epoch, chunk, 0, to_all(v));
        // Behind the flag, for which peers wait.
        if (alive && chunk == 0) receive_slots(v, state, plan, epoch);
    }
    leave(v, alive && first != 0, [&](DeviceWord& w) {
        w.epoch = epoch;
        w.tokens = a.ask.tokens;
        w.chunks = static_cast<uint32_t>(chunks);
        w.stage = a.answer.receive ? Stage::kIdle : Stage::kReturned;
        // Some block has seen each word of each source: every peer has read what that exchange brought, as
        // its words leave behind.
        if (a.ended && a.ended->stage == Stage::kReceived) a.ended->stage = Stage::kIdle;
    });
    if (!a.answer.receive) return;
    for (int chunk = first; chunk < chunks && alive; chunk += step) {
        const Part part = part_of(plan, a.answer.hidden, chunk);
        // From the ids: with segments it is another block that sends them, and nothing waits for that one.
        if (chunk != first) id = load_id<Id>(v, a.ask, part.first + reducer);
        const RankSet route = route_of(v, state, id);
        if (wait_chunk(v, state, Phase::kCombine, epoch, chunk, counts, kClosed))
            reduce_chunk<T, T, T, true>(v, a.answer, chunk, a.ask.tokens, route, [&](int64_t token) {
                return route_of(v, state, load_id<Id>(v, a.ask, token));
            });
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
