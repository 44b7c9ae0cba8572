#include <algorithm>

#include "gather_rows.h"

namespace ep::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kInFlight = 4;  // 16-byte loads a thread issues before its first store

__global__ void __launch_bounds__(kThreads)
    gather_rows_kernel(uint4* __restrict__ out, const uint4* __restrict__ rows,
                       const int64_t* __restrict__ index, int64_t n, int row_words) {
    for (int64_t row = blockIdx.x; row < n; row += gridDim.x) {
        const uint4* from = rows + index[row] * row_words;
        uint4* to = out + row * row_words;
        for (int first = threadIdx.x; first < row_words; first += kThreads * kInFlight) {
            uint4 word[kInFlight];
#pragma unroll
            for (int i = 0; i < kInFlight; ++i)
                if (first + i * kThreads < row_words) word[i] = from[first + i * kThreads];
#pragma unroll
            for (int i = 0; i < kInFlight; ++i)
                if (first + i * kThreads < row_words) to[first + i * kThreads] = word[i];
        }
    }
}

}  // namespace

cudaError_t gather_rows(void* out, const void* rows, const int64_t* index, int64_t n, int64_t row_bytes,
                        cudaStream_t stream) {
    if (n == 0) return cudaSuccess;
    const auto blocks = static_cast<unsigned>(std::min<int64_t>(n, 4096));
    gather_rows_kernel<<<blocks, kThreads, 0, stream>>>(static_cast<uint4*>(out),
                                                        static_cast<const uint4*>(rows), index, n,
                                                        static_cast<int>(row_bytes / 16));
    return cudaGetLastError();
}

}  // namespace ep::cuda
