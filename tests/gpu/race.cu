// Threads read what others write in shared memory, with no barrier between: racecheck must report it.
__global__ void race(int* out) {
    __shared__ int values[256];
    values[threadIdx.x] = static_cast<int>(threadIdx.x);
    out[threadIdx.x] = values[255 - threadIdx.x];
}

int main() {
    int* out = nullptr;
    if (cudaMalloc(&out, 256 * sizeof(int)) != cudaSuccess) return 2;
    race<<<1, 256>>>(out);
    return cudaDeviceSynchronize() == cudaSuccess ? 0 : 2;
}
