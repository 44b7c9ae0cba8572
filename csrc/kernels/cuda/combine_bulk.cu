// Combine of many tokens in one launch, for rows that travel as they are. Copying warps send chunk after
// chunk; the others reduce the chunks as they arrive. See bulk.cuh.
#include "bulk.cuh"
#include "combine.cuh"
#include "launch.h"

namespace ep::cuda {
namespace {

[[maybe_unused]] constexpr int kReduceWarps = kBulkWarps - kCopyWarps;
[[maybe_unused]] constexpr int kParts = 2;  // of a row: a warp each

template <class Wire, class Out>
__global__ void __launch_bounds__(kBulkThreads, 2)
    combine_bulk_kernel(const __grid_constant__ View v, const __grid_constant__ CombineArgs a) {
#ifdef EP_BULK
    extern __shared__ __align__(128) char memory[];
    __shared__ uint64_t barriers[kCopyWarps][kSlots];
    __shared__ uint32_t lives[kCopyWarps][kMaxWorld];
    __shared__ int counts[kReduceWarps][kMaxWorld];
    __shared__ int turns[kCopyWarps];
    // Exchanges of many tokens, one behind the other, are faster if more than one kernel waits.
    if (ptx::load_fresh_word(v.early) == static_cast<uint32_t>(Early::kAny)) ptx::let_next_kernel_start();
    touch(v, a);
    const Plan& plan = a.plan;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, chunks = plan.chunks();
    Ring ring;
    if (warp < kCopyWarps && lane == 0) ring.init(memory + warp * kSlots * kPieceBytes, barriers[warp]);
    ptx::wait_for_previous_kernel();

    const State state = load_state(v);
    bool alive = begin(state);
    if (warp < kCopyWarps) {
        ptx::fence_async_global();
        const int row_bytes = static_cast<int>(v.layout.shape.wire_bytes);
        const Pieces pieces(row_bytes);
        // A group of warps sends a chunk; the groups of a block take turns.
        const int size = plan.warps_per_token, group = warp / size, place = warp % size;
        uint32_t* const live = lives[group];  // per source, tokens of the chunk that have a row here
        while (a.send && alive) {
            if (place == 0 && lane == 0) turns[group] = static_cast<int>(atomicAdd(&v.word->sends, 1u));
            ptx::some_warps_sync(1 + group, size * 32);
            const int chunk = turns[group];
            if (chunk >= chunks) break;
            const int first = chunk * plan.tokens_per_chunk;
            const int width = min(plan.tokens_per_chunk, plan.slots - first);
            for (int source = place; source < v.world; source += size) {
                // The flag of the dispatch still says how many tokens of the chunk are live.
                const uint64_t flag =
                    ptx::load_relaxed(own(v) + v.layout.dispatch_flag(v.channel, source, chunk));
                const int64_t slot = static_cast<int64_t>(source) * plan.slots + first + lane;
                const auto* ids = reinterpret_cast<const int32_t*>(own(v) + v.layout.id_row(v.channel, slot));
                bool any = false;
                if (lane < width)
                    for (int k = 0; k < v.top_k; k += kIdsAhead) {
                        int id[kIdsAhead];
#pragma unroll
                        for (int i = 0; i < kIdsAhead; ++i) id[i] = k + i < v.top_k ? ids[k + i] : -1;
#pragma unroll
                        for (int i = 0; i < kIdsAhead; ++i) any |= is_local(v, id[i]);
                    }
                const uint32_t bits = __ballot_sync(kAll, any && lane < static_cast<int>(word_low(flag)));
                if (lane == 0)
                    live[source] = state.masked(source) || (a.receive && source == v.rank) ? 0 : bits;
            }
            __syncwarp();
            ptx::some_warps_sync(1 + group, size * 32);
            // Token by token, each to all its sources, so that the links to all ranks are busy.
            struct Where {
                int source, t, piece;
            };
            auto where = [&](int u) {
                const int row = u / pieces.count, t = row / v.world, source = v.rank + 1 + row - t * v.world;
                return Where{source < v.world ? source : source - v.world, t, u - row * pieces.count};
            };
            if (lane == 0)
                pump(
                    ring, width * v.world * pieces.count, place, size,
                    [&](int u, int& bytes) -> const char* {
                        const Where w = where(u);
                        bytes = pieces.size(w.piece);
                        const int64_t slot = static_cast<int64_t>(w.source) * plan.slots + first + w.t;
                        return live[w.source] >> w.t & 1 ? a.y + slot * row_bytes + w.piece * pieces.bytes
                                                         : nullptr;
                    },
                    [&](int u, const char* from, int bytes) {
                        const Where w = where(u);
                        ptx::bulk_store(
                            v.windows[w.source] +
                                v.layout.combine_row(v.channel, source_for(v, w.source), first + w.t) +
                                w.piece * pieces.bytes,
                            from, bytes);
                    });
            __syncwarp();
            ptx::some_warps_sync(1 + group, size * 32);
            if (place == 0) flag_chunk_warp(v, state, Phase::kCombine, state.epoch, chunk, 0, to_all(v));
        }
    } else if (a.receive) {
        // A piece of a token at a time, in the order in which chunks are sent.
        int* const count = counts[warp - kCopyWarps];
        const int eighths = units_of(a.hidden), units = plan.tokens_per_chunk * kParts;
        auto take = [&] { return lane == 0 ? static_cast<int>(atomicAdd(&v.word->sums, 1u)) : 0; };
        int seen = -1, next = take();
        bool lost = false;
        while (alive) {
            const int item = __shfl_sync(kAll, next, 0), chunk = item / units;
            if (chunk >= chunks) break;
            next = take();
            const int unit = item - chunk * units, part = unit % kParts;
            const int token = chunk * plan.tokens_per_chunk + unit / kParts;
            const RankSet route = token < state.tokens ? load_route(v, token) : RankSet{};
            if (chunk != seen) {
                lost = !wait_chunk_warp(v, state, Phase::kCombine, state.epoch, chunk, count, kClosed);
                __syncwarp();
                if (lost) alive = closed_by_peer(v, count, lane == 0);
                seen = chunk;
            }
            if (!alive || lost || token >= state.tokens) continue;
            const char* mine = nullptr;
            if (a.send)
                mine = a.y + (static_cast<int64_t>(v.rank) * plan.slots + token) * v.layout.shape.wire_bytes;
            reduce_row<Wire, Out, 8, false>(v, a, token, route, mine, eighths * part / kParts + lane, 32,
                                            eighths * (part + 1) / kParts);
            __syncwarp();
        }
    }
    __syncthreads();
    leave(v, false, [&](DeviceWord& w) { w.stage = a.receive ? Stage::kIdle : Stage::kReturned; });
#endif
}

}  // namespace

// Rows are copied as they are: y must have the type of the wire.
cudaError_t launch_combine_bulk(const View& v, const CombineArgs& a, Launch how) {
    how.threads = kBulkThreads;
    how.shared_bytes = kRingBytes;
    const bool wire32 = a.wire == DType::kF32;
    switch (a.out_type) {
        case DType::kF32:
            return launch(combine_bulk_kernel<F32, F32>, how, v, a);
        case DType::kF16:
            return wire32 ? launch(combine_bulk_kernel<F32, F16>, how, v, a)
                          : launch(combine_bulk_kernel<F16, F16>, how, v, a);
        default:
            return wire32 ? launch(combine_bulk_kernel<F32, BF16>, how, v, a)
                          : launch(combine_bulk_kernel<BF16, BF16>, how, v, a);
    }
}

int combine_bulk_blocks_per_sm() {
    int least = 1 << 30;
    auto count = [&](auto kernel) {
        least = std::min(least, resident_blocks(kernel, kBulkThreads, kRingBytes));
    };
    count(combine_bulk_kernel<F32, F32>), count(combine_bulk_kernel<F32, F16>);
    count(combine_bulk_kernel<F16, F16>), count(combine_bulk_kernel<F32, BF16>);
    count(combine_bulk_kernel<BF16, BF16>);
    return least;
}

}  // namespace ep::cuda
