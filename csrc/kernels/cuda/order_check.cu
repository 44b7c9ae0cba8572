#include "order_check.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>

#include "../../common/ptx.cuh"
#include "driver.h"
#include "types.h"

namespace ep::cuda {
namespace {

constexpr int kMaxTargets = 15;
constexpr int kLoads = 4;                 // 16-byte stores of a thread to one target, as in dispatch
constexpr int kPieceWords = 32 * kLoads;  // of 16 bytes: what a warp stores before it turns to the next
constexpr int kTries = 3;                 // the best counts
constexpr int kMaxRepeats = 64;
constexpr double kMeasureS = 10e-3, kSlowS = 50e-3;

struct Targets {
    uint4* rows[kMaxTargets];
    int count;
};

__global__ void store_in_turn(const __grid_constant__ Targets to, int64_t pieces, int repeats) {
    const int64_t warps = static_cast<int64_t>(gridDim.x) * blockDim.x / 32;
    const int64_t warp = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
    for (int repeat = 0; repeat < repeats; ++repeat) {
        const auto word = static_cast<uint32_t>(repeat);
        for (int64_t piece = warp; piece < pieces; piece += warps)
            for (int n = 0; n < to.count; ++n) {
                uint4* const at = to.rows[n] + piece * kPieceWords + threadIdx.x % 32;
#pragma unroll
                for (int i = 0; i < kLoads; ++i) ptx::store_row(at + 32 * i, {word, word, word, word});
            }
    }
}

// A stream of each rank, and memory into which each of the others stores.
class Ranks {
  public:
    Ranks(const std::vector<int>& devices, int group, int64_t bytes)
        : ranks_(devices.size()), group_(group), pieces_(bytes / (kPieceWords * 16)) {
        if (devices.size() < 2 || devices.size() > kMaxTargets + 1 || group < 1 ||
            devices.size() % group != 0 || pieces_ <= 0)
            throw std::runtime_error("ep_backend: 2 to 16 GPUs in equal groups and a size were wanted");
        try {
            for (size_t r = 0; r < devices.size(); ++r) open(ranks_[r], devices[r]);
            for (const int from : devices)
                for (const int to : devices)
                    if (from != to) enable_access(from, to);
        } catch (...) {
            close();
            throw;
        }
    }
    ~Ranks() { close(); }
    Ranks(const Ranks&) = delete;
    Ranks& operator=(const Ranks&) = delete;

    // Bytes per second that a rank stores. Both orders have as many launches, and wait as often.
    double rate(bool staggered, int repeats) {
        const auto start = std::chrono::steady_clock::now();
        const int world = static_cast<int>(ranks_.size()), others = world - 1;
        for (int step = 1; step <= others; ++step) {
            for (int r = 0; r < world; ++r) {
                Targets to{};
                if (staggered)
                    to.rows[to.count++] = part(ranks_[staggered_target(r, world, group_, step)], r);
                else
                    for (int n = 1; n <= others; ++n) to.rows[to.count++] = part(ranks_[(r + n) % world], r);
                const OnDevice on(ranks_[r].device);
                store_in_turn<<<ranks_[r].blocks, kThreads, 0, ranks_[r].stream>>>(
                    to, pieces_, staggered ? others * repeats : repeats);
                check(cudaGetLastError(), "starting to store");
            }
            for (const Rank& rank : ranks_) {
                const OnDevice on(rank.device);
                check(cudaStreamSynchronize(rank.stream), "storing into the other GPUs");
            }
        }
        const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
        return bytes_of(repeats) / took.count();
    }
    // That a rank stores in a call of `rate`.
    double bytes_of(int repeats) const {
        const auto others = static_cast<double>(ranks_.size() - 1);
        return others * others * repeats * static_cast<double>(pieces_) * kPieceWords * 16;
    }

  private:
    struct Rank {
        int device = 0, blocks = 0;
        cudaStream_t stream = nullptr;
        uint4* rows = nullptr;
    };
    void open(Rank& rank, int device) {
        rank.device = device;
        const OnDevice on(device);
        check(cudaDeviceGetAttribute(&rank.blocks, cudaDevAttrMultiProcessorCount, device),
              "cudaDeviceGetAttribute");
        check(cudaMalloc(&rank.rows, ranks_.size() * pieces_ * kPieceWords * 16), "cudaMalloc");
        check(cudaStreamCreateWithFlags(&rank.stream, cudaStreamNonBlocking), "cudaStreamCreate");
    }
    uint4* part(const Rank& of, int source) const { return of.rows + source * pieces_ * kPieceWords; }
    // Errors cannot be reported here, and after most of them the process is of no more use.
    void close() {
        int before = 0;
        if (cudaGetDevice(&before) != cudaSuccess) return;
        for (const Rank& rank : ranks_) {
            if (cudaSetDevice(rank.device) != cudaSuccess) continue;
            if (rank.stream) cudaStreamDestroy(rank.stream);
            cudaFree(rank.rows);
        }
        cudaSetDevice(before);
    }

    std::vector<Rank> ranks_;
    int group_;
    int64_t pieces_;
};

}  // namespace

OrderRates order_rates(const std::vector<int>& devices, int group, int64_t bytes) {
    Ranks ranks(devices, group, bytes);
    ranks.rate(false, 1);  // what is slow only the first time
    const double once = ranks.bytes_of(1) / ranks.rate(false, 1);
    const int repeats = std::clamp(static_cast<int>(kMeasureS / once), 1, kMaxRepeats);
    OrderRates best{};
    for (int i = 0; i < (once > kSlowS ? 1 : kTries); ++i) {
        best.together = std::max(best.together, ranks.rate(false, repeats));
        best.staggered = std::max(best.staggered, ranks.rate(true, repeats));
    }
    return best;
}

}  // namespace ep::cuda
