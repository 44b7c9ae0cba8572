// Registers the operators of torch.ops.ep_backend. Nothing else happens here.
#include <torch/csrc/stable/library.h>

#include "ops.h"

STABLE_TORCH_LIBRARY(ep_backend, m) {
    m.def("window_layout(int[] shape) -> int[]");
    m.def("window_blocks(int[] shape, int channel, int slots, int chunks) -> int[]");
    m.def(
        "exchange_create(int[] shape, int rank, int hidden, int wire, int payload, bool local_ids, int "
        "pad_id, int epoch, "
        "int timeout_us, int[] expert_rank, int[] windows) -> int");
    m.def("exchange_destroy(int exchange) -> ()");
    m.def("exchange_error(int exchange) -> int[]");
    m.def("exchange_recover(int exchange, int timeout_us, int epoch) -> int[]");
    m.def("exchange_max_epoch(int exchange) -> int");
    m.def("exchange_set_timeout(int exchange, int timeout_us) -> ()");
    m.def("exchange_mask_ranks(int exchange, int[] ranks) -> int[]");
    m.def("exchange_stop(int exchange, int channel, int status) -> ()");
    m.def("exchange_close(int exchange, int channel) -> int");

    m.def(
        "dispatch_send(int exchange, int channel, Tensor x, Tensor? scales, Tensor ids, Tensor weights, int "
        "slots) -> int");
    m.def("dispatch_wait(int exchange, int channel) -> int");
    m.def(
        "dispatch_counts(int exchange, int channel, Tensor(a!) tokens_per_source, Tensor(b!) "
        "rows_per_expert) -> int");
    m.def(
        "dispatch_read(int exchange, int channel, int layout, Tensor(a!)? rows, Tensor(b!)? scales, "
        "Tensor(c!)? ids, "
        "Tensor(d!)? weights) -> ()");
    m.def("combine_send(int exchange, int channel, int layout, Tensor y) -> int");
    m.def("combine_recv(int exchange, int channel, Tensor(a!) out) -> int");

    m.def("check_ids(int exchange, Tensor ids) -> int");
    m.def("dispatch_record_bytes(int exchange) -> int");
    m.def(
        "pack_count(int exchange, int channel, Tensor x, Tensor? scales, Tensor ids, Tensor weights, int "
        "slots, "
        "Tensor(a!) rows_per_rank) -> int");
    m.def(
        "pack_dispatch(int exchange, int channel, Tensor x, Tensor? scales, Tensor ids, Tensor weights, int "
        "slots, "
        "Tensor(a!) records) -> ()");
    m.def("unpack_dispatch(int exchange, int channel, Tensor records, Tensor counts) -> int");
    m.def("pack_combine(int exchange, int channel, int layout, Tensor y, Tensor(a!) records) -> int");
    m.def("pack_close(int exchange, int channel, Tensor rows_per_source, Tensor(a!) records) -> int");
    m.def("unpack_combine(int exchange, int channel, Tensor records, Tensor(a!) out) -> int");

    m.def("host_sum_bytes(int capacity) -> int");
    m.def("host_sum_create(int rank, int capacity, int spin_us, int[] boards) -> int");
    m.def("host_sum_destroy(int host_sum) -> ()");
    m.def("host_sum(int host_sum, Tensor(a!) values, int timeout_us) -> int");
    m.def("host_sum_error(int host_sum) -> int[]");
}

// Operators without tensors have no device to choose a kernel by.
STABLE_TORCH_LIBRARY_IMPL(ep_backend, CompositeExplicitAutograd, m) {
    m.impl("window_layout", TORCH_BOX(&ep::ops::window_layout));
    m.impl("window_blocks", TORCH_BOX(&ep::ops::window_blocks));
    m.impl("exchange_create", TORCH_BOX(&ep::ops::exchange_create));
    m.impl("exchange_destroy", TORCH_BOX(&ep::ops::exchange_destroy));
    m.impl("exchange_error", TORCH_BOX(&ep::ops::exchange_error));
    m.impl("exchange_recover", TORCH_BOX(&ep::ops::exchange_recover));
    m.impl("exchange_max_epoch", TORCH_BOX(&ep::ops::exchange_max_epoch));
    m.impl("exchange_set_timeout", TORCH_BOX(&ep::ops::exchange_set_timeout));
    m.impl("exchange_mask_ranks", TORCH_BOX(&ep::ops::exchange_mask_ranks));
    m.impl("exchange_stop", TORCH_BOX(&ep::ops::exchange_stop));
    m.impl("exchange_close", TORCH_BOX(&ep::ops::exchange_close));
    m.impl("dispatch_wait", TORCH_BOX(&ep::ops::dispatch_wait));
    m.impl("dispatch_record_bytes", TORCH_BOX(&ep::ops::dispatch_record_bytes));
    m.impl("host_sum_bytes", TORCH_BOX(&ep::ops::host_sum_bytes));
    m.impl("host_sum_create", TORCH_BOX(&ep::ops::host_sum_create));
    m.impl("host_sum_destroy", TORCH_BOX(&ep::ops::host_sum_destroy));
    m.impl("host_sum_error", TORCH_BOX(&ep::ops::host_sum_error));
}

STABLE_TORCH_LIBRARY_IMPL(ep_backend, CPU, m) {
    m.impl("dispatch_send", TORCH_BOX(&ep::ops::dispatch_send));
    m.impl("dispatch_counts", TORCH_BOX(&ep::ops::dispatch_counts));
    m.impl("dispatch_read", TORCH_BOX(&ep::ops::dispatch_read));
    m.impl("combine_send", TORCH_BOX(&ep::ops::combine_send));
    m.impl("combine_recv", TORCH_BOX(&ep::ops::combine_recv));
    m.impl("check_ids", TORCH_BOX(&ep::ops::check_ids));
    m.impl("pack_count", TORCH_BOX(&ep::ops::pack_count));
    m.impl("pack_dispatch", TORCH_BOX(&ep::ops::pack_dispatch));
    m.impl("unpack_dispatch", TORCH_BOX(&ep::ops::unpack_dispatch));
    m.impl("pack_combine", TORCH_BOX(&ep::ops::pack_combine));
    m.impl("pack_close", TORCH_BOX(&ep::ops::pack_close));
    m.impl("unpack_combine", TORCH_BOX(&ep::ops::unpack_combine));
    m.impl("host_sum", TORCH_BOX(&ep::ops::host_sum));
}
