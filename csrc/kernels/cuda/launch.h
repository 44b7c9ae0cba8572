// How the dispatch and combine kernels are started.
#pragma once

#include "types.h"

namespace ep::cuda {

struct Launch {
    int blocks;
    cudaStream_t stream;
    bool dependent;  // compute capability 9.0 and later: may take its place before the kernel ahead of it has
                     // ended
};

cudaError_t launch_dispatch(const View& v, const DispatchArgs& a, const Launch& how);
cudaError_t launch_combine(const View& v, const CombineArgs& a, const Launch& how);
int dispatch_blocks_per_sm();
int combine_blocks_per_sm();

#if defined(__CUDACC__)
template <class... Params>
cudaError_t launch(void (*kernel)(Params...), const Launch& how, const Params&... params) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(how.blocks));
    config.blockDim = dim3(kThreads);
    config.stream = how.stream;
    cudaLaunchAttribute dependent{};
    dependent.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    dependent.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &dependent;
    config.numAttrs = how.dependent ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, params...);
}

template <class Kernel>
int resident_blocks(Kernel kernel) {
    int blocks = 0;
    return cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, 0) == cudaSuccess ? blocks
                                                                                                      : 0;
}
#endif

}  // namespace ep::cuda
