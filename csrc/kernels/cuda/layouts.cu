#include "layouts.h"

#include <algorithm>
#include <type_traits>

#include "formats.cuh"

namespace ep::cuda {
namespace {

constexpr unsigned kAll = 0xFFFFFFFFu;
constexpr int kInFlight = 4;  // 16-byte loads that a thread issues before it stores

int ceil_div(int64_t n, int64_t d) {
    return static_cast<int>((n + d - 1) / d);
}

// Slots are counted tile by tile, so that no place needs a look at all slots before it.
struct Tiles {
    int32_t count, slots;
    static Tiles of(int32_t slots) {
        const int per_tile = kThreads * ceil_div(slots, kThreads * kMaxTiles);
        return {ceil_div(slots, per_tile), per_tile};
    }
};

// This rank's expert in an entry of ids, -1: none.
__device__ int local_at(const ReceivedSlots& s, int entry) {
    const int id = s.ids[entry];
    return id < 0 ? -1 : s.local[id];
}

// How many rows each tile has for each expert, and how many slots that have a row.
__global__ void __launch_bounds__(kThreads)
    count_kernel(const __grid_constant__ IndexArgs a, const __grid_constant__ Tiles tiles) {
    extern __shared__ int32_t counts[];  // [experts + 1]
    const ReceivedSlots& s = a.slots;
    for (int tile = blockIdx.x; tile < tiles.count; tile += gridDim.x) {
        for (int e = threadIdx.x; e <= s.experts; e += kThreads) counts[e] = 0;
        __syncthreads();
        const int begin = tile * tiles.slots, end = min(begin + tiles.slots, s.count);
        for (int slot = begin + static_cast<int>(threadIdx.x); slot < end; slot += kThreads) {
            bool live = false;
            for (int k = 0; k < s.top_k; ++k) {
                const int e = local_at(s, slot * s.top_k + k);
                if (e < 0) continue;
                atomicAdd(&counts[e], 1);
                live = true;
            }
            if (live) atomicAdd(&counts[s.experts], 1);
        }
        __syncthreads();
        for (int e = threadIdx.x; e <= s.experts; e += kThreads)
            a.tile_counts[tile * (s.experts + 1) + e] = counts[e];
        __syncthreads();  // counts are used again
    }
}

// Which list an entry's row belongs to, -1: it has none. Expert-major has a list per expert and entries of
// ids; compact one list and an entry per slot.
template <bool kByExpert>
__device__ int list_of(const ReceivedSlots& s, int entry) {
    if constexpr (kByExpert) {
        return local_at(s, entry);
    } else {
        for (int k = 0; k < s.top_k; ++k)
            if (local_at(s, entry * s.top_k + k) >= 0) return 0;
        return -1;
    }
}

// The places of a tile's entries: the number of entries before each in its list, those of tiles before, of
// warps before it in the tile, of its warp so far, and of lanes before it. `next`: [kWarps, lists], in shared
// memory; in the end the last warp's numbers are those of all entries up to the tile's last. The whole block
// comes.
template <bool kByExpert>
__device__ void place_tile(const IndexArgs& a, const Tiles& tiles, int tile, int32_t* next, int32_t* places) {
    const ReceivedSlots& s = a.slots;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, columns = s.experts + 1;
    const int lists = kByExpert ? s.experts : 1, per_slot = kByExpert ? s.top_k : 1;
    int32_t* const mine = next + warp * lists;
    const int begin = tile * tiles.slots * per_slot;
    const int end = min((tile + 1) * tiles.slots, s.count) * per_slot;
    const int share = (end - begin + kThreads - 1) / kThreads * 32;  // entries of a warp
    const int warp_begin = min(begin + warp * share, end), warp_end = min(warp_begin + share, end);
    const int first = warp_begin + lane;
    const int first_list = first < warp_end ? list_of<kByExpert>(s, first) : -1;
    for (int i = threadIdx.x; i < kWarps * lists; i += kThreads) next[i] = 0;
    __syncthreads();
    for (int i = first; i < warp_end; i += 32)
        if (const int list = i == first ? first_list : list_of<kByExpert>(s, i); list >= 0)
            atomicAdd(&mine[list], 1);
    __syncthreads();
    for (int list = threadIdx.x; list < lists; list += kThreads) {
        const int32_t* const column = a.tile_counts + (kByExpert ? list : s.experts);
        int before = 0, counts[kWarps];
        for (int t = 0; t < tile; ++t) before += column[t * columns];
#pragma unroll
        for (int w = 0; w < kWarps; ++w) counts[w] = next[w * lists + list];
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
            next[w * lists + list] = before;
            before += counts[w];
        }
    }
    __syncthreads();
    for (int base = warp_begin; base < warp_end; base += 32) {
        const int i = base + lane;
        const int list = i == first ? first_list : i < warp_end ? list_of<kByExpert>(s, i) : -1;
        const unsigned same = __match_any_sync(kAll, list), before = same & ((1u << lane) - 1);
        const int at = list < 0 ? 0 : mine[list] + __popc(before);
        __syncwarp();  // all have read what the first of each list now moves on
        if (list >= 0 && before == 0) mine[list] += __popc(same);
        __syncwarp();
        if (i < warp_end) places[i] = list < 0 || at >= s.count ? -1 : list * s.count + at;
    }
    __syncthreads();
}

template <bool kByExpert>
__global__ void __launch_bounds__(kThreads)
    place_kernel(const __grid_constant__ IndexArgs a, const __grid_constant__ Tiles tiles) {
    extern __shared__ int32_t next[];
    const int columns = a.slots.experts + 1;
    for (int tile = blockIdx.x; tile < tiles.count; tile += gridDim.x) {
        place_tile<kByExpert>(a, tiles, tile, next, a.places);
        if (tile != tiles.count - 1) continue;
        for (int e = threadIdx.x; e < columns; e += kThreads) {
            int total = 0;
            for (int t = 0; t < tiles.count; ++t) total += a.tile_counts[t * columns + e];
            a.totals[e] = min(total, a.slots.count);
        }
    }
}

// Whether a slot has a place at all; its whole warp asks.
__device__ bool any_place(const int32_t* places, int count) {
    const int lane = threadIdx.x % 32;
    return __any_sync(kAll, lane < count && places[lane] >= 0);
}

// What a thread loads of a slot before it needs to know where that goes: words of its row, and one of its
// scales.
struct Loaded {
    uint4 words[kInFlight];
    uint32_t scale;
};
__device__ void load_words(const GatherArgs& a, int64_t slot, int first, int step, Loaded& loaded) {
    const int words = static_cast<int>(a.row_bytes / 16);
#pragma unroll
    for (int i = 0; i < kInFlight; ++i)
        if (const int at = first + i * step; at < words)
            loaded.words[i] = ptx::load_row(a.rows + slot * a.row_bytes + static_cast<int64_t>(at) * 16);
}
__device__ uint32_t load_scale(const GatherArgs& a, int64_t slot, int i) {
    return reinterpret_cast<const uint32_t*>(a.scales + slot * a.scale_bytes)[i];
}
__device__ void load_ahead(const GatherArgs& a, int64_t slot, const Groups& by, Loaded& loaded) {
    load_words(a, slot, by.place, by.step, loaded);
    if (by.place < a.scale_bytes / 4) loaded.scale = load_scale(a, slot, by.place);
}

// `all_places`: those of a.places, where they are at hand. `ahead`: whether this thread's first slot is
// loaded.
__device__ void gather_rows(const GatherArgs& a, const int32_t* all_places, const Groups& by, bool ahead,
                            Loaded& loaded) {
    const ReceivedSlots& s = a.slots;
    const int words = static_cast<int>(a.row_bytes / 16), scale_words = static_cast<int>(a.scale_bytes / 4);
    for (int64_t slot = by.group; slot < s.count; slot += by.groups) {
        const int32_t* const places = all_places + slot * a.places_per_slot;
        if (!any_place(places, a.places_per_slot)) continue;
        if (!ahead || slot != by.group) load_ahead(a, slot, by, loaded);
        for (int first = by.place; first < words; first += by.step * kInFlight) {
            if (first != by.place) load_words(a, slot, first, by.step, loaded);
            for (int p = 0; p < a.places_per_slot; ++p) {
                if (places[p] < 0) continue;
                char* const to = a.out_rows + places[p] * a.row_bytes;
#pragma unroll
                for (int i = 0; i < kInFlight; ++i)
                    if (const int at = first + i * by.step; at < words)
                        ptx::store_row(to + static_cast<int64_t>(at) * 16, loaded.words[i]);
            }
        }
        for (int i = by.place; i < scale_words; i += by.step) {
            const uint32_t word = i == by.place ? loaded.scale : load_scale(a, slot, i);
            for (int p = 0; p < a.places_per_slot; ++p) {
                if (places[p] < 0) continue;
                int64_t at = static_cast<int64_t>(places[p]) * scale_words + i;
                if (a.scales_by_column) {
                    const int expert = a.per_count.divide(places[p]), row = places[p] - expert * s.count;
                    at = (static_cast<int64_t>(expert) * scale_words + i) * s.count + row;
                }
                reinterpret_cast<uint32_t*>(a.out_scales)[at] = word;
            }
        }
        if (a.out_ids == nullptr || by.place >= s.top_k) continue;
        const int64_t entry = slot * s.top_k + by.place;
        const int64_t to = static_cast<int64_t>(places[0]) * s.top_k + by.place;
        const int global = s.ids[entry], id = a.local_ids && global >= 0 ? s.local[global] : global;
        a.out_ids[to] = id < 0 ? a.pad_id : id;
        a.out_weights[to] = id < 0 ? 0.0f : s.weights[entry];
    }
}

__global__ void __launch_bounds__(kThreads) gather_kernel(const __grid_constant__ GatherArgs a) {
    Loaded loaded;
    gather_rows(a, a.places, Groups::of_grid(a.warps_per_row), false, loaded);
}

// Few rows, by expert, in one launch: each block finds all places, as that takes less time than to wait for
// another kernel that does.
__global__ void __launch_bounds__(kThreads,
                                  2)  // as many registers as exchanges have, among which it may come
    sort_kernel(const __grid_constant__ IndexArgs a, const __grid_constant__ GatherArgs gather,
                const __grid_constant__ Tiles tiles) {
    extern __shared__ int32_t next[];
    const ReceivedSlots& s = a.slots;
    int32_t* const places = next + kWarps * s.experts;
    const Groups by = Groups::of_grid(gather.warps_per_row);
    Loaded loaded;
    ptx::wait_for_previous_kernel();
    ptx::let_next_kernel_start();
    if (by.group < s.count) load_ahead(gather, by.group, by, loaded);
    place_tile<true>(a, tiles, 0, next, places);
    if (blockIdx.x == 0) {
        for (int i = threadIdx.x; i < s.count * s.top_k; i += kThreads) a.places[i] = places[i];
        for (int e = threadIdx.x; e < s.experts; e += kThreads)
            a.totals[e] = min(next[(kWarps - 1) * s.experts + e], s.count);
    }
    gather_rows(gather, places, by, true, loaded);
}

template <class F>
constexpr int kUnits = kInFlight / F::kWords;  // of eight elements

template <class F>
__device__ void load_units(const char* row, int hidden, int first, int step, uint4* words) {
#pragma unroll
    for (int i = 0; i < kUnits<F>; ++i)
        if (const int at = first + i * step; at < units_of(hidden))
#pragma unroll
            for (int j = 0; j < F::kWords; ++j)
                if (has_word<F>(hidden, at, j))
                    words[i * F::kWords + j] =
                        ptx::load_row(row + (static_cast<int64_t>(at) * F::kWords + j) * 16);
}

// Rows that are sums already.
template <class Y, class Wire>
__device__ void return_row(const ReturnArgs& a, const char* y, char* row, const Groups& by) {
    const int units = units_of(a.hidden);
    for (int first = by.place; first < units; first += by.step * kUnits<Y>) {
        uint4 words[kInFlight];
        load_units<Y>(y, a.hidden, first, by.step, words);
#pragma unroll
        for (int i = 0; i < kUnits<Y>; ++i) {
            const int at = first + i * by.step;
            if (at >= units) continue;
            if constexpr (std::is_same_v<Y, Wire>) {
#pragma unroll
                for (int j = 0; j < Y::kWords; ++j)
                    if (has_word<Y>(a.hidden, at, j))
                        ptx::store_row(row + (static_cast<int64_t>(at) * Y::kWords + j) * 16,
                                       words[i * Y::kWords + j]);
            } else {
                Eight part;
                Y::unpack(words + i * Y::kWords, part);
                store_eight<Wire>(row, a.hidden, at, part);
            }
        }
    }
}

// The weighted sum over this rank's experts.
template <class Y, class Wire>
__device__ void return_sum(const ReturnArgs& a, const int32_t* places, const float* weights, char* row,
                           const Groups& by) {
    const int units = units_of(a.hidden);
    const int64_t y_bytes = static_cast<int64_t>(a.hidden) * Y::kWords * 2;
    for (int first = by.place; first < units; first += by.step * kUnits<Y>) {
        Eight sum[kUnits<Y>]{};
        for (int p = 0; p < a.places_per_slot; ++p) {
            if (places[p] < 0) continue;
            const float weight = weights[p];
            uint4 words[kInFlight];
            load_units<Y>(a.y + places[p] * y_bytes, a.hidden, first, by.step, words);
#pragma unroll
            for (int i = 0; i < kUnits<Y>; ++i) {
                if (first + i * by.step >= units) continue;
                Eight part;
                Y::unpack(words + i * Y::kWords, part);
#pragma unroll
                for (int j = 0; j < 8; ++j) sum[i].v[j] = __fmaf_rn(weight, part.v[j], sum[i].v[j]);
            }
        }
#pragma unroll
        for (int i = 0; i < kUnits<Y>; ++i)
            if (const int at = first + i * by.step; at < units) store_eight<Wire>(row, a.hidden, at, sum[i]);
    }
}

template <class Y, class Wire>
__global__ void __launch_bounds__(kThreads) return_kernel(const __grid_constant__ ReturnArgs a) {
    const Groups by = Groups::of_grid(a.warps_per_row);
    const int64_t elements = a.hidden;
    for (int64_t slot = by.group; slot < a.count; slot += by.groups) {
        const int32_t* const places = a.places + slot * a.places_per_slot;
        if (!any_place(places, a.places_per_slot)) continue;
        char* const row = a.rows + slot * elements * (Wire::kWords * 2);
        if (a.weights)
            return_sum<Y, Wire>(a, places, a.weights + slot * a.places_per_slot, row, by);
        else
            return_row<Y, Wire>(a, a.y + places[0] * elements * (Y::kWords * 2), row, by);
    }
}

// Ordinary launches: see layouts.h.
Launch ordinary(int blocks, cudaStream_t stream, int64_t shared_bytes = 0) {
    return {blocks, stream, false, kThreads, static_cast<int>(shared_bytes)};
}

// Warps for a row of so many 16-byte words: enough to load it at once, a power of two.
int warps_for(int64_t words) {
    int warps = 1;
    while (warps < kWarps && int64_t{warps} * 32 * kInFlight < words) warps *= 2;
    return warps;
}
int blocks_for(int32_t slots, int32_t warps_per_row, int blocks) {
    return std::min(ceil_div(int64_t{slots} * warps_per_row, kWarps), blocks);
}

template <class Out>
cudaError_t launch_return_as(const ReturnArgs& a, const Launch& how) {
    const bool y32 = a.y_type == DType::kF32, wire32 = a.wire == DType::kF32;
    if (y32 && wire32) return launch(return_kernel<F32, F32>, how, a);
    if (y32) return launch(return_kernel<F32, Out>, how, a);
    if (wire32) return launch(return_kernel<Out, F32>, how, a);
    return launch(return_kernel<Out, Out>, how, a);
}
cudaError_t launch_return_kernel(const ReturnArgs& a, const Launch& how) {
    const bool half = a.y_type == DType::kF16 || a.wire == DType::kF16;
    return half ? launch_return_as<F16>(a, how) : launch_return_as<BF16>(a, how);
}

}  // namespace

cudaError_t launch_index(const IndexArgs& a, int blocks, cudaStream_t stream) {
    const Tiles tiles = Tiles::of(a.slots.count);
    blocks = std::min(tiles.count, blocks);
    const int64_t columns = a.slots.experts + 1;
    const cudaError_t counted = launch(count_kernel, ordinary(blocks, stream, columns * 4), a, tiles);
    if (counted != cudaSuccess) return counted;
    const int64_t lists = a.by_expert ? a.slots.experts : 1;
    return launch(a.by_expert ? place_kernel<true> : place_kernel<false>,
                  ordinary(blocks, stream, kWarps * lists * 4), a, tiles);
}

cudaError_t launch_gather(GatherArgs a, int blocks, cudaStream_t stream) {
    a.warps_per_row = warps_for(a.row_bytes / 16);
    a.per_count = Divisor::of(a.slots.count);
    return launch(gather_kernel, ordinary(blocks_for(a.slots.count, a.warps_per_row, blocks), stream), a);
}

cudaError_t launch_sort(const IndexArgs& a, GatherArgs gather, int blocks, int early_blocks,
                        cudaStream_t stream) {
    constexpr int64_t kShared = 48 * 1024;  // that a block has without asking
    const Tiles tiles = Tiles::of(a.slots.count);
    const int64_t shared = (kWarps * a.slots.experts + int64_t{a.slots.count} * a.slots.top_k) * 4;
    if (tiles.count > 1 || shared > kShared) {
        const cudaError_t placed = launch_index(a, blocks, stream);
        return placed == cudaSuccess ? launch_gather(gather, blocks, stream) : placed;
    }
    const int64_t words = gather.row_bytes / 16;
    gather.warps_per_row = warps_for(words);
    // Few rows have more warps: each stores a row once for each of its experts.
    const int64_t most = int64_t{early_blocks ? std::min(blocks, early_blocks) : blocks} * kWarps;
    while (gather.warps_per_row * 32 < words && 2 * a.slots.count * gather.warps_per_row <= most)
        gather.warps_per_row *= 2;
    gather.per_count = Divisor::of(a.slots.count);
    Launch how = ordinary(blocks_for(a.slots.count, gather.warps_per_row, blocks), stream, shared);
    how.dependent = how.blocks <= early_blocks;
    return launch(sort_kernel, how, a, gather, tiles);
}

cudaError_t load_layout_kernels(DType wire, DType out) {
    const Launch none{.blocks = 0, .stream = nullptr, .dependent = false};
    for (const DType y_type : {out, DType::kF32}) {
        ReturnArgs a{};
        a.y_type = y_type;
        a.wire = wire;
        if (const cudaError_t error = launch_return_kernel(a, none)) return error;
    }
    for (const cudaError_t error :
         {launch(count_kernel, none, IndexArgs{}, Tiles{}),
          launch(place_kernel<false>, none, IndexArgs{}, Tiles{}),
          launch(place_kernel<true>, none, IndexArgs{}, Tiles{}), launch(gather_kernel, none, GatherArgs{}),
          launch(sort_kernel, none, IndexArgs{}, GatherArgs{}, Tiles{})})
        if (error != cudaSuccess) return error;
    return cudaSuccess;
}

cudaError_t launch_return(ReturnArgs a, int blocks, cudaStream_t stream) {
    a.warps_per_row = warps_for(a.hidden * element_bytes(a.y_type) / 16);
    return launch_return_kernel(a, ordinary(blocks_for(a.count, a.warps_per_row, blocks), stream));
}

}  // namespace ep::cuda
