// How fast several GPUs of one process store into each other's memory, all at the same time, in the two
// orders that dispatch and combine know (Hops in exchange.cuh). Nothing here waits for another GPU.
#pragma once

#include <cstdint>
#include <vector>

namespace ep::cuda {

// Bytes per second that each GPU stores.
struct OrderRates {
    double together;   // a piece to one GPU, the next piece to the next
    double staggered;  // everything to one GPU, then everything to the next; all change at the same time
};
// `devices`: two or more with access to each other, or the same one several times. `group`: as for
// staggered_target. `bytes`: of each pair; every GPU gives as much memory for each of `devices`. Throws
// std::runtime_error if memory, the driver or the GPUs do not allow it.
OrderRates order_rates(const std::vector<int>& devices, int group, int64_t bytes);

}  // namespace ep::cuda
