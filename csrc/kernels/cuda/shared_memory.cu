#include "shared_memory.h"

#include <unistd.h>

#include "driver.h"

namespace ep::cuda {
namespace {

#define EP_DRIVER(name) driver<decltype(::name)>(#name)

// Found once: unmapping must not fail for want of them.
struct Functions {
    decltype(::cuMemGetAllocationGranularity)* granularity = EP_DRIVER(cuMemGetAllocationGranularity);
    decltype(::cuMemCreate)* create = EP_DRIVER(cuMemCreate);
    decltype(::cuMemRelease)* release = EP_DRIVER(cuMemRelease);
    decltype(::cuMemExportToShareableHandle)* export_handle = EP_DRIVER(cuMemExportToShareableHandle);
    decltype(::cuMemImportFromShareableHandle)* import_handle = EP_DRIVER(cuMemImportFromShareableHandle);
    decltype(::cuMemAddressReserve)* reserve = EP_DRIVER(cuMemAddressReserve);
    decltype(::cuMemAddressFree)* give_back = EP_DRIVER(cuMemAddressFree);
    decltype(::cuMemMap)* map = EP_DRIVER(cuMemMap);
    decltype(::cuMemUnmap)* unmap = EP_DRIVER(cuMemUnmap);
    decltype(::cuMemSetAccess)* set_access = EP_DRIVER(cuMemSetAccess);
};

#undef EP_DRIVER

const Functions& functions() {
    static const Functions found;
    return found;
}

void check_driver(CUresult result, const char* what) {
    if (result != CUDA_SUCCESS) throw std::runtime_error("ep_backend: " + answer(what, result));
}

CUmemLocation on(int device) {
    CUmemLocation location{};
    location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    location.id = device;
    return location;
}

// How memory is made; the granularity of a mapping follows from it.
CUmemAllocationProp properties(int device) {
    CUmemAllocationProp wanted{};
    wanted.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    wanted.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
    wanted.location = on(device);
    return wanted;
}

int64_t rounded(int device, int64_t bytes) {
    const CUmemAllocationProp wanted = properties(device);
    size_t unit = 0;
    check_driver(functions().granularity(&unit, &wanted, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED),
                 "cuMemGetAllocationGranularity");
    const auto step = static_cast<int64_t>(unit);
    return (bytes + step - 1) / step * step;
}

// A mapping keeps the memory, so the handle is released in any case.
char* map_for(int device, CUmemGenericAllocationHandle memory, int64_t bytes) {
    const Functions& f = functions();
    CUdeviceptr address = 0;
    CUresult result = f.reserve(&address, bytes, 0, 0, 0);
    const char* what = "cuMemAddressReserve";
    if (result == CUDA_SUCCESS) {
        result = f.map(address, bytes, 0, memory, 0);
        what = "cuMemMap";
        if (result != CUDA_SUCCESS) f.give_back(address, bytes);
    }
    f.release(memory);
    check_driver(result, what);
    auto* const mapped = reinterpret_cast<char*>(address);
    const CUmemAccessDesc access{on(device), CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
    result = f.set_access(address, bytes, &access, 1);
    if (result != CUDA_SUCCESS) unmap_shared_memory(mapped, bytes);
    check_driver(result, "cuMemSetAccess");
    return mapped;
}

}  // namespace

SharedMemory make_shared_memory(int device, int64_t bytes) {
    const OnDevice current(device);
    check(cudaFree(nullptr), "starting CUDA");
    SharedMemory made{nullptr, rounded(device, bytes), -1};
    const CUmemAllocationProp wanted = properties(device);
    CUmemGenericAllocationHandle memory{};
    check_driver(functions().create(&memory, made.bytes, &wanted, 0), "cuMemCreate");
    const CUresult exported =
        functions().export_handle(&made.descriptor, memory, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0);
    try {
        made.address = map_for(device, memory, made.bytes);
        check_driver(exported, "cuMemExportToShareableHandle");
        check(cudaMemset(made.address, 0, made.bytes), "cudaMemset");
        check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    } catch (...) {
        if (made.address) unmap_shared_memory(made.address, made.bytes);
        if (made.descriptor >= 0) close(made.descriptor);
        throw;
    }
    return made;
}

SharedMemory map_shared_memory(int device, int descriptor, int64_t bytes) {
    const OnDevice current(device);
    check(cudaFree(nullptr), "starting CUDA");
    const int64_t size = rounded(device, bytes);
    CUmemGenericAllocationHandle memory{};
    check_driver(
        functions().import_handle(&memory, reinterpret_cast<void*>(static_cast<intptr_t>(descriptor)),
                                  CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR),
        "cuMemImportFromShareableHandle");
    return {map_for(device, memory, size), size, descriptor};
}

void unmap_shared_memory(char* address, int64_t bytes) noexcept {
    const auto at = reinterpret_cast<CUdeviceptr>(address);
    if (functions().unmap(at, bytes) == CUDA_SUCCESS) functions().give_back(at, bytes);
}

}  // namespace ep::cuda
