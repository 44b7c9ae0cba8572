// Whether two GPUs of one process can do what transport `peer` needs: one stores rows into the other's memory
// and then a flag, and the other, which waits for the flag, reads the rows. Everything that waits on a GPU
// gives up after a time.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <string>

namespace ep::cuda {

struct PairAttributes {
    bool access;   // the driver offers source access to target's memory
    bool atomics;  // recorded; the protocol needs none
};
PairAttributes pair_attributes(int source, int target);

struct StoreTest {
    uint32_t seed;      // of the pattern that is stored
    uint32_t expected;  // of the pattern that is looked for: differs only in tests
    int rounds;         // each with a pattern of its own
    bool announce;      // false only in tests: the flags are left out
    int64_t timeout_us;
};
struct StoreResult {
    int64_t rounds;  // whose flags all came
    int64_t wrong;   // words that were read and not as they were stored
};

// Buffers, streams and peer access of one ordered pair. Constructing it throws if memory, the driver or the
// GPUs do not allow the test; the tests throw if CUDA reports an error.
class GpuPair {
  public:
    GpuPair(int source, int target, int64_t bytes);
    ~GpuPair();
    GpuPair(const GpuPair&) = delete;
    GpuPair& operator=(const GpuPair&) = delete;

    StoreResult store(const StoreTest& test);
    // Seconds that a flag takes one way: half of a round trip. Negative: no access back, or no answer in
    // time.
    double latency(int rounds, int64_t timeout_us);
    // Bytes per second from source to target, stored by SMs or moved by the copy engine.
    double bandwidth(bool copy_engine);

  private:
    struct Side {
        int device = 0;
        cudaStream_t stream = nullptr;
        char* rows = nullptr;
        uint64_t* flags = nullptr;  // a line each
        void* result = nullptr;     // what a kernel of this GPU found
    };
    void open(Side& side);
    void close(Side& side);
    void clear_flags(Side& side);
    float milliseconds(bool copy_engine, int repeats);

    Side source_, target_;
    int64_t bytes_;
    int blocks_ = 0;  // that fill the source GPU
    bool back_ = false;
    cudaEvent_t begin_ = nullptr, end_ = nullptr;
};

// Allocates, exports, imports and releases memory under a fabric handle. Empty: all of it worked; else what
// did not. Throws where nothing can be said: no memory, no context.
std::string fabric_handle(int device);

}  // namespace ep::cuda
