// The permutation that packs rows by destination and unpacks them again.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace ep::cuda {

// out[i] = rows[index[i]] for i in [0, n); both 16-byte aligned, row_bytes a multiple of 16. Asynchronous on
// `stream`.
cudaError_t gather_rows(void* out, const void* rows, const int64_t* index, int64_t n, int64_t row_bytes,
                        cudaStream_t stream);

}  // namespace ep::cuda
