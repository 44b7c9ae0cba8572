// CUDA C++ for a CPU, as much of it as the kernels here use, to test what they do without a GPU: which rows
// go where, what waits for what. Not how memory is ordered, and no time.
//
// A block is a thread of the operating system, a CUDA thread a fiber in it. Fibers take turns where they
// wait: at barriers, in what the lanes of a warp do together, and in loads of flags. A launch returns when
// its kernel has ended, so the ranks of an exchange are threads that launch at the same time.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

namespace emulated {

constexpr int kStackBytes = 128 * 1024;
constexpr unsigned kWarp = 32;

struct Fiber {
    ucontext_t context{};
    std::unique_ptr<char[]> stack{new char[kStackBytes]};
    bool done = false;
};

// What lanes give to each other. Two buffers: a lane may come again before a slow one has looked.
struct Lanes {
    unsigned arrived = 0;
    uint64_t turn = 0;
    uint64_t values[2][kWarp] = {};
};

class Block {
  public:
    Block(unsigned index, unsigned blocks, unsigned threads, size_t shared_bytes,
          std::function<void()> kernel)
        : index_(index),
          blocks_(blocks),
          shared_(shared_bytes / 8 + 1),
          kernel_(std::move(kernel)),
          fibers_(threads) {}

    void run() {
        here() = this;
        live_ = static_cast<unsigned>(fibers_.size());
        for (Fiber& fiber : fibers_) {
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = fiber.stack.get();
            fiber.context.uc_stack.ss_size = kStackBytes;
            fiber.context.uc_link = &scheduler_;
            makecontext(&fiber.context, &Block::start, 0);
        }
        while (live_) {
            for (current_ = 0; current_ < fibers_.size(); ++current_)
                if (!fibers_[current_].done) swapcontext(&scheduler_, &fibers_[current_].context);
            std::this_thread::yield();
        }
        here() = nullptr;
    }

    static Block*& here() {
        static thread_local Block* block = nullptr;
        return block;
    }

    void let_others() { swapcontext(&fibers_[current_].context, &scheduler_); }

    // All threads of the block that have not ended; the or, and the and, of what they bring.
    std::pair<int, int> barrier(int value) {
        or_ |= value != 0;
        and_ &= value != 0;
        const uint64_t turn = barrier_turn_;
        ++arrived_;
        release();
        while (turn == barrier_turn_) let_others();
        return {result_or_, result_and_};
    }

    const uint64_t* exchange(unsigned mask, uint64_t value) {
        Lanes& e = lanes_[{current_ / kWarp, mask}];
        const uint64_t turn = e.turn;
        uint64_t* const values = e.values[turn % 2];
        values[current_ % kWarp] = value;
        if (++e.arrived == static_cast<unsigned>(__builtin_popcount(mask))) {
            e.arrived = 0;
            ++e.turn;
        }
        while (turn == e.turn) let_others();
        return values;
    }

    unsigned thread() const { return current_; }
    unsigned index() const { return index_; }
    unsigned blocks() const { return blocks_; }
    void* shared() { return shared_.data(); }

  private:
    static void start() {
        Block* const block = here();
        block->kernel_();
        block->fibers_[block->current_].done = true;
        --block->live_;
        block->release();
    }
    void release() {
        if (!arrived_ || arrived_ < live_) return;
        result_or_ = or_, result_and_ = and_;
        or_ = 0, and_ = 1;
        arrived_ = 0;
        ++barrier_turn_;
    }

    unsigned index_, blocks_;
    std::vector<uint64_t> shared_;
    std::function<void()> kernel_;
    std::vector<Fiber> fibers_;
    ucontext_t scheduler_{};
    unsigned current_ = 0, live_ = 0, arrived_ = 0;
    uint64_t barrier_turn_ = 0;
    int or_ = 0, and_ = 1, result_or_ = 0, result_and_ = 0;
    std::map<std::pair<unsigned, unsigned>, Lanes> lanes_;  // by warp and mask
};

inline Block& block() {
    return *Block::here();
}
inline void let_others() {
    if (Block::here()) block().let_others();
}

template <class T>
uint64_t bits(T value) {
    uint64_t word = 0;
    std::memcpy(&word, &value, sizeof value);
    return word;
}
template <class T>
T value_of(uint64_t word) {
    T value;
    std::memcpy(&value, &word, sizeof value);
    return value;
}

// threadIdx and the like.
template <unsigned (Block::*kWhich)() const>
struct Index {
    struct {
        operator unsigned() const { return (block().*kWhich)(); }
    } x;
};

}  // namespace emulated

#define __CUDACC__ 1
#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static thread_local

inline constexpr emulated::Index<&emulated::Block::thread> threadIdx{};
inline constexpr emulated::Index<&emulated::Block::index> blockIdx{};
inline constexpr emulated::Index<&emulated::Block::blocks> gridDim{};

using std::max;
using std::min;

struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct dim3 {
    unsigned x;
    explicit dim3(unsigned n = 1) : x(n) {}
};

inline void __syncthreads() {
    emulated::block().barrier(0);
}
inline int __syncthreads_or(int value) {
    return emulated::block().barrier(value).first;
}
inline int __syncthreads_and(int value) {
    return emulated::block().barrier(value).second;
}
inline void __syncwarp() {
    emulated::block().exchange(0xFFFFFFFFu, 0);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
    return emulated::value_of<T>(emulated::block().exchange(mask, emulated::bits(value))[lane % 32]);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
    const unsigned mine = emulated::block().thread() % 32;
    return emulated::value_of<T>(emulated::block().exchange(mask, emulated::bits(value))[mine ^ lanes]);
}
inline int __any_sync(unsigned mask, bool value) {
    const uint64_t* values = emulated::block().exchange(mask, value);
    bool any = false;
    for (unsigned lane = 0; lane < 32; ++lane) any |= (mask >> lane & 1) && values[lane];
    return any;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
    const uint64_t mine = emulated::bits(value), *values = emulated::block().exchange(mask, mine);
    unsigned same = 0;
    for (unsigned lane = 0; lane < 32; ++lane)
        if (mask >> lane & 1 && values[lane] == mine) same |= 1u << lane;
    return same;
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value) {
    const uint64_t* values = emulated::block().exchange(mask, value);
    unsigned all = 0;
    for (unsigned lane = 0; lane < 32; ++lane)
        if (mask >> lane & 1) all |= static_cast<unsigned>(values[lane]);
    return all;
}
inline unsigned __ballot_sync(unsigned mask, bool value) {
    return __reduce_or_sync(mask, value ? 1u << emulated::block().thread() % 32 : 0);
}
inline int __ffs(unsigned value) {
    return __builtin_ffs(static_cast<int>(value));
}
inline int __popc(unsigned value) {
    return __builtin_popcount(value);
}
inline float __fmaf_rn(float a, float b, float c) {
    return std::fma(a, b, c);
}
inline float __uint_as_float(uint32_t word) {
    return emulated::value_of<float>(word);
}
inline void __threadfence() {
    std::atomic_thread_fence(std::memory_order_seq_cst);
}
inline void __threadfence_system() {
    std::atomic_thread_fence(std::memory_order_seq_cst);
}
inline void __nanosleep(unsigned) {}
template <class T, class U>
T atomicAdd(T* at, U value) {
    return __atomic_fetch_add(at, static_cast<T>(value), __ATOMIC_SEQ_CST);
}
template <class T, class U>
T atomicExch(T* at, U value) {
    return __atomic_exchange_n(at, static_cast<T>(value), __ATOMIC_SEQ_CST);
}

enum cudaError_t { cudaSuccess = 0 };
using cudaStream_t = void*;
enum { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
enum { cudaDevAttrMultiProcessorCount, cudaDevAttrComputeCapabilityMajor };
enum { cudaHostAllocMapped };
enum { cudaLaunchAttributeProgrammaticStreamSerialization };
enum { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaLaunchAttribute {
    int id;
    struct {
        int programmaticStreamSerializationAllowed;
    } val;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    int numAttrs;
};
inline const char* cudaGetErrorString(cudaError_t) {
    return "none";
}
inline cudaError_t cudaGetLastError() {
    return cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() {
    return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
    return *device = 0, cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, int attribute, int) {
    *value = attribute == cudaDevAttrMultiProcessorCount ? 1 << 16 : 8;
    return cudaSuccess;
}
template <class T>
cudaError_t cudaMalloc(T** at, int64_t bytes) {
    *at = static_cast<T*>(std::aligned_alloc(256, static_cast<size_t>((bytes + 255) / 256 * 256)));
    return cudaSuccess;
}
template <class T>
cudaError_t cudaHostAlloc(T** at, int64_t bytes, int) {
    return cudaMalloc(at, bytes);
}
inline cudaError_t cudaFree(void* at) {
    return std::free(at), cudaSuccess;
}
inline cudaError_t cudaFreeHost(void* at) {
    return std::free(at), cudaSuccess;
}
inline cudaError_t cudaMemset(void* at, int byte, int64_t bytes) {
    return std::memset(at, byte, static_cast<size_t>(bytes)), cudaSuccess;
}
inline cudaError_t cudaMemcpy(void* to, const void* from, int64_t bytes, int) {
    return std::memcpy(to, from, static_cast<size_t>(bytes)), cudaSuccess;
}
struct cudaFuncAttributes {};
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) {
    return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, int, int) {
    return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
    return *blocks = 2, cudaSuccess;
}
template <class... Params, class... Given>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* how, void (*kernel)(Params...),
                               const Given&... given) {
    std::vector<std::thread> blocks;
    for (unsigned b = 0; b < how->gridDim.x; ++b)
        blocks.emplace_back([=] {
            emulated::Block(b, how->gridDim.x, how->blockDim.x, how->dynamicSmemBytes, [=] {
                kernel(given...);
            }).run();
        });
    for (std::thread& block : blocks) block.join();
    return cudaSuccess;
}
