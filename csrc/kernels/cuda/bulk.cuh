// What the kernels for many tokens share: rows move by bulk copies through shared memory, issued by one lane
// of a few warps, while the other warps of the block do what waits for the peers. A few blocks fill the link.
// Two blocks fit an SM, as with the kernels for few tokens, so the rule of residency is the same.
#pragma once

#include "exchange.cuh"

namespace ep::cuda {

constexpr int kBulkThreads = 384;  // two blocks of an SM then have 80 registers a thread
constexpr int kBulkWarps = kBulkThreads / 32;
constexpr int kSlots = 3;          // pieces of rows that a copying warp has in shared memory
constexpr int kPieceBytes = 8192;  // at most
constexpr int kIdsAhead = 8;       // expert ids of a token that a lane loads at once
constexpr int kRingBytes = kCopyWarps * kSlots * kPieceBytes;

// A row in equal pieces of whole fp8 blocks.
struct Pieces {
    int count, bytes, last;
    __device__ explicit Pieces(int row_bytes) {
        count = (row_bytes + kPieceBytes - 1) / kPieceBytes;
        bytes = ((row_bytes + count - 1) / count + 127) & ~127;
        count = (row_bytes + bytes - 1) / bytes;
        last = row_bytes - (count - 1) * bytes;
    }
    __device__ int size(int piece) const { return piece == count - 1 ? last : bytes; }
};

#ifdef EP_BULK
// The pieces that one lane moves: loads run ahead of stores.
struct Ring {
    char* slots;
    uint64_t* barriers;
    int loaded, stored;
    __device__ void init(char* memory, uint64_t* bars) {
        slots = memory, barriers = bars, loaded = stored = 0;
        for (int i = 0; i < kSlots; ++i) ptx::barrier_init(bars + i);
        ptx::fence_async_shared();
    }
};

// Units first, first + step, ... below `units`: from(u, bytes) is where a live one comes from, null for
// others; store(u, slot, bytes) issues its stores. Returns when all have landed.
template <class From, class Store>
__device__ void pump(Ring& ring, int units, int first, int step, From from, Store store) {
    struct Cursor {
        int unit, bytes;
        const char* from;
    };
    auto find = [&](Cursor& c) {
        for (c.from = nullptr; c.unit < units; c.unit += step)
            if ((c.from = from(c.unit, c.bytes)) != nullptr) return;
    };
    Cursor load{first, 0, nullptr}, out{first, 0, nullptr};
    find(load), find(out);
    while (out.from) {
        while (load.from && ring.loaded - ring.stored < kSlots - 1) {
            // The slot's last store is not the newest one.
            if (ring.loaded >= kSlots) ptx::bulk_wait_read<1>();
            const int slot = ring.loaded++ % kSlots;
            ptx::bulk_load(ring.slots + slot * kPieceBytes, load.from, load.bytes, ring.barriers + slot);
            load.unit += step;
            find(load);
        }
        const int slot = ring.stored % kSlots;
        ptx::barrier_wait(ring.barriers + slot, ring.stored / kSlots & 1);
        store(out.unit, ring.slots + slot * kPieceBytes, out.bytes);
        ptx::bulk_commit();
        ++ring.stored;
        out.unit += step;
        find(out);
    }
    ptx::bulk_wait();
}
#endif

}  // namespace ep::cuda
