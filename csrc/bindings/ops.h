// The operators of torch.ops.ep_backend: tensors in, raw pointers out to the kernels. library.cpp registers
// them. Shapes, types and devices have been checked in Python (ep_backend/communicator.py); a wrong one here
// is a defect.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace ep::ops {

using torch::stable::Tensor;

// shape: the fields of ExchangeShape in order. Returns {total bytes, first channel, bytes of a channel,
// scales, rows, bytes of a GPU's copy of a channel}.
std::vector<int64_t> window_layout(std::vector<int64_t> shape);
// The fields of WindowLayout::Blocks in order, each {at, pitch, bytes}.
std::vector<int64_t> window_blocks(std::vector<int64_t> shape, int64_t channel, int64_t slots,
                                   int64_t chunks);

int64_t exchange_create(std::vector<int64_t> shape, int64_t rank, int64_t hidden, int64_t wire,
                        int64_t payload, bool local_ids, int64_t pad_id, int64_t epoch, int64_t timeout_us,
                        std::vector<int64_t> expert_rank, std::vector<int64_t> windows);
void exchange_destroy(int64_t exchange);
// The fields of ErrorWord in order, then the rank of the last kPeerClosed.
std::vector<int64_t> exchange_error(int64_t exchange);
// The ranks that did not come; none: recovered, behind `epoch` of every rank.
std::vector<int64_t> exchange_recover(int64_t exchange, int64_t timeout_us, int64_t epoch);
int64_t exchange_max_epoch(int64_t exchange);
void exchange_set_timeout(int64_t exchange, int64_t timeout_us);
// The slots of each channel's last exchange.
std::vector<int64_t> exchange_mask_ranks(int64_t exchange, std::vector<int64_t> ranks);
void exchange_stop(int64_t exchange, int64_t channel, int64_t status);

int64_t dispatch_send(int64_t exchange, int64_t channel, Tensor x, std::optional<Tensor> scales, Tensor ids,
                      Tensor weights, int64_t slots);
int64_t dispatch_wait(int64_t exchange, int64_t channel);
int64_t dispatch_counts(int64_t exchange, int64_t channel, Tensor tokens_per_source, Tensor rows_per_expert);
void dispatch_read(int64_t exchange, int64_t channel, int64_t layout, std::optional<Tensor> rows,
                   std::optional<Tensor> scales, std::optional<Tensor> ids, std::optional<Tensor> weights);
int64_t combine_send(int64_t exchange, int64_t channel, int64_t layout, Tensor y);
int64_t combine_recv(int64_t exchange, int64_t channel, Tensor out);
int64_t exchange_close(int64_t exchange, int64_t channel);

int64_t check_ids(int64_t exchange, Tensor ids);
int64_t dispatch_record_bytes(int64_t exchange);
int64_t pack_count(int64_t exchange, int64_t channel, Tensor x, std::optional<Tensor> scales, Tensor ids,
                   Tensor weights, int64_t slots, Tensor rows_per_rank);
void pack_dispatch(int64_t exchange, int64_t channel, Tensor x, std::optional<Tensor> scales, Tensor ids,
                   Tensor weights, int64_t slots, Tensor records);
int64_t unpack_dispatch(int64_t exchange, int64_t channel, Tensor records, Tensor counts);
int64_t pack_combine(int64_t exchange, int64_t channel, int64_t layout, Tensor y, Tensor records);
int64_t pack_close(int64_t exchange, int64_t channel, Tensor rows_per_source, Tensor records);
int64_t unpack_combine(int64_t exchange, int64_t channel, Tensor records, Tensor out);

// Of every rank's board, in bytes.
int64_t host_sum_bytes(int64_t capacity);
int64_t host_sum_create(int64_t rank, int64_t capacity, int64_t spin_us, std::vector<int64_t> boards);
void host_sum_destroy(int64_t host_sum);
int64_t host_sum(int64_t host_sum, Tensor values, int64_t timeout_us);
// {rank to blame, microseconds waited} of the last call.
std::vector<int64_t> host_sum_error(int64_t host_sum);

}  // namespace ep::ops
