// Memory of a GPU that processes of one machine share by descriptors (cuMem). It is freed when no process has
// it mapped any more, in whatever order they let go of it.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace ep::cuda {

struct SharedMemory {
    char* address;
    int64_t bytes;   // as mapped: rounded up
    int descriptor;  // the caller closes it
};

// At least `bytes` of `device`, zeroed. Throws std::runtime_error if the driver refuses.
SharedMemory make_shared_memory(int device, int64_t bytes);

// What a peer has made with the same number of bytes, mapped for `device`, which must reach the peer's GPU;
// the descriptor stays the caller's. Throws std::runtime_error if the driver refuses.
SharedMemory map_shared_memory(int device, int descriptor, int64_t bytes);

// Never throws: at the end of a process the driver may be gone already.
void unmap_shared_memory(char* address, int64_t bytes) noexcept;

}  // namespace ep::cuda
