// How fast GPUs write and read pinned memory of the host, by stores and loads of their SMs and by their copy
// engines, one GPU and all at once, one direction and both: what transport host can reach on a machine. Both
// also with stores one way and copy engines the other.
//
//   nvcc -O3 -std=c++17 -arch=native benchmarks/host_memory.cu -o /tmp/host_memory && /tmp/host_memory
//
// With several GPUs each writes the memory that the next one reads in the exchange. Prints JSON, GB/s.
#include <cuda_runtime.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

namespace {

constexpr size_t kBytes = 64 << 20;
constexpr int kRounds = 8, kBlocks = 66, kThreads = 256, kAhead = 8;

void check(cudaError_t error) {
    if (error == cudaSuccess) return;
    std::fprintf(stderr, "%s\n", cudaGetErrorString(error));
    std::exit(1);
}

__global__ void store(uint4* to, size_t words) {
    const size_t step = static_cast<size_t>(gridDim.x) * blockDim.x;
    for (int round = 0; round < kRounds; ++round)
        for (size_t i = blockIdx.x * blockDim.x + threadIdx.x; i < words; i += step)
            to[i] = make_uint4(round, 1, 2, 3);
}

__global__ void load(const uint4* from, uint4* to, size_t words) {
    const size_t step = static_cast<size_t>(gridDim.x) * blockDim.x;
    for (int round = 0; round < kRounds; ++round)
        for (size_t i = blockIdx.x * blockDim.x + threadIdx.x; i < words; i += step * kAhead) {
            uint4 word[kAhead];
#pragma unroll
            for (int k = 0; k < kAhead; ++k)
                if (i + k * step < words) word[k] = __ldcv(from + i + k * step);
#pragma unroll
            for (int k = 0; k < kAhead; ++k)
                if (i + k * step < words) to[i + k * step] = word[k];
        }
}

struct Memory {
    void *written, *read, *device;
};

struct Rates {
    double write = 0, read = 0;
};

struct Way {
    const char* name;
    bool engines_write, engines_read;
};

constexpr Way kWays[] = {
    {"SMs", false, false}, {"copy engines", true, true}, {"SMs write, copy engines read", false, true}};

// One GPU's part: both directions start together, twice; the second time counts.
Rates measure(int gpu, const Memory& own, void* target, bool writes, bool reads, const Way& way,
              std::atomic<int>& ready, int gpus) {
    check(cudaSetDevice(gpu));
    cudaStream_t streams[2];
    cudaEvent_t begin[2], end[2];
    for (int i = 0; i < 2; ++i) {
        check(cudaStreamCreateWithFlags(&streams[i], cudaStreamNonBlocking));
        check(cudaEventCreate(&begin[i]));
        check(cudaEventCreate(&end[i]));
    }
    constexpr size_t kWords = kBytes / sizeof(uint4);
    for (int turn = 1; turn <= 2; ++turn) {
        ++ready;
        while (ready < gpus * turn) {
        }
        if (writes) {
            check(cudaEventRecord(begin[0], streams[0]));
            if (!way.engines_write)
                store<<<kBlocks, kThreads, 0, streams[0]>>>(static_cast<uint4*>(target), kWords);
            for (int round = 0; round < kRounds && way.engines_write; ++round)
                check(cudaMemcpyAsync(target, own.device, kBytes, cudaMemcpyDeviceToHost, streams[0]));
            check(cudaEventRecord(end[0], streams[0]));
        }
        if (reads) {
            check(cudaEventRecord(begin[1], streams[1]));
            if (!way.engines_read)
                load<<<kBlocks, kThreads, 0, streams[1]>>>(static_cast<const uint4*>(own.read),
                                                           static_cast<uint4*>(own.device), kWords);
            for (int round = 0; round < kRounds && way.engines_read; ++round)
                check(cudaMemcpyAsync(own.device, own.read, kBytes, cudaMemcpyHostToDevice, streams[1]));
            check(cudaEventRecord(end[1], streams[1]));
        }
        check(cudaDeviceSynchronize());
    }
    auto rate = [&](int i) {
        float ms = 0;
        check(cudaEventElapsedTime(&ms, begin[i], end[i]));
        return kRounds * static_cast<double>(kBytes) / ms / 1e6;
    };
    return {writes ? rate(0) : 0, reads ? rate(1) : 0};
}

}  // namespace

int main() {
    int gpus = 0;
    check(cudaGetDeviceCount(&gpus));
    std::vector<Memory> memory(gpus);
    for (int i = 0; i < gpus; ++i) {
        check(cudaSetDevice(i));
        check(cudaHostAlloc(&memory[i].written, kBytes, cudaHostAllocPortable | cudaHostAllocMapped));
        check(cudaHostAlloc(&memory[i].read, kBytes, cudaHostAllocPortable | cudaHostAllocMapped));
        check(cudaMalloc(&memory[i].device, kBytes));
    }
    const char* comma = "[\n";
    for (int used : {1, gpus}) {
        for (const Way& way : kWays)
            for (int mode = 1; mode <= 3; ++mode) {
                const bool writes = mode & 1, reads = mode & 2;
                if (!(writes && reads) && way.engines_write != way.engines_read) continue;  // seen already
                std::atomic<int> ready{0};
                std::vector<Rates> rates(used);
                std::vector<std::thread> threads;
                for (int i = 0; i < used; ++i)
                    threads.emplace_back([&, i] {
                        rates[i] = measure(i, memory[i], memory[(i + 1) % used].written, writes, reads, way,
                                           ready, used);
                    });
                for (auto& thread : threads) thread.join();
                std::printf("%s  {\"gpus\": %d, \"by\": \"%s\", \"write\": [", comma, used, way.name);
                for (int i = 0; i < used; ++i) std::printf("%s%.1f", i ? ", " : "", rates[i].write);
                std::printf("], \"read\": [");
                for (int i = 0; i < used; ++i) std::printf("%s%.1f", i ? ", " : "", rates[i].read);
                std::printf("]}");
                comma = ",\n";
            }
        if (gpus == 1) break;
    }
    std::printf("\n]\n");
}
