// Marks what host code and kernels share.
#pragma once

#if defined(__CUDACC__)
#define EP_HD __host__ __device__
#else
#define EP_HD
#endif
