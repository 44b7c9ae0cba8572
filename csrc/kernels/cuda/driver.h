// Functions of the CUDA driver, found at run time: the library also loads where there is no driver. And what
// host code beside the exchange needs of the runtime.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace ep::cuda {

inline void check(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // else the next launch would seem to have failed
    throw std::runtime_error(std::string("ep_backend: ") + what + " failed: " + cudaGetErrorString(error));
}

// The device that was current comes back, whatever happens.
class OnDevice {
  public:
    explicit OnDevice(int device) {
        check(cudaGetDevice(&before_), "cudaGetDevice");
        check(cudaSetDevice(device), "cudaSetDevice");
    }
    ~OnDevice() { cudaSetDevice(before_); }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

  private:
    int before_ = 0;
};

inline void enable_access(int from, int to) {
    const OnDevice on(from);
    const cudaError_t error = cudaDeviceEnablePeerAccess(to, 0);
    if (error == cudaErrorPeerAccessAlreadyEnabled)
        cudaGetLastError();  // as wanted
    else
        check(error, "cudaDeviceEnablePeerAccess");
}

template <class Function>
Function* driver(const char* name) {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status{};
    check(cudaGetDriverEntryPointByVersion(name, &found, 12040, cudaEnableDefault, &status), name);
    if (status != cudaDriverEntryPointSuccess || !found)
        throw std::runtime_error(std::string("ep_backend: the driver has no ") + name);
    return reinterpret_cast<Function*>(found);
}

// What a driver's function answered, in words.
inline std::string answer(const char* what, CUresult result) {
    const char* name = nullptr;
    driver<decltype(::cuGetErrorName)>("cuGetErrorName")(result, &name);
    return std::string(what) + " gives " + (name ? name : std::to_string(result));
}

}  // namespace ep::cuda
