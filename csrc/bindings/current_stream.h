// The one thing that differs between the CPU and the CUDA builds of PyTorch: only the latter has a current
// CUDA stream. The reference is weak, so that one library loads under both; it is null under a CPU build,
// where no CUDA operator runs.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/Exception.h>

extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device,
                                                                                   void** stream);

namespace ep::ops {

inline cudaStream_t current_stream(int32_t device) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                    "ep_backend: this build of PyTorch has no CUDA");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    return static_cast<cudaStream_t>(stream);
}

}  // namespace ep::ops
