// Combine of many tokens in one launch, for rows that travel as they are. Copying warps send chunk after
// chunk; the others reduce the chunks as they arrive. See bulk.cuh.
#include "bulk.cuh"
#include "combine.cuh"
#include "launch.h"

namespace ep::cuda {
namespace {

constexpr int kReduceWarps = kBulkWarps - kCopyWarps;
constexpr int kParts = 2;  // of a row: a warp each

template <class Wire, class Out>
__global__ void __launch_bounds__(kBulkThreads, 2)
    combine_bulk_kernel(const __grid_constant__ View v, const __grid_constant__ CombineArgs a) {
#ifdef EP_BULK
    extern __shared__ __align__(128) char memory[];
    __shared__ uint64_t barriers[kCopyWarps][kSlots];
    __shared__ uint32_t live[kMaxWorld];  // per source, tokens of the chunk that have a row here
    __shared__ int counts[kReduceWarps][kMaxWorld];
    ptx::let_next_kernel_start();
    touch(v, a);
    const Plan& plan = a.plan;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, chunks = plan.chunks();
    Ring ring;
    if (warp < kCopyWarps && lane == 0) ring.init(memory + warp * kSlots * kPieceBytes, barriers[warp]);
    ptx::wait_for_previous_kernel();

    const State state = load_state(v);
    bool alive = !state.stopped;
    if (warp < kCopyWarps) {
        ptx::fence_async_global();
        const int row_bytes = static_cast<int>(v.layout.shape.wire_bytes);
        const Pieces pieces(row_bytes);
        for (int chunk = blockIdx.x; a.send && alive && chunk < chunks; chunk += gridDim.x) {
            const int first = chunk * plan.tokens_per_chunk;
            const int width = min(plan.tokens_per_chunk, plan.slots - first);
            for (int source = warp; source < v.world; source += kCopyWarps) {
                // The flag of the dispatch still says how many tokens of the chunk are live.
                const uint64_t flag =
                    ptx::load_relaxed(own(v) + v.layout.dispatch_flag(v.channel, source, chunk));
                const int64_t slot = static_cast<int64_t>(source) * plan.slots + first + lane;
                const auto* ids = reinterpret_cast<const int32_t*>(own(v) + v.layout.id_row(v.channel, slot));
                bool any = false;
                if (lane < width)
                    for (int k = 0; k < v.top_k; ++k) any |= is_local(v, ids[k]);
                const uint32_t bits = __ballot_sync(kAll, any && lane < static_cast<int>(word_low(flag)));
                if (lane == 0) live[source] = state.masked(source) ? 0 : bits;
            }
            __syncwarp();
            ptx::some_warps_sync(1, kCopyWarps * 32);
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
                    ring, width * v.world * pieces.count, warp, kCopyWarps,
                    [&](int u, int& bytes) -> const char* {
                        const Where w = where(u);
                        bytes = pieces.size(w.piece);
                        const int64_t slot = static_cast<int64_t>(w.source) * plan.slots + first + w.t;
                        return live[w.source] >> w.t & 1 ? a.y + slot * row_bytes + w.piece * pieces.bytes
                                                         : nullptr;
                    },
                    [&](int u, const char* from, int bytes) {
                        const Where w = where(u);
                        ptx::bulk_store(v.windows[w.source] +
                                            v.layout.combine_row(v.channel, v.rank, first + w.t) +
                                            w.piece * pieces.bytes,
                                        from, bytes);
                    });
            __syncwarp();
            ptx::some_warps_sync(1, kCopyWarps * 32);
            if (warp == 0) flag_chunk_warp(v, state, Phase::kCombine, state.epoch, chunk, 0);
        }
    } else if (a.receive) {
        const int turn = warp - kCopyWarps;
        const int eighths = a.hidden / 8;
        for (int chunk = blockIdx.x; alive && chunk < chunks; chunk += gridDim.x) {
            const int first = chunk * plan.tokens_per_chunk;
            alive = wait_chunk_warp(v, state, Phase::kCombine, state.epoch, chunk, counts[turn]);
            __syncwarp();
            if (!alive || closed_by_peer(v, counts[turn], lane == 0)) continue;
            const int count = max(0, min(plan.tokens_per_chunk, state.tokens - first));
            for (int u = turn; u < count * kParts; u += kReduceWarps) {
                const int t = u / kParts, part = u % kParts;
                reduce_row<Wire, Out>(v, a, first + t, load_route(v, first + t),
                                      eighths * part / kParts + lane, 32, eighths * (part + 1) / kParts);
            }
            __syncwarp();
        }
    }
    __syncwarp();
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
