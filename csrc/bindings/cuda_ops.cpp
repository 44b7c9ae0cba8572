// Operators of the CUDA kernels; see cuda_ops.h.
#include "cuda_ops.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include "../kernels/cuda/exchange.h"
#include "../kernels/cuda/layouts.h"
#include "../kernels/cuda/shared_memory.h"
#include "current_stream.h"
#include "formats.h"

namespace ep::ops {
namespace {

using cuda::Exchange;
using torch::headeronly::ScalarType;
using torch::stable::accelerator::DeviceGuard;

Exchange& at(int64_t exchange) {
    return *reinterpret_cast<Exchange*>(exchange);
}

void check(cudaError_t error, const char* what) {
    STD_TORCH_CHECK(error == cudaSuccess, "ep_backend: ", what, " failed: ", cudaGetErrorString(error));
}

cuda::Plan plan_of(const std::vector<int64_t>& p) {
    cuda::Plan plan{};
    plan.slots = static_cast<int32_t>(p[0]);
    if (p.size() >= 4) {
        plan.tokens_per_chunk = static_cast<int32_t>(p[1]);
        plan.segments = static_cast<int32_t>(p[2]);
        plan.warps_per_token = static_cast<int32_t>(p[3]);
    }
    if (p.size() == 5) plan.bulk = p[4] != 0;
    return plan;
}

template <class T>
T* pointer(const Tensor& t) {
    return static_cast<T*>(t.data_ptr());
}

cuda::ReceivedSlots slots_of(const Tensor& ids, const Tensor& local) {
    cuda::ReceivedSlots s{};
    s.ids = pointer<int32_t>(ids);
    s.local = pointer<int16_t>(local);
    s.count = static_cast<int32_t>(ids.size(0));
    s.top_k = static_cast<int32_t>(ids.size(1));
    return s;
}

cuda::IndexArgs index_args(const Tensor& ids, const Tensor& local, bool by_expert, const Tensor& tile_counts,
                           const Tensor& places, const Tensor& totals) {
    cuda::IndexArgs a{};
    a.slots = slots_of(ids, local);
    a.slots.experts = static_cast<int32_t>(totals.numel() - 1);
    a.tile_counts = pointer<int32_t>(tile_counts);
    a.places = pointer<int32_t>(places);
    a.totals = pointer<int32_t>(totals);
    a.by_expert = by_expert;
    return a;
}

cuda::GatherArgs gather_args(const Tensor& rows, const std::optional<Tensor>& scales,
                             const cuda::ReceivedSlots& slots, const Tensor& places, const Tensor& out_rows,
                             const std::optional<Tensor>& out_scales) {
    cuda::GatherArgs a{};
    a.slots = slots;
    a.places = pointer<int32_t>(places);
    a.rows = pointer<char>(rows);
    a.row_bytes = rows.size(1) * element_bytes(format_of(rows));
    a.out_rows = pointer<char>(out_rows);
    if (scales) {
        a.scales = pointer<char>(*scales);
        a.scale_bytes = scales->size(1) * element_bytes(format_of(*scales));
        a.out_scales = pointer<char>(*out_scales);
        a.scales_by_column = out_scales->dim() == 3 && out_scales->stride(1) == 1;
    }
    a.places_per_slot = static_cast<int32_t>(places.size(1));
    return a;
}

}  // namespace

int64_t cuda_exchange_create(std::vector<int64_t> shape, int64_t rank, int64_t hidden, int64_t wire,
                             int64_t out, bool local_ids, int64_t pad_id, int64_t epoch, int64_t timeout_us,
                             int64_t max_blocks, int64_t device, std::vector<int64_t> expert_rank,
                             std::vector<int64_t> windows, int64_t copies, std::vector<int64_t> direct,
                             bool staged, int64_t stagger, double chunk_scale, int64_t share) {
    const DeviceGuard guard(static_cast<int32_t>(device));
    const cuda::Settings settings{shape_of(shape),
                                  rank,
                                  hidden,
                                  static_cast<DType>(wire),
                                  static_cast<DType>(out),
                                  local_ids,
                                  static_cast<int32_t>(pad_id),
                                  static_cast<uint64_t>(epoch),
                                  timeout_us,
                                  max_blocks,
                                  reinterpret_cast<char*>(copies),
                                  std::move(direct),
                                  staged,
                                  static_cast<int32_t>(stagger),
                                  chunk_scale,
                                  share};
    std::vector<char*> pointers;
    for (int64_t w : windows) pointers.push_back(reinterpret_cast<char*>(w));
    return reinterpret_cast<int64_t>(
        new Exchange(settings, {expert_rank.begin(), expert_rank.end()}, pointers));
}

void cuda_exchange_destroy(int64_t exchange) {
    const DeviceGuard guard(at(exchange).device());
    delete &at(exchange);
}

std::vector<int64_t> cuda_exchange_error(int64_t exchange) {
    return fields_of(at(exchange).error());
}

int64_t cuda_exchange_max_epoch(int64_t exchange) {
    return static_cast<int64_t>(at(exchange).max_epoch());
}
void cuda_exchange_stop(int64_t exchange) {
    at(exchange).stop();
}
void cuda_exchange_recover(int64_t exchange, int64_t epoch) {
    at(exchange).recover(static_cast<uint64_t>(epoch));
}
void cuda_exchange_set_timeout(int64_t exchange, int64_t timeout_us) {
    at(exchange).set_timeout(timeout_us);
}
void cuda_exchange_mask_ranks(int64_t exchange, std::vector<int64_t> ranks) {
    at(exchange).mask_ranks(ranks);
}

std::string gpu_bus_id(int64_t device) {
    char id[32] = "";
    check(cudaDeviceGetPCIBusId(id, sizeof id, static_cast<int>(device)), "cudaDeviceGetPCIBusId");
    return id;
}
int64_t cuda_host_register(int64_t address, int64_t bytes) {
    void* const memory = reinterpret_cast<void*>(address);
    void* seen = nullptr;
    check(cudaHostRegister(memory, static_cast<size_t>(bytes),
                           cudaHostRegisterPortable | cudaHostRegisterMapped),
          "cudaHostRegister");
    const cudaError_t found = cudaHostGetDevicePointer(&seen, memory, 0);
    if (found != cudaSuccess) cudaHostUnregister(memory);
    check(found, "cudaHostGetDevicePointer");
    return reinterpret_cast<int64_t>(seen);
}
void cuda_host_unregister(int64_t address) {
    cudaHostUnregister(reinterpret_cast<void*>(address));  // a context that is gone has let go of it already
}

std::tuple<Tensor, int64_t> gpu_memory_make(int64_t device, int64_t bytes) {
    const cuda::SharedMemory made = cuda::make_shared_memory(static_cast<int>(device), bytes);
    const int64_t step = 1, mapped = made.bytes;
    Tensor tensor = torch::stable::from_blob(
        made.address, {&bytes, 1}, {&step, 1},
        {torch::headeronly::DeviceType::CUDA, static_cast<torch::stable::accelerator::DeviceIndex>(device)},
        ScalarType::Byte,
        [mapped](void* address) { cuda::unmap_shared_memory(static_cast<char*>(address), mapped); });
    return {std::move(tensor), made.descriptor};
}
std::tuple<int64_t, int64_t> gpu_memory_map(int64_t device, int64_t descriptor, int64_t bytes) {
    const cuda::SharedMemory theirs =
        cuda::map_shared_memory(static_cast<int>(device), static_cast<int>(descriptor), bytes);
    return {reinterpret_cast<int64_t>(theirs.address), theirs.bytes};
}
void gpu_memory_unmap(int64_t address, int64_t bytes) {
    cuda::unmap_shared_memory(reinterpret_cast<char*>(address), bytes);
}

void cuda_dispatch(int64_t exchange, int64_t channel, Tensor x, std::optional<Tensor> scales, Tensor ids,
                   Tensor weights, std::optional<Tensor> num_tokens, std::vector<int64_t> plan, bool send,
                   bool receive, Tensor out_ids, Tensor out_weights, Tensor tokens_per_source) {
    const int32_t device = x.get_device_index();
    const DeviceGuard guard(device);
    cuda::DispatchArgs a{};
    a.x = static_cast<const char*>(x.data_ptr());
    a.scales = scales ? static_cast<const char*>(scales->data_ptr()) : nullptr;
    a.ids = ids.data_ptr();
    a.weights = static_cast<const float*>(weights.data_ptr());
    a.device_tokens = num_tokens ? static_cast<const int32_t*>(num_tokens->data_ptr()) : nullptr;
    a.out_ids = static_cast<int32_t*>(out_ids.data_ptr());
    a.out_weights = static_cast<float*>(out_weights.data_ptr());
    a.tokens_per_source = static_cast<int32_t*>(tokens_per_source.data_ptr());
    a.plan = plan_of(plan);
    a.tokens = static_cast<int32_t>(x.size(0));
    a.x_type = format_of(x);
    // Rows that travel have fewer bytes than rows that come: they are quantised on the way.
    const int64_t x_row_bytes = x.size(1) * element_bytes(a.x_type);
    a.quantize = x_row_bytes != at(exchange).settings().shape.row_bytes;
    a.ids_are_64_bit = ids.scalar_type() == ScalarType::Long;
    a.send = send;
    a.receive = receive;
    check(at(exchange).dispatch(channel, a, current_stream(device)), "dispatch");
}

void cuda_combine(int64_t exchange, int64_t channel, Tensor y, std::optional<Tensor> places,
                  std::optional<Tensor> weights, std::optional<Tensor> sums, int64_t return_blocks,
                  std::vector<int64_t> plan, bool send, bool receive, Tensor out) {
    const int32_t device = out.get_device_index();
    const DeviceGuard guard(device);
    cuda::CombineArgs a{};
    a.y = static_cast<const char*>(y.data_ptr());
    a.out = static_cast<char*>(out.data_ptr());
    if (places) {
        a.places = pointer<int32_t>(*places);
        a.weights = pointer<float>(*weights);
        a.sums = pointer<char>(*sums);
        a.return_blocks = static_cast<int32_t>(return_blocks);
    }
    a.plan = plan_of(plan);
    a.y_type = format_of(y);
    a.send = send;
    a.receive = receive;
    check(at(exchange).combine(channel, a, current_stream(device)), "combine");
}

bool cuda_exchange_sums(int64_t exchange, int64_t channel, Tensor ids, Tensor weights, Tensor y,
                        Tensor places, std::vector<int64_t> plan, int64_t ended, int64_t ended_channel,
                        bool receive, Tensor out) {
    const int32_t device = y.get_device_index();
    const DeviceGuard guard(device);
    cuda::SumsArgs a{};
    a.ask.plan = plan_of(plan);
    if (!at(exchange).takes_sums(a.ask.plan, format_of(y))) return false;
    a.ask.ids = ids.data_ptr();
    a.ask.weights = pointer<float>(weights);
    a.ask.tokens = static_cast<int32_t>(ids.size(0));
    a.ask.ids_are_64_bit = ids.scalar_type() == ScalarType::Long;
    a.answer.y = pointer<char>(y);
    a.answer.places = pointer<int32_t>(places);
    a.answer.out = pointer<char>(out);
    a.answer.receive = receive;
    if (ended) a.ended = at(ended).word(ended_channel);
    check(at(exchange).sums(channel, a, current_stream(device)), "exchanging sums");
    return true;
}

void cuda_close(int64_t exchange, int64_t channel, bool send) {
    const int32_t device = at(exchange).device();
    const DeviceGuard guard(device);
    check(at(exchange).close(channel, send, current_stream(device)), "closing an exchange");
}

int64_t cuda_plan_chunks(int64_t exchange, std::vector<int64_t> plan) {
    return at(exchange).chunks(plan_of(plan));
}

void cuda_index_rows(Tensor ids, Tensor local, int64_t blocks, Tensor tile_counts, Tensor places,
                     Tensor totals) {
    const int32_t device = ids.get_device_index();
    const DeviceGuard guard(device);
    const cuda::IndexArgs a = index_args(ids, local, false, tile_counts, places, totals);
    check(cuda::launch_index(a, static_cast<int>(blocks), current_stream(device)), "finding places for rows");
}

void cuda_gather_rows(Tensor rows, std::optional<Tensor> scales, Tensor ids, Tensor weights, Tensor local,
                      Tensor places, bool local_ids, int64_t pad_id, int64_t blocks, Tensor out_rows,
                      std::optional<Tensor> out_scales, Tensor out_ids, Tensor out_weights) {
    const int32_t device = rows.get_device_index();
    const DeviceGuard guard(device);
    cuda::GatherArgs a = gather_args(rows, scales, slots_of(ids, local), places, out_rows, out_scales);
    a.slots.weights = pointer<float>(weights);
    a.out_ids = pointer<int32_t>(out_ids);
    a.out_weights = pointer<float>(out_weights);
    a.pad_id = static_cast<int32_t>(pad_id);
    a.local_ids = local_ids;
    check(cuda::launch_gather(a, static_cast<int>(blocks), current_stream(device)), "gathering rows");
}

void cuda_sort_rows(int64_t exchange, Tensor rows, std::optional<Tensor> scales, Tensor ids, Tensor local,
                    int64_t blocks, Tensor tile_counts, Tensor places, Tensor totals, Tensor out_rows,
                    std::optional<Tensor> out_scales) {
    const int32_t device = rows.get_device_index();
    const DeviceGuard guard(device);
    const cuda::IndexArgs a = index_args(ids, local, true, tile_counts, places, totals);
    check(cuda::launch_sort(a, gather_args(rows, scales, a.slots, places, out_rows, out_scales),
                            static_cast<int>(blocks), at(exchange).early_blocks(), current_stream(device)),
          "sorting rows by expert");
}

void cuda_return_rows(Tensor y, Tensor places, std::optional<Tensor> weights, int64_t blocks, Tensor rows) {
    const int32_t device = rows.get_device_index();
    const DeviceGuard guard(device);
    cuda::ReturnArgs a{};
    a.y = pointer<char>(y);
    a.rows = pointer<char>(rows);
    a.places = pointer<int32_t>(places);
    a.weights = weights ? pointer<float>(*weights) : nullptr;
    a.count = static_cast<int32_t>(places.size(0));
    a.places_per_slot = static_cast<int32_t>(places.size(1));
    a.hidden = static_cast<int32_t>(rows.size(1));
    a.y_type = format_of(y);
    a.wire = format_of(rows);
    check(cuda::launch_return(a, static_cast<int>(blocks), current_stream(device)), "returning rows");
}

}  // namespace ep::ops
