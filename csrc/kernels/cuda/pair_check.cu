#include "pair_check.h"

#include <algorithm>
#include <stdexcept>

#include "../../common/ptx.cuh"
#include "driver.h"

namespace ep::cuda {
namespace {

constexpr int kCheckBlocks = 32;  // resident together on every GPU, so that none waits for a place
constexpr int kCheckThreads = 256;
constexpr int kStreamThreads = 512;
constexpr int kFlagWords = 16;  // a line each
constexpr int kFlags = kCheckBlocks + 1;
constexpr int kPingFlag = kCheckBlocks;
constexpr int kWarmUpRounds = 32;
constexpr int kMaxRepeats = 64;
constexpr float kMeasureMs = 5.0f;

struct Verdict {
    unsigned long long missing;  // blocks whose flag did not come
    unsigned long long wrong;    // words
};
struct PingTime {
    uint64_t ns;  // of all counted round trips; 0: an answer did not come
};

// A bijection of 32 bits (the finaliser of MurmurHash3): two seeds give different words at every place, so
// old rows are never taken for new ones.
__host__ __device__ inline uint32_t mixed(uint32_t x) {
    x ^= x >> 16;
    x *= 0x85EBCA6Bu;
    x ^= x >> 13;
    x *= 0xC2B2AE35u;
    return x ^ x >> 16;
}
__device__ inline uint4 pattern(uint32_t seed, int64_t place) {
    const auto word = static_cast<uint32_t>(place) * 4;
    return {mixed(seed ^ word), mixed(seed ^ (word + 1)), mixed(seed ^ (word + 2)), mixed(seed ^ (word + 3))};
}

__device__ inline void share_of(int64_t count, int64_t* first, int64_t* last) {
    *first = count * blockIdx.x / gridDim.x;
    *last = count * (blockIdx.x + 1) / gridDim.x;
}

__device__ bool wait_for(const uint64_t* flag, uint64_t value, uint64_t start, uint64_t timeout_ns) {
    for (int spins = 1;; ++spins) {
        if (ptx::load_flag(flag) == value) return true;
        if (spins % 64 == 0 && ptx::nanoseconds() - start > timeout_ns) return false;
    }
}

// On source. A flag per block, as in a dispatch with a chunk per block.
__global__ void store_rows(uint4* rows, uint64_t* flags, int64_t count, uint32_t seed, uint64_t round,
                           bool announce) {
    int64_t first, last;
    share_of(count, &first, &last);
    for (int64_t i = first + threadIdx.x; i < last; i += blockDim.x)
        ptx::store_row(rows + i, pattern(seed, i));
    __syncthreads();
    if (threadIdx.x == 0 && announce) {
        ptx::fence_system();
        ptx::store_flag(flags + blockIdx.x * kFlagWords, round);
    }
}

// On target, started before the stores are.
__global__ void read_rows(const uint4* rows, const uint64_t* flags, int64_t count, uint32_t seed,
                          uint64_t round, uint64_t timeout_ns, Verdict* verdict) {
    __shared__ bool came;
    if (threadIdx.x == 0) {
        came = wait_for(flags + blockIdx.x * kFlagWords, round, ptx::nanoseconds(), timeout_ns);
        if (!came) atomicAdd(&verdict->missing, 1ull);
    }
    __syncthreads();
    if (!came) return;
    int64_t first, last;
    share_of(count, &first, &last);
    unsigned wrong = 0;
    for (int64_t i = first + threadIdx.x; i < last; i += blockDim.x) {
        const uint4 found = ptx::load_row(rows + i), wanted = pattern(seed, i);
        wrong +=
            (found.x != wanted.x) + (found.y != wanted.y) + (found.z != wanted.z) + (found.w != wanted.w);
    }
    wrong = __reduce_add_sync(0xFFFFFFFFu, wrong);
    if (threadIdx.x % 32 == 0 && wrong) atomicAdd(&verdict->wrong, static_cast<unsigned long long>(wrong));
}

__global__ void ping(const uint64_t* mine, uint64_t* theirs, int rounds, uint64_t timeout_ns,
                     PingTime* time) {
    const uint64_t start = ptx::nanoseconds();
    uint64_t counted_from = start;
    for (int i = 1; i <= kWarmUpRounds + rounds; ++i) {
        ptx::store_flag(theirs, i);
        if (!wait_for(mine, i, start, timeout_ns)) return;
        if (i == kWarmUpRounds) counted_from = ptx::nanoseconds();
    }
    time->ns = ptx::nanoseconds() - counted_from;
}
__global__ void pong(const uint64_t* mine, uint64_t* theirs, int rounds, uint64_t timeout_ns) {
    const uint64_t start = ptx::nanoseconds();
    for (int i = 1; i <= kWarmUpRounds + rounds; ++i) {
        if (!wait_for(mine, i, start, timeout_ns)) return;
        ptx::store_flag(theirs, i);
    }
}

__global__ void stream_rows(uint4* rows, int64_t count, int repeats) {
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int repeat = 0; repeat < repeats; ++repeat) {
        const auto word = static_cast<uint32_t>(repeat);
        for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step)
            ptx::store_row(rows + i, {word, word, word, word});
    }
}

// The first launch of a kernel may load it, and so wait for what runs on the GPU. No kernel here may wait for
// one that is being loaded.
template <class... Kernels>
void load(Kernels... kernels) {
    cudaFuncAttributes attributes{};
    (check(cudaFuncGetAttributes(&attributes, kernels), "loading the kernels"), ...);
}

}  // namespace

PairAttributes pair_attributes(int source, int target) {
    int access = 0, atomics = 0;
    check(cudaDeviceCanAccessPeer(&access, source, target), "cudaDeviceCanAccessPeer");
    check(cudaDeviceGetP2PAttribute(&atomics, cudaDevP2PAttrNativeAtomicSupported, source, target),
          "cudaDeviceGetP2PAttribute");
    return {access != 0, atomics != 0};
}

GpuPair::GpuPair(int source, int target, int64_t bytes) : bytes_(bytes / 16 * 16) {
    if (source == target || bytes_ <= 0)
        throw std::runtime_error("ep_backend: two GPUs and a size were wanted");
    source_.device = source;
    target_.device = target;
    try {
        open(source_);
        open(target_);
        enable_access(source, target);
        back_ = pair_attributes(target, source).access;
        if (back_) enable_access(target, source);
        const OnDevice on(source);
        int sms = 0;
        check(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, source), "cudaDeviceGetAttribute");
        blocks_ = 2 * sms;
        check(cudaEventCreate(&begin_), "cudaEventCreate");
        check(cudaEventCreate(&end_), "cudaEventCreate");
    } catch (...) {
        close(source_);
        close(target_);
        throw;
    }
}

GpuPair::~GpuPair() {
    close(source_);
    close(target_);
}

void GpuPair::open(Side& side) {
    const OnDevice on(side.device);
    check(cudaMalloc(&side.rows, bytes_), "cudaMalloc");
    check(cudaMalloc(&side.flags, kFlags * kFlagWords * sizeof(uint64_t)), "cudaMalloc");
    check(cudaMalloc(&side.result, sizeof(Verdict)), "cudaMalloc");
    check(cudaStreamCreateWithFlags(&side.stream, cudaStreamNonBlocking), "cudaStreamCreate");
    check(cudaMemset(side.rows, 0xA5, bytes_), "cudaMemset");
    load(store_rows, read_rows, ping, pong, stream_rows);
    clear_flags(side);
}

// Errors cannot be reported here, and after most of them the process is of no more use.
void GpuPair::close(Side& side) {
    int before = 0;
    if (cudaGetDevice(&before) != cudaSuccess || cudaSetDevice(side.device) != cudaSuccess) return;
    if (&side == &source_) {
        if (begin_) cudaEventDestroy(begin_);
        if (end_) cudaEventDestroy(end_);
    }
    if (side.stream) cudaStreamDestroy(side.stream);
    cudaFree(side.rows);
    cudaFree(side.flags);
    cudaFree(side.result);
    cudaSetDevice(before);
}

void GpuPair::clear_flags(Side& side) {
    const OnDevice on(side.device);
    check(cudaMemset(side.flags, 0, kFlags * kFlagWords * sizeof(uint64_t)), "cudaMemset");
    check(cudaMemset(side.result, 0, sizeof(Verdict)), "cudaMemset");
    check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
}

StoreResult GpuPair::store(const StoreTest& test) {
    const int64_t count = bytes_ / 16;
    const auto timeout_ns = static_cast<uint64_t>(test.timeout_us) * 1000;
    auto* verdict = static_cast<Verdict*>(target_.result);
    clear_flags(target_);
    StoreResult result{};
    for (int round = 1; round <= test.rounds; ++round) {
        const auto pattern_of = [round](uint32_t seed) { return mixed(seed + static_cast<uint32_t>(round)); };
        {
            const OnDevice on(target_.device);
            read_rows<<<kCheckBlocks, kCheckThreads, 0, target_.stream>>>(
                reinterpret_cast<const uint4*>(target_.rows), target_.flags, count, pattern_of(test.expected),
                static_cast<uint64_t>(round), timeout_ns, verdict);
            check(cudaGetLastError(), "starting to read");
        }
        {
            const OnDevice on(source_.device);
            store_rows<<<kCheckBlocks, kCheckThreads, 0, source_.stream>>>(
                reinterpret_cast<uint4*>(target_.rows), target_.flags, count, pattern_of(test.seed),
                static_cast<uint64_t>(round), test.announce);
            check(cudaGetLastError(), "starting to store");
            check(cudaStreamSynchronize(source_.stream), "storing into the other GPU");
        }
        const OnDevice on(target_.device);
        check(cudaStreamSynchronize(target_.stream), "reading what was stored");
        Verdict found{};
        check(cudaMemcpy(&found, verdict, sizeof found, cudaMemcpyDeviceToHost), "cudaMemcpy");
        result.wrong = static_cast<int64_t>(found.wrong);
        if (found.missing) break;
        result.rounds = round;
    }
    return result;
}

double GpuPair::latency(int rounds, int64_t timeout_us) {
    if (!back_) return -1;
    const auto timeout_ns = static_cast<uint64_t>(timeout_us) * 1000;
    constexpr int kAt = kPingFlag * kFlagWords;
    clear_flags(source_);
    clear_flags(target_);
    {
        const OnDevice on(target_.device);
        pong<<<1, 1, 0, target_.stream>>>(target_.flags + kAt, source_.flags + kAt, rounds, timeout_ns);
        check(cudaGetLastError(), "starting the flags");
    }
    auto* time = static_cast<PingTime*>(source_.result);
    PingTime found{};
    {
        const OnDevice on(source_.device);
        ping<<<1, 1, 0, source_.stream>>>(source_.flags + kAt, target_.flags + kAt, rounds, timeout_ns, time);
        check(cudaGetLastError(), "starting the flags");
        check(cudaStreamSynchronize(source_.stream), "sending flags");
        check(cudaMemcpy(&found, time, sizeof found, cudaMemcpyDeviceToHost), "cudaMemcpy");
    }
    const OnDevice on(target_.device);
    check(cudaStreamSynchronize(target_.stream), "answering flags");
    return found.ns ? static_cast<double>(found.ns) * 1e-9 / (2.0 * rounds) : -1;
}

float GpuPair::milliseconds(bool copy_engine, int repeats) {
    check(cudaEventRecord(begin_, source_.stream), "cudaEventRecord");
    if (copy_engine) {
        for (int i = 0; i < repeats; ++i)
            check(cudaMemcpyPeerAsync(target_.rows, target_.device, source_.rows, source_.device, bytes_,
                                      source_.stream),
                  "cudaMemcpyPeerAsync");
    } else {
        stream_rows<<<blocks_, kStreamThreads, 0, source_.stream>>>(reinterpret_cast<uint4*>(target_.rows),
                                                                    bytes_ / 16, repeats);
        check(cudaGetLastError(), "starting to store");
    }
    check(cudaEventRecord(end_, source_.stream), "cudaEventRecord");
    check(cudaStreamSynchronize(source_.stream), "storing into the other GPU");
    float ms = 0;
    check(cudaEventElapsedTime(&ms, begin_, end_), "cudaEventElapsedTime");
    return std::max(ms, 1e-3f);
}

double GpuPair::bandwidth(bool copy_engine) {
    const OnDevice on(source_.device);
    milliseconds(copy_engine, 1);  // what is slow only the first time
    const float once = milliseconds(copy_engine, 1);
    const int repeats = std::clamp(static_cast<int>(kMeasureMs / once), 1, kMaxRepeats);
    return static_cast<double>(bytes_) * repeats / (milliseconds(copy_engine, repeats) * 1e-3);
}

std::string fabric_handle(int device) {
    const OnDevice on(device);
    check(cudaFree(nullptr), "starting CUDA");
    // As NCCL does before it relies on a fabric (mnnvl.cc): the driver's word alone is not enough.
    CUmemAllocationProp wanted{};
    wanted.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    wanted.requestedHandleTypes = CU_MEM_HANDLE_TYPE_FABRIC;
    wanted.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    wanted.location.id = device;
    size_t size = 0;
    CUresult result = driver<decltype(::cuMemGetAllocationGranularity)>("cuMemGetAllocationGranularity")(
        &size, &wanted, CU_MEM_ALLOC_GRANULARITY_MINIMUM);
    if (result != CUDA_SUCCESS) return answer("cuMemGetAllocationGranularity", result);
    CUmemGenericAllocationHandle memory{}, imported{};
    result = driver<decltype(::cuMemCreate)>("cuMemCreate")(&memory, size, &wanted, 0);
    if (result == CUDA_ERROR_OUT_OF_MEMORY)
        throw std::runtime_error("ep_backend: cuMemCreate: out of memory");
    if (result != CUDA_SUCCESS) return answer("cuMemCreate", result);
    auto* release = driver<decltype(::cuMemRelease)>("cuMemRelease");
    CUmemFabricHandle handle{};
    std::string problem;
    result = driver<decltype(::cuMemExportToShareableHandle)>("cuMemExportToShareableHandle")(
        &handle, memory, CU_MEM_HANDLE_TYPE_FABRIC, 0);
    if (result != CUDA_SUCCESS) {
        problem = answer("cuMemExportToShareableHandle", result);
    } else {
        result = driver<decltype(::cuMemImportFromShareableHandle)>("cuMemImportFromShareableHandle")(
            &imported, &handle, CU_MEM_HANDLE_TYPE_FABRIC);
        if (result != CUDA_SUCCESS)
            problem = answer("cuMemImportFromShareableHandle", result);
        else if ((result = release(imported)) != CUDA_SUCCESS)
            problem = answer("cuMemRelease", result);
    }
    result = release(memory);
    if (result != CUDA_SUCCESS && problem.empty()) problem = answer("cuMemRelease", result);
    return problem;
}

}  // namespace ep::cuda
