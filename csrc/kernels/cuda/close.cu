// The end of an exchange that nobody combines, where windows are staged: the closing flags must be moved
// between two launches. Elsewhere the next dispatch does it (close_open_exchange). One block.
#include "exchange.cuh"
#include "launch.h"

namespace ep::cuda {
namespace {

__global__ void __launch_bounds__(kThreads) close_kernel(const __grid_constant__ View v, bool send) {
    __shared__ int counts[kMaxWorld];
    ptx::wait_for_previous_kernel();
    const State state = load_state(v);
    bool alive = begin(state) && state.stage != Stage::kIdle;
    const int chunks = static_cast<int>(state.chunks);
    for (int chunk = 0; chunk < chunks && alive; ++chunk) {
        // Only a rank that has seen all rows of an exchange may say that it is done with them.
        if (send && state.stage == Stage::kSent)
            alive = wait_chunk(v, state, Phase::kDispatch, state.epoch, chunk, counts);
        if (send && alive && state.stage != Stage::kReturned)
            flag_chunk(v, state, Phase::kCombine, state.epoch, chunk, kClosed, to_all(v));
        if (!send) alive = wait_chunk(v, state, Phase::kCombine, state.epoch, chunk, counts);
        __syncthreads();  // counts are used again
    }
    leave(v, false, [&](DeviceWord& w) {
        if (alive) w.stage = send ? Stage::kReturned : Stage::kIdle;
    });
}

}  // namespace

cudaError_t launch_close(const View& v, bool send, const Launch& how) {
    return launch(close_kernel, how, v, send);
}

}  // namespace ep::cuda
