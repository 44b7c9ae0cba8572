// Combine in one launch: this rank's sums back to where the tokens came from, and the sum of what all ranks
// return. A block sends a chunk, flags it, and reduces an earlier chunk while its stores are under way. See
// exchange.cuh.
#include "exchange.cuh"
#include "formats.cuh"
#include "launch.h"

namespace ep::cuda {
namespace {

struct Piece {
    int begin, end;
};
// The part of a row that a segment covers, in units of eight elements.
__device__ Piece piece_of(int eighths, int segment, int segments) {
    return {eighths * segment / segments, eighths * (segment + 1) / segments};
}

template <class Y, class Wire>
__device__ void send_sums(const View& v, const CombineArgs& a, int chunk, uint64_t epoch) {
    constexpr int kInFlight = 4 / Y::kWords;  // units of eight elements loaded before the first is stored
    const Plan& plan = a.plan;
    const int segment = chunk % plan.segments, first = chunk / plan.segments * plan.tokens_per_chunk;
    const int width = min(plan.tokens_per_chunk, plan.slots - first);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int group = warp / a.warps_per_row, groups = kWarps / a.warps_per_row;
    const int place = warp % a.warps_per_row * 32 + lane, step = a.warps_per_row * 32;
    const Piece piece = piece_of(a.hidden / 8, segment, plan.segments);
    for (int unit = group; unit < v.world * width; unit += groups) {
        const int token = first + unit % width, d = v.rank + unit / width + 1;
        const int source = d < v.world ? d : d - v.world;
        const int64_t slot = static_cast<int64_t>(source) * plan.slots + token;
        // The flag of the dispatch still says how many tokens of the chunk are live.
        const uint64_t flag = ptx::load_relaxed(own(v) + v.layout.dispatch_flag(v.channel, source, chunk));
        const auto* ids = reinterpret_cast<const int32_t*>(own(v) + v.layout.id_row(v.channel, slot));
        const int id = lane < v.top_k ? ids[lane] : -1;
        const bool live = token - first < static_cast<int>(word_low(flag)) && !masked(v, source);
        if (!__any_sync(kAll, live && is_local(v, id))) continue;
        const char* y = a.y + slot * a.hidden * (Y::kWords * 2);
        char* to = v.windows[source] + v.layout.combine_row(v.channel, v.rank, token);
        for (int e = piece.begin + place; e < piece.end; e += step * kInFlight) {
            Eight part[kInFlight];
#pragma unroll
            for (int i = 0; i < kInFlight; ++i)
                if (e + i * step < piece.end) part[i] = load_eight<Y>(y, e + i * step);
#pragma unroll
            for (int i = 0; i < kInFlight; ++i)
                if (e + i * step < piece.end) store_eight<Wire>(to, e + i * step, part[i]);
        }
    }
    flag_chunk(v, Phase::kCombine, epoch, chunk, 0);
}

// fp32, in order of rank, rounded once.
template <class Wire, class Out>
__device__ void reduce_chunk(const View& v, const CombineArgs& a, int chunk, int tokens) {
    constexpr int kAhead = 4;  // rows whose loads are issued before the first is added
    const Plan& plan = a.plan;
    const int segment = chunk % plan.segments, first = chunk / plan.segments * plan.tokens_per_chunk;
    const int count = min(plan.tokens_per_chunk, tokens - first);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int group = warp / plan.warps_per_token, groups = kWarps / plan.warps_per_token;
    const int place = warp % plan.warps_per_token * 32 + lane, step = plan.warps_per_token * 32;
    const Piece piece = piece_of(a.hidden / 8, segment, plan.segments);
    const int64_t rank_stride = v.layout.shape.max_tokens * v.layout.shape.wire_bytes;
    for (int t = group; t < count; t += groups) {
        const int64_t token = first + t;
        Route route{};
        for (int w = 0; w < kRouteWords && w * 32 < v.world; ++w)
            route.words[w] = v.routes[token * kRouteWords + w];
        const char* rows = own(v) + v.layout.combine_row(v.channel, 0, token);
        char* out = a.out + token * a.hidden * (Out::kWords * 2);
        for (int e = piece.begin + place; e < piece.end; e += step) {
            Eight sum{};
            for (int r = 0; r < v.world; r += kAhead) {
                Eight part[kAhead];
                bool has[kAhead];
#pragma unroll
                for (int i = 0; i < kAhead; ++i) {
                    has[i] = r + i < v.world && route.test(r + i);
                    if (has[i]) part[i] = load_eight<Wire>(rows + (r + i) * rank_stride, e);
                }
#pragma unroll
                for (int i = 0; i < kAhead; ++i)
                    if (has[i])
#pragma unroll
                        for (int j = 0; j < 8; ++j) sum.v[j] += part[i].v[j];
            }
            store_eight<Out>(out, e, sum);
        }
    }
}

// A peer that closed the exchange has not sent the rows that this rank waits for. The exchange is over for
// everybody, so nothing stops; the host is told that this result is lost.
__device__ bool closed_by_peer(const View& v, const int* counts) {
    for (int source = 0; source < v.world; ++source) {
        if (counts[source] != static_cast<int>(kClosed)) continue;
        if (threadIdx.x == 0) *const_cast<volatile int32_t*>(&v.host_error->closed_by) = source + 1;
        return true;
    }
    return false;
}

template <class Y, class Wire, class Out>
__global__ void __launch_bounds__(kThreads, 2)
    combine_kernel(const __grid_constant__ View v, const __grid_constant__ CombineArgs a) {
    __shared__ int counts[kMaxWorld];
    ptx::let_next_kernel_start();
    ptx::wait_for_previous_kernel();
    const DeviceWord word = *v.word;
    bool alive = *reinterpret_cast<volatile uint32_t*>(&v.error->stopped) == 0;
    const int chunks = a.plan.chunks(), step = static_cast<int>(gridDim.x);
    auto receive = [&](int chunk) {
        alive = alive && wait_chunk(v, Phase::kCombine, word.epoch, chunk, counts);
        if (!alive) return;
        if (!closed_by_peer(v, counts)) reduce_chunk<Wire, Out>(v, a, chunk, word.tokens);
        if (chunk + step < chunks) __syncthreads();  // counts are used again
    };
    for (int chunk = blockIdx.x; chunk < chunks && alive; chunk += step) {
        if (a.send) send_sums<Y, Wire>(v, a, chunk, word.epoch);
        if (!a.receive) continue;
        if (!a.send) {
            receive(chunk);
            continue;
        }
        // One chunk behind: by now the peers have most likely sent theirs.
        if (chunk >= step) receive(chunk - step);
        if (chunk + step >= chunks) receive(chunk);
    }
    leave(v, [&](DeviceWord& w) { w.stage = a.receive ? Stage::kIdle : Stage::kReturned; });
}

template <class Out>
cudaError_t launch_as(const View& v, const CombineArgs& a, const Launch& how) {
    const bool y32 = a.y_type == DType::kF32, wire32 = a.wire == DType::kF32;
    if (y32 && wire32) return launch(combine_kernel<F32, F32, Out>, how, v, a);
    if (y32) return launch(combine_kernel<F32, Out, Out>, how, v, a);
    if (wire32) return launch(combine_kernel<Out, F32, Out>, how, v, a);
    return launch(combine_kernel<Out, Out, Out>, how, v, a);
}

}  // namespace

cudaError_t launch_combine(const View& v, const CombineArgs& a, const Launch& how) {
    switch (a.out_type) {
        case DType::kF32:
            return launch(combine_kernel<F32, F32, F32>, how, v, a);
        case DType::kF16:
            return launch_as<F16>(v, a, how);
        default:
            return launch_as<BF16>(v, a, how);
    }
}

int combine_blocks_per_sm() {
    return resident_blocks(combine_kernel<F32, F32, BF16>);
}

}  // namespace ep::cuda
