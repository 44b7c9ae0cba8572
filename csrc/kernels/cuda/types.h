// Plain data that the host fills in and the kernels read.
#pragma once

#include <cuda_runtime.h>

#include <bit>
#include <cstdint>

#include "../../common/layout.h"
#include "../../common/numerics.h"
#include "../../common/status.h"

namespace ep::cuda {

constexpr int kThreads = 256;  // two blocks of an SM then have 128 registers a thread
constexpr int kWarps = kThreads / 32;
constexpr int kMaxSegments = 4;     // more pieces of one row than this do not make it faster
constexpr int kCopyWarps = 4;       // of a block of the bulk kernels
constexpr int kMaxBulkTokens = 32;  // of a chunk of the bulk kernels: a lane each
constexpr int kRouteWords = (kMaxWorld + 31) / 32;

// Where a channel's exchange is.
enum class Stage : uint32_t { kIdle = 0, kSent = 1, kReceived = 2, kReturned = 3 };

// n / d without a division, for 0 <= n < 2^31: with 2^(l - 1) < d <= 2^l and s = 31 + l, m = 2^s / d rounded
// up is below 2^32, and exact as n * (m * d - 2^s) < 2^31 * 2^l (Granlund and Montgomery). d = 0: 0.
struct Divisor {
    uint32_t m = 0;
    int32_t shift = 0;
    static Divisor of(int64_t d) {
        if (d == 0) return {};
        const int32_t shift = 31 + std::bit_width(static_cast<uint64_t>(d - 1));
        return {static_cast<uint32_t>(((int64_t{1} << shift) + d - 1) / d), shift};
    }
#if defined(__CUDACC__)
    __device__ int divide(int n) const {
        return static_cast<int>(uint64_t{static_cast<uint32_t>(n)} * m >> shift);
    }
#endif
};

#if defined(__CUDACC__)
// Warps in groups of so many, a power of two, each of which takes a row at a time: which group this thread is
// in, and which of a row's words it takes.
struct Groups {
    int group, groups, place, step;
    __device__ static Groups of_block(int warps) { return {warps, 0, kWarps}; }
    __device__ static Groups of_grid(int warps) {
        return {warps, static_cast<int>(blockIdx.x) * kWarps, static_cast<int>(gridDim.x) * kWarps};
    }

  private:
    __device__ Groups(int warps, int first, int all) {
        const int shift = __ffs(warps) - 1, warp = first + static_cast<int>(threadIdx.x) / 32;
        group = warp >> shift;
        groups = all >> shift;
        place = (warp & (warps - 1)) * 32 + static_cast<int>(threadIdx.x) % 32;
        step = warps * 32;
    }
};
#endif

// Whom a rank writes to in a pass of the staggered order, 1 to world. Passes go from group to group, inside
// the own first; in each of them all ranks of a group write to the same group, and every rank is written to
// by one. The last pass is the rank itself.
EP_HD inline int staggered_target(int rank, int world, int group, int pass) {
    return (rank / group + pass / group) % (world / group) * group + (rank + pass) % group;
}

// How early the kernel behind a dependent one may take its place: it must not keep another channel's kernel,
// for which a peer waits, from finding one.
enum class Early : uint32_t {
    kNever = 0,
    kNext = 1,  // room for two kernels of every channel: not before the one ahead has begun
    kAny = 2,   // no other channel: with all that are behind it
};

// The channel's device word, in this GPU's own memory. All blocks of a kernel read it; the last block that
// has read it writes it.
struct alignas(16) DeviceWord {
    uint64_t epoch;  // of the newest exchange
    Stage stage;
    int32_t tokens;        // of the open exchange
    uint32_t chunks;       // of the open exchange
    uint32_t ticket;       // blocks that have read it
    uint32_t sends, sums;  // of the bulk kernels: chunks, and pieces of chunks, that some warps have taken
};

// Where a failure is written, on the GPU for the kernels that follow and in pinned memory for the host.
struct ErrorCell {
    uint32_t stopped;   // any failure, or recovery has begun: later kernels return at once
    int32_t closed_by;  // rank + 1 of a peer that ended an exchange without its combine; does not stop
    uint64_t floor;     // abort words below this epoch are of before the last recovery
    uint64_t timeout_ns;
    ErrorWord word;
};

// How a call's tokens are divided. Depends only on what is equal on all ranks, so flags need no negotiation.
struct Plan {
    int32_t slots;  // T
    int32_t tokens_per_chunk;
    int32_t segments;      // a row is cut into so many pieces, each with a chunk of its own
    int32_t token_chunks;  // chunks = token_chunks * segments
    int32_t
        warps_per_token;  // power of two, at most kWarps; bulk: warps that send a chunk, at most kCopyWarps
    Divisor per_chunk, per_segments;  // by tokens_per_chunk, by segments
    bool bulk;                        // by bulk copies: for many tokens
    EP_HD int32_t chunks() const { return token_chunks * segments; }
};

// One rank's exchange as the kernels see it; passed by value.
struct View {
    WindowLayout layout;
    char* windows[kMaxWorld];  // where this rank writes for each
    // Where `mailed` ranks write for this one: host memory, or windows[rank] if there are none. The others,
    // this rank among them, write into windows[rank], where dispatch also brings what comes by the mailbox.
    char* mailbox;
    uint32_t mailed[kRouteWords];  // a bit per rank
    // Where combine's rows of the others are: windows[rank], or the mailbox if windows[rank] ends before
    // them.
    char* returns;
    DeviceWord* word;            // of the channel
    ErrorCell* error;            // on the GPU
    ErrorCell* host_error;       // pinned
    uint32_t* routes;            // [max_tokens, kRouteWords]: ranks that each own token went to
    const uint8_t* expert_rank;  // null: contiguous placement
    const int16_t* expert_local;
    uint64_t* mask;  // ranks that waits and sends leave out
    const Early* early;
    int32_t rank, world, top_k, channel;
    int32_t experts, experts_base,
        experts_more;                    // contiguous: the first experts_more ranks hold experts_base + 1
    Divisor per_base, per_base_and_one;  // by experts_base, by experts_base + 1
    int32_t pad_id;
    bool local_ids;
    // windows[d] of all others are one window of this GPU: what is for d stands where d would be the source,
    // until the host has it moved to d. Abort words stay there.
    bool staged;
    int32_t group;  // ranks, one after another, that share a link; divides world; for the staggered order
};

struct DispatchArgs {
    const char* x;
    const char* scales;
    const void* ids;
    const float* weights;
    const int32_t* device_tokens;  // null: tokens
    int32_t* out_ids;              // [world * T, top_k]
    float* out_weights;            // [world * T, top_k]
    int32_t* tokens_per_source;    // [world]
    Plan plan;
    int32_t tokens;
    DType x_type;
    bool quantize, ids_are_64_bit, send, receive;
};

struct CombineArgs {
    const char* y;  // [world * T, hidden], or with `places` the experts' results there: [rows, hidden]
    char* out;      // [tokens, hidden]
    // Null: y are this rank's sums. Else the weighted sums are made on the way: [world * T, top_k] each, a
    // number of a row, or -1.
    const int32_t* places;
    const float* weights;
    // With `places`, where sums must be rows before they are sent: [world * T, hidden] of the wire's format,
    // and how many blocks may make them.
    char* sums;
    int32_t return_blocks;
    Plan plan;
    int32_t hidden;
    int32_t warps_per_row;  // of the sending half: power of two, at most kWarps
    DType y_type, wire, out_type;
    bool send, receive;
};

// An exchange without rows: words with the weights there, weighted sums back.
struct SumsArgs {
    DispatchArgs ask;    // its ids, weights, tokens and plan
    CombineArgs answer;  // all of it but weights, sums and send; y, wire and out are of one type
    // Null, or of the exchange that has brought the rows, on all ranks: this one ends it, too.
    DeviceWord* ended;
};

}  // namespace ep::cuda
