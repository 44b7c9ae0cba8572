// Layouts other than rank-major. Rows arrive in the window, which is rank-major; these kernels find the place
// of each in the layout that was asked for, copy the rows there, and later bring the results back into
// rank-major rows, from where combine sends them.
//
// None of them waits for a peer. But for launch_sort they start when the kernel ahead has ended, not before
// as dispatch and combine may: blocks that held a place while a dispatch waits could keep the other rank's
// block, for which it waits, from finding one.
#pragma once

#include "launch.h"

namespace ep::cuda {

constexpr int kMaxTiles = 256;  // of a call: so many blocks count slots. Also in ep_backend/transports/gpu.py

// What a dispatch has received: slots of all sources, in order of source and token.
struct ReceivedSlots {
    const int32_t* ids;  // [count, top_k] global; -1: none, and all of a slot without an expert of this rank
    const float* weights;  // [count, top_k]
    const int16_t* local;  // [experts of all ranks] number among this rank's experts, -1: of another rank
    int32_t count;         // world * T
    int32_t top_k;
    int32_t experts;  // of this rank
};

// Places are numbers of rows, -1: none. Compact: one of each slot. Expert-major: top_k of each slot, the i-th
// row of expert e being number e * count + i.
struct IndexArgs {
    ReceivedSlots slots;
    int32_t* tile_counts;  // scratch, [kMaxTiles, experts + 1]
    int32_t* places;       // [count, 1 or top_k]
    // [experts + 1]: rows of each expert; then slots that have any expert of this rank, not from launch_sort.
    int32_t* totals;
    bool by_expert;
};

struct GatherArgs {
    ReceivedSlots slots;
    const int32_t* places;
    const char* rows;    // [count, row_bytes], a multiple of 16
    const char* scales;  // [count, scale_bytes], a multiple of 4; null: none
    char* out_rows;
    char* out_scales;
    bool scales_by_column;  // expert-major: [experts, scale_bytes / 4, count] words instead of the other way
    int32_t* out_ids;       // [rows, top_k]; null: none wanted
    float* out_weights;
    int64_t row_bytes, scale_bytes;
    int32_t places_per_slot;
    int32_t warps_per_row;  // chosen by the launch, and so is per_count
    Divisor per_count;
    int32_t pad_id;
    bool local_ids;
};

struct ReturnArgs {
    const char* y;  // the experts' results at their places: [rows, hidden]
    char* rows;     // [count, hidden] of the wire's format; slots without a place are left as they are
    const int32_t* places;
    const float* weights;  // [count, places_per_slot]; null: y are sums already, with one place per slot
    int32_t count, places_per_slot, hidden;
    int32_t warps_per_row;  // chosen by the launch
    DType y_type, wire;
};

// Asynchronous on `stream`, with at most `blocks` blocks each.
//
// Finds every place and counts rows: the same result in every run, whatever the order in which blocks come.
// An expert that stands twice in a token has two rows, unless it then has more than it has room for.
cudaError_t launch_index(const IndexArgs& a, int blocks, cudaStream_t stream);
// Copies received rows, scales, ids and weights to their places.
cudaError_t launch_gather(GatherArgs a, int blocks, cudaStream_t stream);
// Both, by_expert, where nobody must know in between how many rows there are. `gather` is of the same slots
// and places. Behind a dispatch that has at least `early_blocks` places reserved for the kernel behind it, at
// most so many blocks may come before it has ended.
cudaError_t launch_sort(const IndexArgs& a, GatherArgs gather, int blocks, int early_blocks,
                        cudaStream_t stream);
// All these kernels, for results that are of one of both formats; see Exchange::load_kernels.
cudaError_t load_layout_kernels(DType wire, DType out);
// Rank-major rows for combine: sums in fp32 in order of k, fused, rounded once to the wire's format.
cudaError_t launch_return(ReturnArgs a, int blocks, cudaStream_t stream);

}  // namespace ep::cuda
