// Operators of the CPU kernels; see ops.h.
#include <memory>

#include "../kernels/cpu/exchange.h"
#include "../kernels/cpu/host_sum.h"
#include "formats.h"
#include "ops.h"

namespace ep::ops {
namespace {

using cpu::Exchange;
using torch::headeronly::ScalarType;

constexpr int64_t kPatienceUs = 100'000;  // Python acts on signals between two calls only

std::vector<char*> pointers_of(const std::vector<int64_t>& addresses) {
    std::vector<char*> pointers;
    for (int64_t address : addresses) pointers.push_back(reinterpret_cast<char*>(address));
    return pointers;
}

Exchange& at(int64_t exchange) {
    return *reinterpret_cast<Exchange*>(exchange);
}

void* data(const std::optional<Tensor>& t) {
    return t ? t->data_ptr() : nullptr;
}

cpu::DispatchInput input_of(const Tensor& x, const std::optional<Tensor>& scales, const Tensor& ids,
                            const Tensor& weights, int64_t slots) {
    return {x.data_ptr(),
            format_of(x),
            data(scales),
            ids.data_ptr(),
            ids.scalar_type() == ScalarType::Long,
            static_cast<const float*>(weights.data_ptr()),
            x.size(0),
            slots};
}

template <class T>
T* pointer(const Tensor& t) {
    return static_cast<T*>(t.data_ptr());
}

}  // namespace

std::vector<int64_t> window_layout(std::vector<int64_t> shape) {
    const WindowLayout l = WindowLayout::make(shape_of(shape));
    return {l.total, l.channels, l.channel_bytes, l.scales, l.rows, l.copy_bytes()};
}

std::vector<int64_t> window_blocks(std::vector<int64_t> shape, int64_t channel, int64_t slots,
                                   int64_t chunks) {
    const auto b = WindowLayout::make(shape_of(shape)).blocks(channel, slots, chunks);
    std::vector<int64_t> numbers;
    for (const SourceBlock& s :
         {b.dispatch_flags, b.headers, b.ids, b.weights, b.scales, b.rows, b.combine_flags, b.combine_rows})
        numbers.insert(numbers.end(), {s.at, s.pitch, s.bytes});
    return numbers;
}

int64_t exchange_create(std::vector<int64_t> shape, int64_t rank, int64_t hidden, int64_t wire,
                        int64_t payload, bool local_ids, int64_t pad_id, int64_t epoch, int64_t timeout_us,
                        std::vector<int64_t> expert_rank, std::vector<int64_t> windows) {
    const cpu::Settings settings{shape_of(shape),
                                 rank,
                                 hidden,
                                 static_cast<DType>(wire),
                                 static_cast<DType>(payload),
                                 local_ids,
                                 static_cast<int32_t>(pad_id),
                                 static_cast<uint64_t>(epoch),
                                 timeout_us,
                                 kPatienceUs};
    cpu::Placement placement(rank, settings.shape.world, {expert_rank.begin(), expert_rank.end()});
    return reinterpret_cast<int64_t>(new Exchange(settings, std::move(placement), pointers_of(windows)));
}

void exchange_destroy(int64_t exchange) {
    delete &at(exchange);
}

std::vector<int64_t> exchange_error(int64_t exchange) {
    std::vector<int64_t> fields = fields_of(at(exchange).error());
    fields.push_back(at(exchange).closed_by());
    return fields;
}

std::vector<int64_t> exchange_recover(int64_t exchange, int64_t timeout_us, int64_t epoch) {
    return at(exchange).recover(timeout_us, static_cast<uint64_t>(epoch));
}

int64_t exchange_max_epoch(int64_t exchange) {
    return static_cast<int64_t>(at(exchange).max_epoch());
}

void exchange_set_timeout(int64_t exchange, int64_t timeout_us) {
    at(exchange).set_timeout(timeout_us);
}
std::vector<int64_t> exchange_mask_ranks(int64_t exchange, std::vector<int64_t> ranks) {
    return at(exchange).mask_ranks(ranks);
}
void exchange_stop(int64_t exchange, int64_t channel, int64_t status) {
    at(exchange).stop(channel, static_cast<Status>(status));
}
int64_t exchange_close(int64_t exchange, int64_t channel) {
    return static_cast<int64_t>(at(exchange).close(channel));
}

int64_t dispatch_send(int64_t exchange, int64_t channel, Tensor x, std::optional<Tensor> scales, Tensor ids,
                      Tensor weights, int64_t slots) {
    return static_cast<int64_t>(
        at(exchange).dispatch_send(channel, input_of(x, scales, ids, weights, slots)));
}

int64_t dispatch_wait(int64_t exchange, int64_t channel) {
    return static_cast<int64_t>(at(exchange).dispatch_wait(channel));
}

int64_t dispatch_counts(int64_t exchange, int64_t channel, Tensor tokens_per_source, Tensor rows_per_expert) {
    return at(exchange).dispatch_counts(channel, pointer<int32_t>(tokens_per_source),
                                        pointer<int32_t>(rows_per_expert));
}

void dispatch_read(int64_t exchange, int64_t channel, int64_t layout, std::optional<Tensor> rows,
                   std::optional<Tensor> scales, std::optional<Tensor> ids, std::optional<Tensor> weights) {
    at(exchange).dispatch_read(
        channel, static_cast<cpu::Layout>(layout),
        {data(rows), data(scales), static_cast<int32_t*>(data(ids)), static_cast<float*>(data(weights))});
}

int64_t combine_send(int64_t exchange, int64_t channel, int64_t layout, Tensor y) {
    return static_cast<int64_t>(
        at(exchange).combine_send(channel, static_cast<cpu::Layout>(layout), y.data_ptr(), format_of(y)));
}

int64_t combine_recv(int64_t exchange, int64_t channel, Tensor out) {
    return static_cast<int64_t>(at(exchange).combine_recv(channel, out.data_ptr(), format_of(out)));
}

int64_t check_ids(int64_t exchange, Tensor ids) {
    return static_cast<int64_t>(
        at(exchange).check_ids(ids.data_ptr(), ids.scalar_type() == ScalarType::Long, ids.size(0)));
}

int64_t dispatch_record_bytes(int64_t exchange) {
    return at(exchange).dispatch_record_bytes();
}

int64_t pack_count(int64_t exchange, int64_t channel, Tensor x, std::optional<Tensor> scales, Tensor ids,
                   Tensor weights, int64_t slots, Tensor rows_per_rank) {
    return static_cast<int64_t>(at(exchange).pack_count(channel, input_of(x, scales, ids, weights, slots),
                                                        pointer<int64_t>(rows_per_rank)));
}

void pack_dispatch(int64_t exchange, int64_t channel, Tensor x, std::optional<Tensor> scales, Tensor ids,
                   Tensor weights, int64_t slots, Tensor records) {
    at(exchange).pack_dispatch(channel, input_of(x, scales, ids, weights, slots), pointer<char>(records));
}

int64_t unpack_dispatch(int64_t exchange, int64_t channel, Tensor records, Tensor counts) {
    return static_cast<int64_t>(
        at(exchange).unpack_dispatch(channel, pointer<char>(records), pointer<int64_t>(counts)));
}

int64_t pack_combine(int64_t exchange, int64_t channel, int64_t layout, Tensor y, Tensor records) {
    return static_cast<int64_t>(at(exchange).pack_combine(
        channel, static_cast<cpu::Layout>(layout), y.data_ptr(), format_of(y), pointer<char>(records)));
}

int64_t pack_close(int64_t exchange, int64_t channel, Tensor rows_per_source, Tensor records) {
    return static_cast<int64_t>(
        at(exchange).pack_close(channel, pointer<int64_t>(rows_per_source), pointer<char>(records)));
}

int64_t unpack_combine(int64_t exchange, int64_t channel, Tensor records, Tensor out) {
    return static_cast<int64_t>(
        at(exchange).unpack_combine(channel, pointer<char>(records), out.data_ptr(), format_of(out)));
}

int64_t host_sum_bytes(int64_t capacity) {
    return cpu::HostSum::board_bytes(capacity);
}
int64_t host_sum_create(int64_t rank, int64_t capacity, int64_t spin_us, std::vector<int64_t> boards) {
    return reinterpret_cast<int64_t>(new cpu::HostSum(rank, capacity, spin_us, pointers_of(boards)));
}
void host_sum_destroy(int64_t host_sum) {
    delete reinterpret_cast<cpu::HostSum*>(host_sum);
}
int64_t host_sum(int64_t host_sum, Tensor values, int64_t timeout_us) {
    auto& sum = *reinterpret_cast<cpu::HostSum*>(host_sum);
    return static_cast<int64_t>(sum.sum(pointer<int32_t>(values), values.numel(), timeout_us, kPatienceUs));
}
std::vector<int64_t> host_sum_error(int64_t host_sum) {
    const auto& sum = *reinterpret_cast<cpu::HostSum*>(host_sum);
    return {sum.blamed(), sum.waited_us()};
}

}  // namespace ep::ops
