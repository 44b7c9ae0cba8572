#include "exchange.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <iterator>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>

#include "layouts.h"

namespace ep::cuda {
namespace {

void check(cudaError_t error, const char* what) {
    if (error != cudaSuccess)
        throw std::runtime_error(std::string("ep_backend: ") + what +
                                 " failed: " + cudaGetErrorString(error));
}

// A block that waits keeps its place on the GPU. If all exchanges that can be under way can be resident
// together, none can wait for a block that found no place. Kernels behind them take places, too: see Early.
class Residency {
  public:
    struct Places {
        int per_channel = 0, channels = 0;
        int blocks() const { return per_channel * channels; }
    };
    // `share`: of Settings.
    void reserve(int device, int64_t share, Places places, int capacity) {
        const std::lock_guard lock(mutex_);
        Gpu& gpu = gpus_[device];
        const int used = gpu.sum().blocks;
        const auto mine = gpu.exchanges.emplace(share, places);
        if (gpu.sum().blocks > capacity) {
            gpu.exchanges.erase(mine);
            throw std::runtime_error("ep_backend: " + std::to_string(used) +
                                     " blocks are reserved by other "
                                     "channels, " +
                                     std::to_string(places.blocks()) + " more do not fit the GPU's " +
                                     std::to_string(capacity) + ": use fewer SMs per channel");
        }
        gpu.capacity = capacity;
        gpu.tell();
    }
    void release(int device, int64_t share, Places places) {
        const std::lock_guard lock(mutex_);
        Gpu& gpu = gpus_[device];
        auto [at, end] = gpu.exchanges.equal_range(share);
        while (at != end &&
               (at->second.per_channel != places.per_channel || at->second.channels != places.channels))
            ++at;
        if (at != end) gpu.exchanges.erase(at);
        gpu.tell();
    }
    // Where kernels on `device`, the current one, read it.
    const Early* early(int device) {
        const std::lock_guard lock(mutex_);
        Gpu& gpu = gpus_[device];
        if (gpu.early == nullptr) {
            check(cudaMalloc(&gpu.early, sizeof *gpu.early), "cudaMalloc");
            check(cudaMemset(gpu.early, 0, sizeof *gpu.early), "cudaMemset");
        }
        return gpu.early;
    }

  private:
    struct Sum {
        int blocks = 0, channels = 0;
    };
    struct Gpu {
        std::multimap<int64_t, Places> exchanges;
        int capacity = 0;
        Early* early = nullptr;

        // Those with the same share, which is not 0, count as one: as many channels as the one with most,
        // of the largest.
        Sum sum() const {
            Sum all;
            Places most;
            for (auto at = exchanges.begin(); at != exchanges.end(); ++at) {
                const Places& one = at->second;
                most = {std::max(most.per_channel, one.per_channel), std::max(most.channels, one.channels)};
                const auto next = std::next(at);
                if (next != exchanges.end() && at->first != 0 && at->first == next->first) continue;
                all = {all.blocks + most.blocks(), all.channels + most.channels};
                most = {};
            }
            return all;
        }
        void tell() {
            const Sum now = sum();
            const Early now_is = now.channels <= 1            ? Early::kAny
                                 : 2 * now.blocks <= capacity ? Early::kNext
                                                              : Early::kNever;
            // An error is that of a context that is gone, or the next call finds it again.
            if (cudaMemcpy(early, &now_is, sizeof now_is, cudaMemcpyHostToDevice) != cudaSuccess)
                cudaGetLastError();
        }
    };

    std::mutex mutex_;
    std::unordered_map<int, Gpu> gpus_;
};

Residency& residency() {
    static Residency r;
    return r;
}
Residency::Places places_of(const Settings& settings) {
    return {static_cast<int>(settings.max_blocks), static_cast<int>(settings.shape.num_channels)};
}

int power_of_two_at_most(int n) {
    int p = 1;
    while (2 * p <= n) p *= 2;
    return p;
}

// Of a combine's sending half, whose passes send so many ranks' rows.
int warps_per_row(const Plan& plan, int64_t ranks) {
    return power_of_two_at_most(
        static_cast<int>(std::max<int64_t>(1, kWarps / (ranks * plan.tokens_per_chunk))));
}

// Ranks that a token goes to, on average, if all experts are chosen alike.
double rows_per_token(const ExchangeShape& shape) {
    const auto world = static_cast<double>(shape.world);
    return world * (1 - std::pow(1 - 1 / world, static_cast<double>(shape.top_k)));
}

// Blocks that fill the links by bulk copies; with more of them the last chunks end later. Measured with 2 and
// 4 ranks: those that copy within the GPU do not count.
int copy_blocks(const ExchangeShape& shape) {
    constexpr int64_t kLinkBlocks = 50;
    return static_cast<int>(shape.world > 1 ? kLinkBlocks * shape.world / (shape.world - 1) : 1 << 30);
}

bool contains(const std::vector<int64_t>& values, int64_t value) {
    return std::find(values.begin(), values.end(), value) != values.end();
}

// Offsets in device memory.
struct Place {
    int64_t at = 0;
    int64_t operator()(int64_t bytes) {
        const int64_t offset = at;
        at += align_line(bytes);
        return offset;
    }
};

}  // namespace

// What was fastest at each size on 2 and 4 H200 (docs/performance.md, "Plans"). Sizes are what a chunk sends
// to all ranks together: smaller ones mean more flags, larger ones fewer blocks at work, or more to wait for.
Plan make_plan(const Settings& settings, int64_t slots) {
    constexpr double kBulkFrom = 20e6;  // bytes of a result from which bulk copies are faster
    constexpr double kBulkChunk = 128e3, kChunk = 32e3, kHostChunk = 10e3;
    constexpr int64_t kParallel = 32, kHostParallel = 16;  // chunks, however little they send
    const ExchangeShape& shape = settings.shape;
    const bool host = settings.copies != nullptr;
    const double ranks = rows_per_token(shape);
    const double back = ranks * static_cast<double>(shape.wire_bytes);
    const int64_t least = (slots + shape.num_chunks - 1) / shape.num_chunks;
    Plan plan{};
    plan.slots = static_cast<int32_t>(slots);
    plan.bulk =
        !host && static_cast<double>(slots * shape.wire_bytes) >= kBulkFrom && least <= kMaxBulkTokens;
    int64_t tokens, wanted = 1;
    const double scale = settings.chunk_scale;
    if (plan.bulk) {
        const double both = (back + ranks * static_cast<double>(shape.row_bytes)) / 2;
        const double own = std::clamp(std::exp2(std::round(std::log2(kBulkChunk / both))), 4.0, 16.0);
        tokens = std::clamp<int64_t>(std::llround(own * scale), 1, kMaxBulkTokens);
    } else {
        const auto by_size =
            static_cast<int64_t>(static_cast<double>(slots) * back / (host ? kHostChunk : kChunk));
        wanted = std::min(std::max(by_size, host ? kHostParallel : kParallel),
                          host ? shape.num_chunks : settings.max_blocks);
        wanted = std::clamp<int64_t>(std::llround(static_cast<double>(wanted) / scale), 1, shape.num_chunks);
        tokens = std::min<int64_t>((slots + wanted - 1) / wanted, 2 * kWarps);
    }
    plan.tokens_per_chunk = static_cast<int32_t>(std::max(least, tokens));
    plan.token_chunks = static_cast<int32_t>((slots + plan.tokens_per_chunk - 1) / plan.tokens_per_chunk);
    // The nearest power of two to what makes as many chunks as wanted.
    plan.segments = plan.bulk ? 1 : kMaxSegments;
    while (plan.segments > 1 && (4 * wanted < 3 * plan.chunks() || plan.chunks() > shape.num_chunks))
        plan.segments /= 2;
    plan.warps_per_token =
        plan.bulk ? kCopyWarps : power_of_two_at_most(std::max(1, kWarps / plan.tokens_per_chunk));
    return plan;
}

Exchange::Exchange(const Settings& settings, const std::vector<int32_t>& expert_rank,
                   const std::vector<char*>& windows)
    : Exchange(settings) {
    const ExchangeShape& shape = settings.shape;
    if (settings.stagger != 0 && (settings.copies || settings.staged || shape.world % settings.stagger != 0))
        throw std::runtime_error("ep_backend: the staggered order is for windows of GPUs in equal groups");
    check(cudaGetDevice(&device_index_), "cudaGetDevice");
    int sms = 0, major = 0;
    check(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device_index_),
          "cudaDeviceGetAttribute");
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device_index_),
          "cudaDeviceGetAttribute");
    dependent_ = major >= 9 && !settings.staged;  // else the kernel ahead may be NCCL's
    const int blocks_per_sm =
        std::min({dispatch_blocks_per_sm(), combine_blocks_per_sm(), sums_blocks_per_sm()});
    // Bulk copies into host memory take longer than stores (docs/performance.md); their kernels know no
    // staggered order.
    bulk_ = !settings.copies && settings.stagger == 0 && major >= 9 &&
            std::min(dispatch_bulk_blocks_per_sm(), combine_bulk_blocks_per_sm()) >= blocks_per_sm;
    const int capacity = sms * blocks_per_sm;
    const Early* const early = residency().early(device_index_);
    residency().reserve(device_index_, settings.share, places_of(settings), capacity);
    has_places_ = true;

    const auto experts = static_cast<int64_t>(expert_rank.size());
    Place place;
    const int64_t words = place(shape.num_channels * kLine);
    const int64_t error = place(sizeof(ErrorCell));
    const int64_t mask = place(kMaskWords * 8);
    const int64_t ranks = place(experts);
    const int64_t locals = place(experts * 2);
    const int64_t routes = place(shape.num_channels * shape.max_tokens * kRouteWords * 4);
    check(cudaMalloc(&device_, place.at), "cudaMalloc");
    check(cudaMemset(device_, 0, place.at), "cudaMemset");
    check(cudaHostAlloc(&pinned_, sizeof(ErrorCell), cudaHostAllocMapped), "cudaHostAlloc");
    *pinned_ = ErrorCell{};

    std::vector<uint8_t> rank_table(experts);
    std::vector<int16_t> local_table(experts);
    std::vector<int16_t> held(shape.world, 0);
    for (int64_t e = 0; e < experts; ++e) {
        rank_table[e] = static_cast<uint8_t>(expert_rank[e]);
        local_table[e] = held[expert_rank[e]]++;
    }
    check(cudaMemcpy(device_ + ranks, rank_table.data(), experts, cudaMemcpyHostToDevice), "cudaMemcpy");
    check(cudaMemcpy(device_ + locals, local_table.data(), experts * 2, cudaMemcpyHostToDevice),
          "cudaMemcpy");
    // The usual placement is arithmetic; a table costs a load where latency counts most.
    std::vector<int32_t> usual;
    for (int64_t r = 0; r < shape.world; ++r)
        usual.insert(usual.end(), experts / shape.world + (r < experts % shape.world),
                     static_cast<int32_t>(r));
    const bool contiguous = usual == expert_rank && experts >= shape.world;

    const bool whole = !settings.direct.empty();
    for (int64_t c = 0; c < shape.num_channels; ++c) {
        View v{};
        v.layout = WindowLayout::make(shape);
        std::copy(windows.begin(), windows.end(), v.windows);
        v.mailbox = windows[settings.rank];
        if (settings.copies)
            v.windows[settings.rank] =
                settings.copies + (whole ? 0 : c * v.layout.copy_bytes() - v.layout.channel(c));
        for (int r = 0; r < shape.world; ++r)
            if (settings.copies && r != settings.rank && !contains(settings.direct, r))
                v.mailed[r / 32] |= 1u << (r % 32);
        v.returns = whole ? v.windows[settings.rank] : v.mailbox;
        v.staged = settings.staged;
        v.group = std::max(settings.stagger, 1);
        v.word = reinterpret_cast<DeviceWord*>(device_ + words + c * kLine);
        v.error = reinterpret_cast<ErrorCell*>(device_ + error);
        v.host_error = pinned_;
        v.routes = reinterpret_cast<uint32_t*>(device_ + routes) + c * shape.max_tokens * kRouteWords;
        v.expert_rank = contiguous ? nullptr : reinterpret_cast<uint8_t*>(device_ + ranks);
        v.expert_local = contiguous ? nullptr : reinterpret_cast<int16_t*>(device_ + locals);
        v.mask = reinterpret_cast<uint64_t*>(device_ + mask);
        v.early = early;
        v.rank = static_cast<int32_t>(settings.rank);
        v.world = static_cast<int32_t>(shape.world);
        v.top_k = static_cast<int32_t>(shape.top_k);
        v.channel = static_cast<int32_t>(c);
        v.experts = static_cast<int32_t>(experts);
        v.experts_base = static_cast<int32_t>(experts / shape.world);
        v.experts_more = static_cast<int32_t>(experts % shape.world);
        v.per_base = Divisor::of(v.experts_base);
        v.per_base_and_one = Divisor::of(v.experts_base + 1);
        v.pad_id = settings.pad_id;
        v.local_ids = settings.local_ids;
        views_.push_back(v);
    }
    load_kernels();
    recover(settings.epoch);
}

void Exchange::load_kernels() const {
    const Launch none{
        .blocks = 0, .stream = nullptr, .dependent = false, .staggered = settings_.stagger != 0};
    const View& v = view(0);
    auto load = [](cudaError_t error) { check(error, "loading a kernel"); };
    SumsArgs a{};
    a.answer.wire = settings_.wire;
    a.answer.out_type = settings_.out;
    for (const bool ids_are_64_bit : {false, true}) {
        a.ask.ids_are_64_bit = ids_are_64_bit;
        load(launch_sums(v, a, none));
        a.ask.quantize = false;
        load(launch_dispatch(v, a.ask, none));
        a.ask.quantize = true;
        for (const DType x_type : {DType::kF32, DType::kF16, DType::kBF16}) {
            a.ask.x_type = x_type;
            load(launch_dispatch(v, a.ask, none));
        }
    }
    const int32_t no_place = -1;
    for (const DType y_type : {settings_.out, DType::kF32})
        for (const int32_t* places : {static_cast<const int32_t*>(nullptr), &no_place}) {
            a.answer.y_type = y_type;
            a.answer.places = places;
            load(launch_combine(v, a.answer, none));
        }
    load(launch_close(v, true, none));
    load(load_layout_kernels(settings_.wire, settings_.out));
}

Exchange::~Exchange() {
    // Errors cannot be reported here; a context that is gone has freed everything already. This waits for
    // kernels that still run.
    cudaFree(device_);
    cudaFreeHost(pinned_);
    if (has_places_) residency().release(device_index_, settings_.share, places_of(settings_));
}

Plan Exchange::complete(Plan plan) const {
    Plan chosen = make_plan(settings_, plan.slots);
    if (plan.tokens_per_chunk) {
        chosen = plan;
        chosen.warps_per_token = std::min(plan.warps_per_token, plan.bulk ? kCopyWarps : kWarps);
        chosen.token_chunks = (plan.slots + plan.tokens_per_chunk - 1) / plan.tokens_per_chunk;
    }
    if (chosen.chunks() > settings_.shape.num_chunks)
        throw std::runtime_error("ep_backend: the plan has " + std::to_string(chosen.chunks()) + " chunks; " +
                                 std::to_string(settings_.shape.num_chunks) + " at most were wanted");
    chosen.per_chunk = Divisor::of(chosen.tokens_per_chunk);
    chosen.per_segments = Divisor::of(chosen.segments);
    return chosen;
}

int Exchange::blocks_of(const Plan& plan, bool both_halves) const {
    const int64_t chunks = static_cast<int64_t>(plan.chunks()) * (both_halves && settings_.copies ? 2 : 1);
    return static_cast<int>(std::min(chunks, settings_.max_blocks));
}

cudaError_t Exchange::dispatch(int64_t channel, DispatchArgs a, cudaStream_t stream) {
    a.plan = complete(a.plan);
    const int blocks = blocks_of(a.plan, a.send && a.receive);
    if (bulk_ && a.plan.bulk)
        return launch_dispatch_bulk(
            view(channel), a,
            {a.quantize ? blocks : std::min(blocks, copy_blocks(settings_.shape)), stream, dependent_});
    return launch_dispatch(
        view(channel), a,
        {.blocks = blocks, .stream = stream, .dependent = dependent_, .staggered = settings_.stagger != 0});
}

cudaError_t Exchange::combine(int64_t channel, CombineArgs a, cudaStream_t stream) {
    a.plan = complete(a.plan);
    a.hidden = static_cast<int32_t>(settings_.hidden);
    a.wire = settings_.wire;
    a.out_type = settings_.out;
    a.warps_per_row = warps_per_row(a.plan, settings_.stagger ? 1 : settings_.shape.world);
    const int blocks = blocks_of(a.plan, a.send && a.receive);
    // Bulk copies are of whole rows; and sums that a rank has for itself stay on its GPU if they are rows.
    if (a.places && ((bulk_ && a.plan.bulk) || keeps_own_apart())) {
        const auto slots = static_cast<int32_t>(settings_.shape.world * a.plan.slots);
        const auto top_k = static_cast<int32_t>(settings_.shape.top_k);
        const cudaError_t added =
            launch_return({a.y, a.sums, a.places, a.weights, slots, top_k, a.hidden, 0, a.y_type, a.wire},
                          a.return_blocks, stream);
        if (added != cudaSuccess) return added;
        a.y = a.sums;
        a.y_type = a.wire;
        a.places = nullptr;
    }
    if (bulk_ && a.plan.bulk && a.y_type == a.wire)
        return launch_combine_bulk(view(channel), a,
                                   {std::min(blocks, copy_blocks(settings_.shape)), stream, dependent_});
    return launch_combine(
        view(channel), a,
        {.blocks = blocks, .stream = stream, .dependent = dependent_, .staggered = settings_.stagger != 0});
}

bool Exchange::takes_sums(const Plan& plan, DType y_type) const {
    const ExchangeShape& shape = settings_.shape;
    const bool alike = y_type == settings_.wire && y_type == settings_.out;
    const bool words_fit = shape.row_bytes >= 8 * shape.top_k;
    return alike && words_fit && !settings_.staged && !keeps_own_apart() && !complete(plan).bulk;
}

cudaError_t Exchange::sums(int64_t channel, SumsArgs a, cudaStream_t stream) {
    a.ask.plan = a.answer.plan = complete(a.ask.plan);
    a.answer.hidden = static_cast<int32_t>(settings_.hidden);
    a.answer.wire = settings_.wire;
    a.answer.warps_per_row = warps_per_row(a.ask.plan, settings_.shape.world);
    return launch_sums(view(channel), a,
                       {.blocks = blocks_of(a.ask.plan, false), .stream = stream, .dependent = dependent_});
}

cudaError_t Exchange::close(int64_t channel, bool send, cudaStream_t stream) {
    return launch_close(view(channel), send, {1, stream, dependent_});
}

ErrorWord Exchange::error() {
    const volatile ErrorCell* cell = pinned_;
    if (cell->stopped) {
        std::atomic_thread_fence(std::memory_order_acquire);
        return pinned_->word;
    }
    ErrorWord word{};
    if (const int32_t closed_by = cell->closed_by; closed_by != 0) {
        pinned_->closed_by = 0;
        word.status = Status::kPeerClosed;
        word.peer = closed_by - 1;
        word.reporter = static_cast<int32_t>(settings_.rank);
        word.phase = Phase::kCombine;
    }
    return word;
}

uint64_t Exchange::max_epoch() const {
    uint64_t newest = settings_.epoch;
    for (const View& v : views_) {
        DeviceWord word;
        check(cudaMemcpy(&word, v.word, sizeof word, cudaMemcpyDeviceToHost), "cudaMemcpy");
        if (epoch_distance(word.epoch, newest) > 0) newest = word.epoch;
    }
    return newest;
}

void Exchange::stop() {
    const uint32_t stopped = 1;
    check(cudaMemcpy(&views_[0].error->stopped, &stopped, sizeof stopped, cudaMemcpyHostToDevice),
          "cudaMemcpy");
    check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
}

void Exchange::recover(uint64_t epoch) {
    for (View& v : views_) {
        const DeviceWord word{epoch & kEpochMask, Stage::kIdle, 0, 0, 0, 0, 0};
        check(cudaMemcpy(v.word, &word, sizeof word, cudaMemcpyHostToDevice), "cudaMemcpy");
    }
    // Not kernel parameters: graphs that were captured before must see them too.
    ErrorCell cell{};
    cell.floor = next_epoch(epoch);
    cell.timeout_ns = static_cast<uint64_t>(settings_.timeout_us) * 1000;
    check(cudaMemcpy(views_[0].error, &cell, sizeof cell, cudaMemcpyHostToDevice), "cudaMemcpy");
    *pinned_ = ErrorCell{};
    check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
}

void Exchange::set_timeout(int64_t us) {
    settings_.timeout_us = us;
    const uint64_t ns = static_cast<uint64_t>(us) * 1000;
    check(cudaMemcpy(&views_[0].error->timeout_ns, &ns, sizeof ns, cudaMemcpyHostToDevice), "cudaMemcpy");
}

void Exchange::mask_ranks(const std::vector<int64_t>& ranks) {
    uint64_t words[kMaskWords] = {};
    for (const int64_t r : ranks) words[r / 64] |= uint64_t{1} << (r % 64);
    check(cudaMemcpy(views_[0].mask, words, sizeof words, cudaMemcpyHostToDevice), "cudaMemcpy");
}

}  // namespace ep::cuda
