// Dispatch of many tokens in one launch. Copying warps send chunk after chunk; the others wait for the chunks
// of all sources and copy their metadata. See bulk.cuh.
#include "bulk.cuh"
#include "dispatch.cuh"
#include "launch.h"

namespace ep::cuda {
namespace {

// Quantising takes more warps, each with one piece at a time: codes, then scales.
constexpr int kQuantizingWarps = 8;
constexpr int kScaleRoom = kPieceBytes / 128 * 4;
static_assert(kQuantizingWarps * (kPieceBytes + kScaleRoom) <= kRingBytes);
template <class F>
constexpr int kSenders = std::is_void_v<F> ? kCopyWarps : kQuantizingWarps;

#ifdef EP_BULK
// Ranks of a chunk's tokens; a lane each.
template <class Id>
__device__ RankSet token_route(const View& v, const State& s, const DispatchArgs& a, int64_t token) {
    RankSet route{};
    for (int first = 0; first < v.top_k; first += kIdsAhead) {
        int ids[kIdsAhead];
#pragma unroll
        for (int k = 0; k < kIdsAhead; ++k)
            ids[k] = first + k < v.top_k
                         ? static_cast<int>(static_cast<const Id*>(a.ids)[token * v.top_k + first + k])
                         : -1;
#pragma unroll
        for (int k = 0; k < kIdsAhead; ++k) {
            if (ids[k] < 0 || ids[k] >= v.experts) continue;
            const int r = rank_of(v, ids[k]);
            const uint32_t bit = 1u << (r & 31);
            if (r < 32)
                route.a |= bit;
            else if (r < 64)
                route.b |= bit;
            else
                route.c |= bit;
        }
    }
    route.a &= ~s.mask.a, route.b &= ~s.mask.b, route.c &= ~s.mask.c;
    return route;
}

// A warp quantises a piece into shared memory; the lanes agree on when it may be overwritten.
template <class F>
__device__ void quantize_piece(const char* x, int begin, int end, char* codes, float* scales) {
    uint4 words[kLoads], next[kLoads];
    load_units<F>(x, begin + static_cast<int>(threadIdx.x) % 32, 32, end, next);
    for (int base = begin; base < end; base += 32 * kUnits<F>) {
        const int w = base + static_cast<int>(threadIdx.x) % 32;
#pragma unroll
        for (int i = 0; i < kLoads; ++i) words[i] = next[i];
        load_units<F>(x, w + 32 * kUnits<F>, 32, end, next);
#pragma unroll
        for (int i = 0; i < kUnits<F>; ++i) {
            const int at = w + i * 32;
            float scale;
            const uint4 q = quantize<F>(words + i * kUnitLoads<F>, at < end, scale);
            if (at >= end) continue;
            *reinterpret_cast<uint4*>(codes + (at - begin) * 16) = q;
            if (at % 8 == 0) scales[(at - begin) / 8] = scale;
        }
    }
}
#endif

template <class Id, class F>
__global__ void __launch_bounds__(kBulkThreads, 2)
    dispatch_bulk_kernel(const __grid_constant__ View v, const __grid_constant__ DispatchArgs a) {
#ifdef EP_BULK
    constexpr int kSend = kSenders<F>, kReceive = kBulkWarps - kSend;
    extern __shared__ __align__(128) char memory[];
    __shared__ uint64_t barriers[kCopyWarps][kSlots];
    __shared__ RankSet routes[kSend][kMaxBulkTokens];
    __shared__ int counts[kReceive][kMaxWorld];
    __shared__ int turns[kCopyWarps];
    // Exchanges of many tokens, one behind the other, are faster if more than one kernel waits.
    if (ptx::load_fresh_word(v.early) == static_cast<uint32_t>(Early::kAny)) ptx::let_next_kernel_start();
    touch(v, a);
    const Plan& plan = a.plan;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, chunks = plan.chunks();
    Ring ring;
    if (std::is_void_v<F> && warp < kSend && lane == 0)
        ring.init(memory + warp * kSlots * kPieceBytes, barriers[warp]);
    ptx::wait_for_previous_kernel();

    const State state = load_state(v);
    const int tokens = a.device_tokens ? min(*a.device_tokens, a.tokens) : a.tokens;
    const uint64_t epoch = a.send ? next_epoch(state.epoch) : state.epoch;
    bool alive = begin(state);
    if (a.send && alive && state.stage != Stage::kIdle) alive = close_open_exchange(v, state);

    if (warp < kSend) {
        ptx::fence_async_global();
        const int row_bytes = static_cast<int>(v.layout.shape.row_bytes);
        const int scale_bytes = static_cast<int>(v.layout.shape.scale_bytes);
        const Pieces pieces(row_bytes);
        RankSet* const route = routes[warp];
        // A group of warps sends a chunk; the groups of a block take turns.
        // Quantising needs several chunks under way: a warp has few rows of each.
        const int width = std::is_void_v<F> ? plan.warps_per_token : kSend / 2, group = warp / width,
                  place = warp % width;
        const int thread = place * 32 + lane;
        while (a.send && alive) {
            if (thread == 0) turns[group] = static_cast<int>(atomicAdd(&v.word->sends, 1u));
            ptx::some_warps_sync(1 + group, width * 32);
            const int chunk = turns[group];
            if (chunk >= chunks) break;
            const int first = chunk * plan.tokens_per_chunk;
            const int count = max(0, min(plan.tokens_per_chunk, tokens - first));
            const int64_t slot = static_cast<int64_t>(v.rank) * plan.slots + first;
            if (lane < count) {
                const RankSet r = token_route<Id>(v, state, a, first + lane);
                route[lane] = r;
                uint32_t* const kept = v.routes + static_cast<int64_t>(first + lane) * kRouteWords;
                if (place == 0) kept[0] = r.a, kept[1] = r.b, kept[2] = r.c;
            }
            __syncwarp();
            if (thread < count * v.top_k)
                send_meta<Id>(v, state, a, slot, first, count, load_meta<Id>(v, a, first, thread), to_all(v),
                              thread, width * 32);
            if (chunk == 0) send_headers(v, state, plan, tokens, to_all(v), thread, width * 32);
            const int units = count * pieces.count;
            if constexpr (std::is_void_v<F>) {
                if (lane == 0)
                    pump(
                        ring, units, place, width,
                        [&](int u, int& bytes) -> const char* {
                            const int t = u / pieces.count, piece = u - t * pieces.count;
                            bytes = pieces.size(piece);
                            return route[t].any() ? row_of<F>(v, a, first + t) + piece * pieces.bytes
                                                  : nullptr;
                        },
                        [&](int u, const char* from, int bytes) {
                            const int t = u / pieces.count, piece = u - t * pieces.count;
                            const RankSet to = route[t];
                            for (int n = 1; n <= v.world; ++n) {
                                const int d = hop(v, n);
                                if (to.test(d))
                                    ptx::bulk_store(
                                        v.windows[d] +
                                            v.layout.row(v.channel, slot_for(v, plan, d, slot + t)) +
                                            piece * pieces.bytes,
                                        from, bytes);
                            }
                        });
                for (int t = place; t < count && scale_bytes; t += width) {
                    const auto* from = reinterpret_cast<const uint32_t*>(
                        a.scales + static_cast<int64_t>(first + t) * scale_bytes);
                    for (int i = lane; i < scale_bytes / 4; i += 32)
                        for (int d = 0; d < v.world; ++d)
                            if (route[t].test(d))
                                reinterpret_cast<uint32_t*>(
                                    v.windows[d] +
                                    v.layout.scale_row(v.channel, slot_for(v, plan, d, slot + t)))[i] =
                                    from[i];
                }
            } else {
                char* const codes = memory + warp * (kPieceBytes + kScaleRoom);
                auto* const scales = reinterpret_cast<float*>(codes + kPieceBytes);
                const bool bulk_scales = scale_bytes % 16 == 0 && pieces.bytes % 512 == 0;
                for (int u = place; u < units; u += width) {
                    const int t = u / pieces.count, piece = u - t * pieces.count;
                    const RankSet to = route[t];
                    if (!to.any()) continue;
                    const int at = piece * pieces.bytes, bytes = pieces.size(piece);
                    if (lane == 0) ptx::bulk_wait_read<0>();
                    __syncwarp();
                    quantize_piece<F>(row_of<F>(v, a, first + t), at / 16, (at + bytes) / 16, codes, scales);
                    ptx::fence_async_shared();
                    __syncwarp();
                    for (int n = 1; n <= v.world; ++n) {
                        const int d = hop(v, n);
                        if (!to.test(d)) continue;
                        const int64_t there = slot_for(v, plan, d, slot + t);
                        char* const scale_to = v.windows[d] + v.layout.scale_row(v.channel, there) + at / 32;
                        if (lane == 0) {
                            ptx::bulk_store(v.windows[d] + v.layout.row(v.channel, there) + at, codes, bytes);
                            if (bulk_scales) ptx::bulk_store(scale_to, scales, bytes / 32);
                        }
                        for (int i = lane; !bulk_scales && i < bytes / 128; i += 32)
                            reinterpret_cast<float*>(scale_to)[i] = scales[i];
                    }
                    if (lane == 0) ptx::bulk_commit();
                    __syncwarp();
                }
                if (lane == 0) ptx::bulk_wait();
            }
            __syncwarp();
            ptx::some_warps_sync(1 + group, width * 32);
            if (place == 0)
                flag_chunk_warp(v, state, Phase::kDispatch, epoch, chunk, static_cast<uint32_t>(count),
                                to_all(v));
        }
    } else if (a.receive) {
        const int turn = warp - kSend;
        for (int i = turn;; i += kReceive) {
            const int chunk = static_cast<int>(blockIdx.x) + i * static_cast<int>(gridDim.x);
            if (chunk >= chunks) break;
            alive = alive && wait_chunk_warp(v, state, Phase::kDispatch, epoch, chunk, counts[turn]);
            __syncwarp();
            receive_metadata(v, a, chunk, counts[turn], alive, lane, 32);
            if (chunk == 0 && alive) receive_headers(v, state, a.plan, a.tokens_per_source, epoch, lane, 32);
            __syncwarp();
        }
    }
    __syncthreads();
    leave(v, false, [&](DeviceWord& w) {
        w.stage = a.receive ? Stage::kReceived : Stage::kSent;
        if (!a.send) return;
        w.epoch = epoch;
        w.tokens = tokens;
        w.chunks = static_cast<uint32_t>(chunks);
    });
#endif
}

template <class Id>
cudaError_t launch_with_id(const View& v, const DispatchArgs& a, const Launch& how) {
    if (!a.quantize) return launch(dispatch_bulk_kernel<Id, void>, how, v, a);
    switch (a.x_type) {
        case DType::kF32:
            return launch(dispatch_bulk_kernel<Id, F32>, how, v, a);
        case DType::kF16:
            return launch(dispatch_bulk_kernel<Id, F16>, how, v, a);
        default:
            return launch(dispatch_bulk_kernel<Id, BF16>, how, v, a);
    }
}

}  // namespace

cudaError_t launch_dispatch_bulk(const View& v, const DispatchArgs& a, Launch how) {
    how.threads = kBulkThreads;
    how.shared_bytes = kRingBytes;
    return a.ids_are_64_bit ? launch_with_id<int64_t>(v, a, how) : launch_with_id<int32_t>(v, a, how);
}

int dispatch_bulk_blocks_per_sm() {
    int least = 1 << 30;
    auto count = [&](auto kernel) {
        least = std::min(least, resident_blocks(kernel, kBulkThreads, kRingBytes));
    };
    count(dispatch_bulk_kernel<int64_t, void>), count(dispatch_bulk_kernel<int32_t, void>);
    count(dispatch_bulk_kernel<int64_t, F32>), count(dispatch_bulk_kernel<int32_t, F32>);
    count(dispatch_bulk_kernel<int64_t, F16>), count(dispatch_bulk_kernel<int32_t, F16>);
    count(dispatch_bulk_kernel<int64_t, BF16>), count(dispatch_bulk_kernel<int32_t, BF16>);
    return least;
}

}  // namespace ep::cuda
