// How the dispatch and combine kernels are started.
#pragma once

#include <algorithm>

#include "types.h"

namespace ep::cuda {

struct Launch {
    int blocks;  // 0: the kernel is only loaded
    cudaStream_t stream;
    bool dependent;  // compute capability 9.0 and later: may take its place before the kernel ahead of it has
                     // ended
    int threads = kThreads;
    int shared_bytes = 0;
    bool staggered = false;  // of dispatch and combine: everything to one rank, then to the next (see Hops)
};

cudaError_t launch_dispatch(const View& v, const DispatchArgs& a, const Launch& how);
cudaError_t launch_combine(const View& v, const CombineArgs& a, const Launch& how);
cudaError_t launch_sums(const View& v, const SumsArgs& a, const Launch& how);
cudaError_t launch_close(const View& v, bool send, const Launch& how);
cudaError_t launch_dispatch_bulk(const View& v, const DispatchArgs& a, Launch how);
cudaError_t launch_combine_bulk(const View& v, const CombineArgs& a, Launch how);
// Blocks of the largest kernel that one SM holds. Those of the bulk kernels must be asked for before the
// first launch: it lets them have their shared memory. 0 where there are no bulk copies.
int dispatch_blocks_per_sm();
int combine_blocks_per_sm();
int dispatch_bulk_blocks_per_sm();
int combine_bulk_blocks_per_sm();
int sums_blocks_per_sm();

#if defined(__CUDACC__)
template <class... Params>
cudaError_t launch(void (*kernel)(Params...), const Launch& how, const Params&... params) {
    if (how.blocks == 0) {
        cudaFuncAttributes attributes;
        return cudaFuncGetAttributes(&attributes, kernel);
    }
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(how.blocks));
    config.blockDim = dim3(static_cast<unsigned>(how.threads));
    config.dynamicSmemBytes = static_cast<size_t>(how.shared_bytes);
    config.stream = how.stream;
    cudaLaunchAttribute dependent{};
    dependent.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    dependent.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &dependent;
    config.numAttrs = how.dependent ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, params...);
}

template <class Kernel>
int resident_blocks(Kernel kernel, int threads = kThreads, int shared_bytes = 0) {
    int blocks = 0;
    if (shared_bytes &&
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes)) {
        cudaGetLastError();  // more than the GPU has
        return 0;
    }
    return cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes) ==
                   cudaSuccess
               ? blocks
               : 0;
}
#endif

}  // namespace ep::cuda
