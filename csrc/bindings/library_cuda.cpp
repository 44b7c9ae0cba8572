// Registers the operators of the CUDA kernels. Nothing else happens here.
#include <torch/csrc/stable/library.h>

#include "cuda_ops.h"
#include "pair_ops.h"

STABLE_TORCH_LIBRARY_FRAGMENT(ep_backend, m) {
    m.def(
        "cuda_exchange_create(int[] shape, int rank, int hidden, int wire, int out, bool local_ids, int "
        "pad_id, "
        "int epoch, int timeout_us, int max_blocks, int device, int[] expert_rank, int[] windows, int "
        "copies, int[] direct, bool staged, int stagger, float chunk_scale, int share) -> int");
    m.def("cuda_exchange_destroy(int exchange) -> ()");
    m.def("gpu_bus_id(int device) -> str");
    m.def("cuda_host_register(int address, int bytes) -> int");
    m.def("cuda_host_unregister(int address) -> ()");
    m.def("gpu_memory_make(int device, int bytes) -> (Tensor, int)");
    m.def("gpu_memory_map(int device, int descriptor, int bytes) -> (int, int)");
    m.def("gpu_memory_unmap(int address, int bytes) -> ()");
    m.def("cuda_exchange_error(int exchange) -> int[]");
    m.def("cuda_exchange_max_epoch(int exchange) -> int");
    m.def("cuda_exchange_stop(int exchange) -> ()");
    m.def("cuda_exchange_recover(int exchange, int epoch) -> ()");
    m.def("cuda_exchange_set_timeout(int exchange, int timeout_us) -> ()");
    m.def("cuda_exchange_mask_ranks(int exchange, int[] ranks) -> ()");
    m.def(
        "cuda_dispatch(int exchange, int channel, Tensor x, Tensor? scales, Tensor ids, Tensor weights, "
        "Tensor? num_tokens, int[] plan, bool send, bool receive, Tensor(a!) out_ids, Tensor(b!) "
        "out_weights, "
        "Tensor(c!) tokens_per_source) -> ()");
    m.def(
        "cuda_combine(int exchange, int channel, Tensor y, Tensor? places, Tensor? weights, Tensor(a!)? "
        "sums, "
        "int return_blocks, int[] plan, bool send, bool receive, Tensor(b!) out) -> ()");
    m.def(
        "cuda_exchange_sums(int exchange, int channel, Tensor ids, Tensor weights, Tensor y, Tensor places, "
        "int[] plan, int ended, int ended_channel, bool receive, Tensor(a!) out) -> bool");
    m.def("cuda_close(int exchange, int channel, bool send) -> ()");
    m.def("cuda_plan_chunks(int exchange, int[] plan) -> int");
    m.def(
        "cuda_index_rows(Tensor ids, Tensor local, int blocks, Tensor(a!) tile_counts, Tensor(b!) places, "
        "Tensor(c!) totals) -> ()");
    m.def(
        "cuda_gather_rows(Tensor rows, Tensor? scales, Tensor ids, Tensor weights, Tensor local, Tensor "
        "places, bool local_ids, int pad_id, int blocks, Tensor(a!) out_rows, Tensor(b!)? out_scales, "
        "Tensor(c!) out_ids, Tensor(d!) out_weights) -> ()");
    m.def(
        "cuda_sort_rows(int exchange, Tensor rows, Tensor? scales, Tensor ids, Tensor local, int blocks, "
        "Tensor(a!) "
        "tile_counts, Tensor(b!) places, Tensor(c!) totals, Tensor(d!) out_rows, Tensor(e!)? out_scales) -> "
        "()");
    m.def("cuda_return_rows(Tensor y, Tensor places, Tensor? weights, int blocks, Tensor(a!) rows) -> ()");

    m.def("gpu_pair_attributes(int source, int target) -> int[]");
    m.def("gpu_pair_create(int source, int target, int bytes) -> int");
    m.def("gpu_pair_destroy(int pair) -> ()");
    m.def(
        "gpu_pair_store(int pair, int seed, int expected, int rounds, bool announce, int timeout_us) -> "
        "int[]");
    m.def("gpu_pair_latency(int pair, int rounds, int timeout_us) -> float");
    m.def("gpu_pair_bandwidth(int pair, bool copy_engine) -> float");
    m.def("gpu_fabric_handle(int device) -> str");
    m.def("gpu_order_rates(int[] devices, int group, int bytes) -> (float, float)");
}

STABLE_TORCH_LIBRARY_IMPL(ep_backend, CompositeExplicitAutograd, m) {
    m.impl("cuda_exchange_create", TORCH_BOX(&ep::ops::cuda_exchange_create));
    m.impl("cuda_exchange_destroy", TORCH_BOX(&ep::ops::cuda_exchange_destroy));
    m.impl("gpu_bus_id", TORCH_BOX(&ep::ops::gpu_bus_id));
    m.impl("cuda_host_register", TORCH_BOX(&ep::ops::cuda_host_register));
    m.impl("cuda_host_unregister", TORCH_BOX(&ep::ops::cuda_host_unregister));
    m.impl("gpu_memory_make", TORCH_BOX(&ep::ops::gpu_memory_make));
    m.impl("gpu_memory_map", TORCH_BOX(&ep::ops::gpu_memory_map));
    m.impl("gpu_memory_unmap", TORCH_BOX(&ep::ops::gpu_memory_unmap));
    m.impl("cuda_exchange_error", TORCH_BOX(&ep::ops::cuda_exchange_error));
    m.impl("cuda_exchange_max_epoch", TORCH_BOX(&ep::ops::cuda_exchange_max_epoch));
    m.impl("cuda_exchange_stop", TORCH_BOX(&ep::ops::cuda_exchange_stop));
    m.impl("cuda_exchange_recover", TORCH_BOX(&ep::ops::cuda_exchange_recover));
    m.impl("cuda_exchange_set_timeout", TORCH_BOX(&ep::ops::cuda_exchange_set_timeout));
    m.impl("cuda_exchange_mask_ranks", TORCH_BOX(&ep::ops::cuda_exchange_mask_ranks));
    m.impl("cuda_close", TORCH_BOX(&ep::ops::cuda_close));
    m.impl("cuda_plan_chunks", TORCH_BOX(&ep::ops::cuda_plan_chunks));
    m.impl("gpu_pair_attributes", TORCH_BOX(&ep::ops::gpu_pair_attributes));
    m.impl("gpu_pair_create", TORCH_BOX(&ep::ops::gpu_pair_create));
    m.impl("gpu_pair_destroy", TORCH_BOX(&ep::ops::gpu_pair_destroy));
    m.impl("gpu_pair_store", TORCH_BOX(&ep::ops::gpu_pair_store));
    m.impl("gpu_pair_latency", TORCH_BOX(&ep::ops::gpu_pair_latency));
    m.impl("gpu_pair_bandwidth", TORCH_BOX(&ep::ops::gpu_pair_bandwidth));
    m.impl("gpu_fabric_handle", TORCH_BOX(&ep::ops::gpu_fabric_handle));
    m.impl("gpu_order_rates", TORCH_BOX(&ep::ops::gpu_order_rates));
}

STABLE_TORCH_LIBRARY_IMPL(ep_backend, CUDA, m) {
    m.impl("cuda_dispatch", TORCH_BOX(&ep::ops::cuda_dispatch));
    m.impl("cuda_combine", TORCH_BOX(&ep::ops::cuda_combine));
    m.impl("cuda_exchange_sums", TORCH_BOX(&ep::ops::cuda_exchange_sums));
    m.impl("cuda_index_rows", TORCH_BOX(&ep::ops::cuda_index_rows));
    m.impl("cuda_gather_rows", TORCH_BOX(&ep::ops::cuda_gather_rows));
    m.impl("cuda_sort_rows", TORCH_BOX(&ep::ops::cuda_sort_rows));
    m.impl("cuda_return_rows", TORCH_BOX(&ep::ops::cuda_return_rows));
}
