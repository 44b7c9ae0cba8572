// The operators of the CUDA kernels in torch.ops.ep_backend; library_cuda.cpp registers them. See ops.h.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace ep::ops {

using torch::stable::Tensor;

int64_t cuda_exchange_create(std::vector<int64_t> shape, int64_t rank, int64_t hidden, int64_t wire,
                             int64_t out, bool local_ids, int64_t pad_id, int64_t epoch, int64_t timeout_us,
                             int64_t max_blocks, int64_t device, std::vector<int64_t> expert_rank,
                             std::vector<int64_t> windows, int64_t copies, std::vector<int64_t> direct,
                             bool staged, int64_t stagger, double chunk_scale, int64_t share);
void cuda_exchange_destroy(int64_t exchange);
// "0000:1b:00.0".
std::string gpu_bus_id(int64_t device);
// Pins memory of the host so that all GPUs can use it; returns its address there.
int64_t cuda_host_register(int64_t address, int64_t bytes);
void cuda_host_unregister(int64_t address);
// Bytes of a GPU that other processes can map, zeroed, and the descriptor to give them, which the caller
// closes.
std::tuple<Tensor, int64_t> gpu_memory_make(int64_t device, int64_t bytes);
// A peer's bytes for kernels of this device: address and size of the mapping. No tensor, since this process
// may not see the peer's GPU.
std::tuple<int64_t, int64_t> gpu_memory_map(int64_t device, int64_t descriptor, int64_t bytes);
void gpu_memory_unmap(int64_t address, int64_t bytes);
// The fields of ErrorWord in order.
std::vector<int64_t> cuda_exchange_error(int64_t exchange);
int64_t cuda_exchange_max_epoch(int64_t exchange);
void cuda_exchange_stop(int64_t exchange);
void cuda_exchange_recover(int64_t exchange, int64_t epoch);
void cuda_exchange_set_timeout(int64_t exchange, int64_t timeout_us);
void cuda_exchange_mask_ranks(int64_t exchange, std::vector<int64_t> ranks);

// plan: {T} or {T, tokens per chunk, segments, warps per token[, 1: by bulk copies, needs segments = 1]}.
void cuda_dispatch(int64_t exchange, int64_t channel, Tensor x, std::optional<Tensor> scales, Tensor ids,
                   Tensor weights, std::optional<Tensor> num_tokens, std::vector<int64_t> plan, bool send,
                   bool receive, Tensor out_ids, Tensor out_weights, Tensor tokens_per_source);
// places, weights: [world * T, top_k]; with them y are rows by expert, and sums is scratch, [world * T,
// hidden].
void cuda_combine(int64_t exchange, int64_t channel, Tensor y, std::optional<Tensor> places,
                  std::optional<Tensor> weights, std::optional<Tensor> sums, int64_t return_blocks,
                  std::vector<int64_t> plan, bool send, bool receive, Tensor out);
// Words with weights and the combine of y, rows by expert, in one launch, by an exchange that never brings
// anything else; without `receive` the combine's first half. False, and nothing was launched, where it takes
// two.
bool cuda_exchange_sums(int64_t exchange, int64_t channel, Tensor ids, Tensor weights, Tensor y,
                        Tensor places, std::vector<int64_t> plan, int64_t ended, int64_t ended_channel,
                        bool receive, Tensor out);
// On the device's current stream: half of ending an exchange where windows are staged.
void cuda_close(int64_t exchange, int64_t channel, bool send);
// Chunks that a plan has: flags of a source in one exchange.
int64_t cuda_plan_chunks(int64_t exchange, std::vector<int64_t> plan);

// Layouts other than rank-major, the first two for compact; csrc/kernels/cuda/layouts.h says what the tensors
// hold. local: [experts of all ranks] int16. totals: [local experts + 1].
void cuda_index_rows(Tensor ids, Tensor local, int64_t blocks, Tensor tile_counts, Tensor places,
                     Tensor totals);
void cuda_gather_rows(Tensor rows, std::optional<Tensor> scales, Tensor ids, Tensor weights, Tensor local,
                      Tensor places, bool local_ids, int64_t pad_id, int64_t blocks, Tensor out_rows,
                      std::optional<Tensor> out_scales, Tensor out_ids, Tensor out_weights);
// By expert, both at once; the last of totals is left as it was.
void cuda_sort_rows(int64_t exchange, Tensor rows, std::optional<Tensor> scales, Tensor ids, Tensor local,
                    int64_t blocks, Tensor tile_counts, Tensor places, Tensor totals, Tensor out_rows,
                    std::optional<Tensor> out_scales);
void cuda_return_rows(Tensor y, Tensor places, std::optional<Tensor> weights, int64_t blocks, Tensor rows);

}  // namespace ep::ops
