// Operators of the CUDA kernels; see ops.h.
#include <torch/csrc/stable/accelerator.h>

#include "../kernels/cuda/gather_rows.h"
#include "current_stream.h"
#include "ops.h"

namespace ep::ops {

void gather_rows_cuda(Tensor rows, Tensor index, Tensor out) {
    const torch::stable::accelerator::DeviceGuard guard(out.get_device_index());
    const int64_t element = out.numel() ? static_cast<int64_t>(out.element_size()) : 1;
    const cudaError_t error =
        cuda::gather_rows(out.data_ptr(), rows.data_ptr(), static_cast<const int64_t*>(index.data_ptr()),
                          index.numel(), out.size(1) * element, current_stream(out.get_device_index()));
    STD_TORCH_CHECK(error == cudaSuccess, "ep_backend: gather_rows failed: ", cudaGetErrorString(error));
}

}  // namespace ep::ops
