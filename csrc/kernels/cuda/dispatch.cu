// Dispatch in one launch: rows, metadata and flags out; then wait for what the others sent. See exchange.cuh.
#include <type_traits>

#include "exchange.cuh"
#include "formats.cuh"
#include "launch.h"

namespace ep::cuda {
namespace {

constexpr int kInFlight = 4;  // 16-byte loads that a thread issues before it stores

struct Piece {
    int begin, end;
};
// The part of a row's `words` 16-byte words that a segment covers; whole groups of 8 words (a block of fp8
// scales).
__device__ Piece piece_of(int words, int segment, int segments) {
    auto cut = [&](int s) { return s == segments ? words : words * s / segments & ~7; };
    return {cut(segment), cut(segment + 1)};
}

// The n-th rank to write to: each rank starts with its neighbour, so that not all write to the same one.
__device__ int hop(const View& v, int n) {
    const int d = v.rank + n;
    return d < v.world ? d : d - v.world;
}

// A group of warps copies a piece of a token's row to all its ranks, one load for all of them.
__device__ void send_row(const View& v, const char* x, int64_t slot, const Route& route, Piece piece,
                         int first, int step) {
    for (int w = piece.begin + first; w < piece.end; w += step * kInFlight) {
        uint4 word[kInFlight];
#pragma unroll
        for (int i = 0; i < kInFlight; ++i)
            if (w + i * step < piece.end)
                word[i] = ptx::load_row(x + static_cast<int64_t>(w + i * step) * 16);
        for (int n = 1; n <= v.world; ++n) {
            const int d = hop(v, n);
            if (!route.test(d)) continue;
            char* to = v.windows[d] + v.layout.row(v.channel, slot);
#pragma unroll
            for (int i = 0; i < kInFlight; ++i)
                if (w + i * step < piece.end)
                    ptx::store_row(to + static_cast<int64_t>(w + i * step) * 16, word[i]);
        }
    }
}

// The same with quantisation: a lane makes 16 values, 8 lanes share a scale.
template <class F>
__device__ void send_quantized(const View& v, const char* x, int64_t slot, const Route& route, Piece piece,
                               int first, int step) {
    for (int base = piece.begin; base < piece.end; base += step) {
        const int w = base + first;
        const bool mine = w < piece.end;
        Eight a{}, b{};
        if (mine) {
            a = load_eight<F>(x, 2 * w);
            b = load_eight<F>(x, 2 * w + 1);
        }
        float amax = 0;
#pragma unroll
        for (int i = 0; i < 8; ++i) amax = fmaxf(amax, fmaxf(fabsf(a.v[i]), fabsf(b.v[i])));
#pragma unroll
        for (int lane = 4; lane > 0; lane /= 2) amax = fmaxf(amax, __shfl_xor_sync(kAll, amax, lane));
        if (!mine) continue;
        const float scale = fp8_scale(amax);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            a.v[i] = a.v[i] / scale;
            b.v[i] = b.v[i] / scale;
        }
        const uint4 q{pack_e4m3(a.v[0], a.v[1], a.v[2], a.v[3]), pack_e4m3(a.v[4], a.v[5], a.v[6], a.v[7]),
                      pack_e4m3(b.v[0], b.v[1], b.v[2], b.v[3]), pack_e4m3(b.v[4], b.v[5], b.v[6], b.v[7])};
        for (int n = 1; n <= v.world; ++n) {
            const int d = hop(v, n);
            if (!route.test(d)) continue;
            ptx::store_row(v.windows[d] + v.layout.row(v.channel, slot) + static_cast<int64_t>(w) * 16, q);
            if (w % 8 == 0)
                reinterpret_cast<float*>(v.windows[d] + v.layout.scale_row(v.channel, slot))[w / 8] = scale;
        }
    }
}

// Scales that the caller brought: few bytes, any multiple of 4.
__device__ void send_scales(const View& v, const char* scales, int64_t slot, const Route& route, int first,
                            int step) {
    const auto* from = reinterpret_cast<const uint32_t*>(scales);
    for (int i = first; i < v.layout.shape.scale_bytes / 4; i += step)
        for (int d = 0; d < v.world; ++d)
            if (route.test(d))
                reinterpret_cast<uint32_t*>(v.windows[d] + v.layout.scale_row(v.channel, slot))[i] = from[i];
}

template <class Id>
__device__ void send_metadata(const View& v, const DispatchArgs& a, int64_t first_slot, int first,
                              int count) {
    const auto* ids = static_cast<const Id*>(a.ids) + static_cast<int64_t>(first) * v.top_k;
    const float* weights = a.weights + static_cast<int64_t>(first) * v.top_k;
    for (int i = threadIdx.x; i < count * v.top_k; i += kThreads) {
        const int id = static_cast<int>(ids[i]);
        const float weight = weights[i];
        for (int d = 0; d < v.world; ++d) {
            if (masked(v, d)) continue;
            reinterpret_cast<int32_t*>(v.windows[d] + v.layout.id_row(v.channel, first_slot))[i] =
                id >= 0 && id < v.experts ? id : -1;
            reinterpret_cast<float*>(v.windows[d] + v.layout.weight_row(v.channel, first_slot))[i] = weight;
        }
    }
}

template <class Id, class F>
__device__ void send_chunk(const View& v, const DispatchArgs& a, int chunk, int tokens, uint64_t epoch) {
    const Plan& plan = a.plan;
    const int segment = chunk % plan.segments, first = chunk / plan.segments * plan.tokens_per_chunk;
    const int count = max(0, min(plan.tokens_per_chunk, tokens - first));
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int group = warp / plan.warps_per_token, groups = kWarps / plan.warps_per_token;
    const int place = warp % plan.warps_per_token * 32 + lane, step = plan.warps_per_token * 32;
    const int64_t first_slot = static_cast<int64_t>(v.rank) * plan.slots + first;
    const Piece piece = piece_of(static_cast<int>(v.layout.shape.row_bytes / 16), segment, plan.segments);

    if (segment == 0) send_metadata<Id>(v, a, first_slot, first, count);
    for (int t = group; t < count; t += groups) {
        const int64_t token = first + t;
        Route route = route_of(v, static_cast<const Id*>(a.ids) + token * v.top_k, lane);
        for (int w = 0; w < kRouteWords; ++w)
            route.words[w] &= ~static_cast<uint32_t>(v.mask[w / 2] >> (w % 2 * 32));
        if (segment == 0 && place < kRouteWords)
            v.routes[token * kRouteWords + place] = place == 0   ? route.words[0]
                                                    : place == 1 ? route.words[1]
                                                                 : route.words[2];
        if (!route.any()) continue;
        if constexpr (std::is_void_v<F>) {
            send_row(v, a.x + token * v.layout.shape.row_bytes, first_slot + t, route, piece, place, step);
            if (segment == 0 && v.layout.shape.scale_bytes)
                send_scales(v, a.scales + token * v.layout.shape.scale_bytes, first_slot + t, route, place,
                            step);
        } else {
            const int64_t x_bytes = v.layout.shape.row_bytes * 2 * F::kWords;
            send_quantized<F>(v, a.x + token * x_bytes, first_slot + t, route, piece, place, step);
        }
    }
    if (chunk == 0)
        for (int d = threadIdx.x; d < v.world; d += kThreads)
            if (!masked(v, d))
                *reinterpret_cast<SourceHeader*>(v.windows[d] + v.layout.header(v.channel, v.rank)) = {
                    static_cast<uint32_t>(tokens), static_cast<uint32_t>(plan.slots)};
    flag_chunk(v, Phase::kDispatch, epoch, chunk, static_cast<uint32_t>(count));
}

// Ids and weights leave the window; what is not for this rank, or was never sent, gets the padding id.
__device__ void receive_metadata(const View& v, const DispatchArgs& a, int chunk, const int* counts,
                                 bool arrived) {
    const Plan& plan = a.plan;
    const int first = chunk / plan.segments * plan.tokens_per_chunk;
    const int width = min(plan.tokens_per_chunk, plan.slots - first) * v.top_k;
    for (int i = threadIdx.x; i < v.world * width; i += kThreads) {
        const int source = i / width, j = i % width;
        const int64_t slot = static_cast<int64_t>(source) * plan.slots + first;
        const bool live = arrived && j / v.top_k < counts[source];
        const int id =
            live ? reinterpret_cast<const int32_t*>(own(v) + v.layout.id_row(v.channel, slot))[j] : -1;
        const float weight =
            live ? reinterpret_cast<const float*>(own(v) + v.layout.weight_row(v.channel, slot))[j] : 0.0f;
        const bool local = is_local(v, id);
        const int64_t to = slot * v.top_k + j;
        a.out_ids[to] = !local ? v.pad_id : v.local_ids ? local_index(v, id) : id;
        a.out_weights[to] = local ? weight : 0.0f;
    }
}

// Chunk 0 of every source covers its header: how many tokens it has in all, and whether it agrees on T.
__device__ void receive_headers(const View& v, const DispatchArgs& a, uint64_t epoch) {
    for (int source = threadIdx.x; source < v.world; source += kThreads) {
        const auto header =
            *reinterpret_cast<const SourceHeader*>(own(v) + v.layout.header(v.channel, source));
        a.tokens_per_source[source] = masked(v, source) ? 0 : static_cast<int32_t>(header.tokens);
        if (masked(v, source) || header.slots == static_cast<uint32_t>(a.plan.slots)) continue;
        ErrorWord error;
        error.status = Status::kSlotsDiffer;
        error.peer = source;
        error.reporter = v.rank;
        error.channel = v.channel;
        error.epoch_expected = error.epoch_seen = epoch;
        fail(v, error);
    }
}

// An exchange that nobody combined ends without data, before this one writes where that one was read.
__device__ bool close_open_exchange(const View& v, const DeviceWord& word, int* counts) {
    const int chunks = static_cast<int>(word.chunks);
    // Only a rank that has seen all rows of an exchange may say that it is done with them.
    for (int chunk = 0; chunk < chunks && word.stage == Stage::kSent; ++chunk)
        if (!wait_chunk(v, Phase::kDispatch, word.epoch, chunk, counts)) return false;
    for (int chunk = blockIdx.x; chunk < chunks && word.stage != Stage::kReturned; chunk += gridDim.x)
        flag_chunk(v, Phase::kCombine, word.epoch, chunk, kClosed);
    for (int chunk = 0; chunk < chunks; ++chunk)
        if (!wait_chunk(v, Phase::kCombine, word.epoch, chunk, counts)) return false;
    return true;
}

template <class Id, class F>
__global__ void __launch_bounds__(kThreads, 2)
    dispatch_kernel(const __grid_constant__ View v, const __grid_constant__ DispatchArgs a) {
    __shared__ int counts[kMaxWorld];
    ptx::let_next_kernel_start();
    ptx::wait_for_previous_kernel();
    const DeviceWord word = *v.word;
    bool alive = *reinterpret_cast<volatile uint32_t*>(&v.error->stopped) == 0;
    const int tokens = a.device_tokens ? min(*a.device_tokens, a.plan.slots) : a.tokens;
    const uint64_t epoch = a.send ? next_epoch(word.epoch) : word.epoch;
    const int chunks = a.plan.chunks();
    if (a.send && alive) {
        if (word.stage != Stage::kIdle) alive = close_open_exchange(v, word, counts);
        for (int chunk = blockIdx.x; chunk < chunks && alive; chunk += gridDim.x)
            send_chunk<Id, F>(v, a, chunk, tokens, epoch);
    }
    if (a.receive) {
        for (int chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
            alive = alive && wait_chunk(v, Phase::kDispatch, epoch, chunk, counts);
            if (chunk == 0 && alive) receive_headers(v, a, epoch);
            if (chunk % a.plan.segments == 0) receive_metadata(v, a, chunk, counts, alive);
            if (chunk + gridDim.x < chunks) __syncthreads();  // counts are used again
        }
    }
    leave(v, [&](DeviceWord& w) {
        w.stage = a.receive ? Stage::kReceived : Stage::kSent;
        if (!a.send) return;
        w.epoch = epoch;
        w.tokens = tokens;
        w.chunks = static_cast<uint32_t>(chunks);
    });
}

template <class Id>
cudaError_t launch_with_id(const View& v, const DispatchArgs& a, const Launch& how) {
    if (!a.quantize) return launch(dispatch_kernel<Id, void>, how, v, a);
    switch (a.x_type) {
        case DType::kF32:
            return launch(dispatch_kernel<Id, F32>, how, v, a);
        case DType::kF16:
            return launch(dispatch_kernel<Id, F16>, how, v, a);
        default:
            return launch(dispatch_kernel<Id, BF16>, how, v, a);
    }
}

}  // namespace

cudaError_t launch_dispatch(const View& v, const DispatchArgs& a, const Launch& how) {
    return a.ids_are_64_bit ? launch_with_id<int64_t>(v, a, how) : launch_with_id<int32_t>(v, a, how);
}

int dispatch_blocks_per_sm() {
    return resident_blocks(dispatch_kernel<int64_t, F32>);
}

}  // namespace ep::cuda
