// What the CUDA kernels do, on a CPU: see emulator.h. The ranks are threads. Bulk copies are not emulated.
#include <chrono>
#include <cstdio>
#include <random>
#include <string>
#include <thread>

#include "../../common/memory_order.h"
#include "../../kernels/cuda/exchange.h"
#include "../../kernels/cuda/layouts.h"

namespace ep::cuda {

cudaError_t launch_dispatch_bulk(const View&, const DispatchArgs&, Launch) {
    throw std::logic_error("bulk copies are not emulated");
}
cudaError_t launch_combine_bulk(const View&, const CombineArgs&, Launch) {
    throw std::logic_error("bulk copies are not emulated");
}
int dispatch_bulk_blocks_per_sm() {
    return 0;
}
int combine_bulk_blocks_per_sm() {
    return 0;
}

namespace {

using Bytes = std::vector<uint4>;  // aligned

Bytes bytes(int64_t count) {
    return Bytes(static_cast<size_t>(count / 16 + 1));
}
template <class T>
T* as(Bytes& b) {
    return reinterpret_cast<T*>(b.data());
}

struct Case {
    int world, tokens, hidden, top_k, experts;
    int64_t max_blocks;
    bool host;  // windows in host memory
    int stagger;
    int direct =
        0;  // so many ranks after each other write into each other's GPUs, all others through the host
    uint64_t epoch = 0;  // before the first exchange
};

struct Member {
    Bytes window, copies;
    bool has_window = false;  // in copies, for those who write into this GPU
    std::unique_ptr<Exchange> exchange;
    WindowLayout layout;

    // What a dispatch has received: rows of this rank's window, or of its copy of that.
    const char* rows(int64_t channel) {
        if (copies.empty()) return as<char>(window) + layout.row(channel, 0);
        if (has_window) return as<char>(copies) + layout.row(channel, 0);
        return as<char>(copies) + channel * layout.copy_bytes() + layout.row(channel, 0) -
               layout.channel(channel);
    }
};

// Exchanges of all ranks over windows of this process. `only_sums`: rows are words with weights.
std::vector<Member> members(const Case& c, int64_t timeout_us, bool only_sums = false) {
    const int64_t row_bytes = only_sums ? (8 * c.top_k + 15) / 16 * 16 : c.hidden * 2;
    const ExchangeShape shape{c.world, c.top_k, c.tokens, row_bytes, 0, c.hidden * 2, 64, 2, 0};
    const WindowLayout layout = WindowLayout::make(shape);
    std::vector<Member> ranks(static_cast<size_t>(c.world));
    std::vector<char*> windows;
    for (Member& m : ranks) {
        m.layout = layout;
        m.window = bytes(layout.total);
        windows.push_back(as<char>(m.window));
        if (c.host) m.copies = bytes(2 * layout.copy_bytes());
        m.has_window = c.direct != 0;
        if (c.direct) m.copies = bytes(layout.total);
    }
    std::vector<int32_t> owners;
    for (int e = 0; e < c.experts; ++e) owners.push_back(e % c.world);
    for (int r = 0; r < c.world; ++r) {
        Settings s{shape,   r,          c.hidden,     DType::kBF16, DType::kBF16, false, -1,
                   c.epoch, timeout_us, c.max_blocks, nullptr,      {},           false, c.stagger,
                   1.0,     0};
        std::vector<char*> written = windows;
        if (c.host || c.direct) s.copies = as<char>(ranks[static_cast<size_t>(r)].copies);
        for (int other = 0; c.direct && other < c.world; ++other)
            if (other / c.direct == r / c.direct) {
                s.direct.push_back(other);
                if (other != r)
                    written[static_cast<size_t>(other)] = as<char>(ranks[static_cast<size_t>(other)].copies);
            }
        ranks[static_cast<size_t>(r)].exchange = std::make_unique<Exchange>(s, owners, written);
    }
    return ranks;
}

struct Tokens {
    int count;
    std::vector<uint16_t> x;
    std::vector<int32_t> ids;
    std::vector<float> weights;
};

Tokens make(const Case& c, int rank, int slots, unsigned seed) {
    std::mt19937 random(seed * 100 + static_cast<unsigned>(rank));
    Tokens t;
    t.count = static_cast<int>(random() % static_cast<unsigned>(slots + 1));
    for (int i = 0; i < t.count * c.hidden; ++i)
        t.x.push_back(float_to_bf16(static_cast<float>(random() % 64) / 8 - 4));
    for (int i = 0; i < t.count; ++i) {
        std::vector<int32_t> all;
        for (int e = 0; e < c.experts; ++e) all.push_back(e);
        std::shuffle(all.begin(), all.end(), random);
        for (int k = 0; k < c.top_k; ++k) t.ids.push_back(random() % 8 ? all[static_cast<size_t>(k)] : -1);
    }
    for (int i = 0; i < t.count * c.top_k; ++i) t.weights.push_back(static_cast<float>(random()) / 4e9f);
    return t;
}

// What a rank receives beside rows.
struct Arrived {
    std::vector<int32_t> ids, sources;
    std::vector<float> weights;
};

DispatchArgs dispatch_args(const Case& c, const Tokens& t, int slots, Arrived& arrived) {
    arrived.ids.resize(static_cast<size_t>(c.world * slots * c.top_k));
    arrived.weights.resize(arrived.ids.size());
    arrived.sources.resize(static_cast<size_t>(c.world));
    DispatchArgs d{};
    d.x = reinterpret_cast<const char*>(t.x.data());
    d.ids = t.ids.data();
    d.weights = t.weights.data();
    d.out_ids = arrived.ids.data();
    d.out_weights = arrived.weights.data();
    d.tokens_per_source = arrived.sources.data();
    d.plan.slots = slots;
    d.tokens = t.count;
    d.x_type = DType::kBF16;
    d.send = d.receive = true;
    return d;
}

float result(float x, int expert) {
    return bf16_to_float(float_to_bf16(x * static_cast<float>(expert + 1)));
}

std::vector<uint16_t> wanted(const Case& c, const Tokens& t) {
    std::vector<uint16_t> out;
    for (int i = 0; i < t.count; ++i)
        for (int h = 0; h < c.hidden; ++h) {
            float total = 0;
            for (int r = 0; r < c.world; ++r) {
                float sum = 0;
                for (int k = 0; k < c.top_k; ++k) {
                    const int at = i * c.top_k + k, e = t.ids[static_cast<size_t>(at)];
                    if (e < 0 || e % c.world != r) continue;
                    const float x = bf16_to_float(t.x[static_cast<size_t>(i * c.hidden + h)]);
                    sum = std::fma(t.weights[static_cast<size_t>(at)], result(x, e), sum);
                }
                total += bf16_to_float(float_to_bf16(sum));
            }
            out.push_back(float_to_bf16(total));
        }
    return out;
}

#define EXPECT(condition) \
    if (!(condition))     \
    throw std::runtime_error(std::string(__FILE__ ":") + std::to_string(__LINE__) + ": " #condition)

// The second half of a combine.
void receive(Exchange& exchange, int64_t channel, CombineArgs a) {
    a.places = nullptr;
    a.send = false, a.receive = true;
    exchange.combine(channel, a, nullptr);
}

// What a rank does: rows by expert, and the weighted sums of their results back.
void rank_of(const Case& c, int rank, Member& member, Exchange& sums, std::string& wrong) try {
    Exchange& exchange = *member.exchange;
    const int experts = (c.experts - rank + c.world - 1) / c.world;
    std::vector<int16_t> local;
    for (int e = 0; e < c.experts; ++e)
        local.push_back(static_cast<int16_t>(e % c.world == rank ? e / c.world : -1));
    for (unsigned number = 0; number < 7; ++number) {
        const int slots = number == 3   ? 1
                          : number == 4 ? (c.tokens + 1) / 2
                                        : c.tokens,
                  count = c.world * slots, channel = number % 2;
        Tokens t = make(c, rank, slots, number);
        Arrived arrived;
        DispatchArgs d = dispatch_args(c, t, slots, arrived);
        const std::vector<int32_t>& ids = arrived.ids;
        const std::vector<float>& weights = arrived.weights;
        d.receive = number % 3 != 1 && number != 3;
        exchange.dispatch(channel, d, nullptr);
        if (number == 3) continue;  // sent, and left open: the next one has more blocks
        if (!d.receive) {
            d.send = false, d.receive = true;
            exchange.dispatch(channel, d, nullptr);
        }
        EXPECT(exchange.error().status == Status::kOk);
        EXPECT(arrived.sources[static_cast<size_t>(rank)] == t.count);

        std::vector<int32_t> places(ids.size(), -7), totals(static_cast<size_t>(experts) + 1),
            tiles(static_cast<size_t>(kMaxTiles * (experts + 1)));
        const int64_t row_bytes = c.hidden * 2;
        Bytes by_expert = bytes(experts * count * row_bytes), scratch = bytes(count * row_bytes);
        IndexArgs index{};
        index.slots = {ids.data(), weights.data(), local.data(), count, c.top_k, experts};
        index.tile_counts = tiles.data();
        index.places = places.data();
        index.totals = totals.data();
        index.by_expert = true;
        GatherArgs gather{};
        gather.slots = index.slots;
        gather.places = places.data();
        gather.rows = member.rows(channel);
        gather.out_rows = as<char>(by_expert);
        gather.row_bytes = row_bytes;
        gather.places_per_slot = c.top_k;
        launch_sort(index, gather, static_cast<int>(c.max_blocks), exchange.early_blocks(), nullptr);
        std::vector<int> next(static_cast<size_t>(experts));
        for (int entry = 0; entry < count * c.top_k; ++entry) {
            const int id = ids[static_cast<size_t>(entry)], place = places[static_cast<size_t>(entry)];
            const int e = id < 0 ? -1 : local[static_cast<size_t>(id)];
            EXPECT(place == (e < 0 ? -1 : e * count + next[static_cast<size_t>(e)]++));
        }
        for (int e = 0; e < experts; ++e)
            EXPECT(totals[static_cast<size_t>(e)] == next[static_cast<size_t>(e)]);
        auto* y = as<uint16_t>(by_expert);
        for (int e = 0; e < experts; ++e)
            for (int row = 0; row < count; ++row)
                for (int h = 0; h < c.hidden; ++h) {
                    uint16_t& at = y[(static_cast<int64_t>(e) * count + row) * c.hidden + h];
                    at = row < next[static_cast<size_t>(e)]
                             ? float_to_bf16(result(bf16_to_float(at), e * c.world + rank))
                             : uint16_t{0x7FC0};  // NaN: nobody reads it
                }

        const std::vector<uint16_t> want = wanted(c, t);
        CombineArgs back{};
        back.y = as<char>(by_expert);
        back.places = places.data();
        back.weights = weights.data();
        back.sums = as<char>(scratch);
        back.return_blocks = 3;
        back.plan.slots = slots;
        back.y_type = DType::kBF16;
        // Else left open: number 2 until the sums end it, number 4 until the next dispatch on the channel.
        if (number != 2 && number != 4) {
            std::vector<uint16_t> out(want.size() + 1);
            back.out = reinterpret_cast<char*>(out.data());
            back.send = true, back.receive = number % 3 != 1;
            exchange.combine(channel, back, nullptr);
            if (!back.receive) receive(exchange, channel, back);
            out.resize(want.size());
            EXPECT(out == want);
            EXPECT(exchange.error().status == Status::kOk);
        }
        // The same results by another exchange, whole and in halves.
        if (!sums.takes_sums(d.plan, DType::kBF16)) continue;
        for (int half = 0; half < 2; ++half) {
            std::vector<uint16_t> out(want.size() + 1);
            SumsArgs s{d, back};
            s.answer.out = reinterpret_cast<char*>(out.data());
            s.answer.receive = half == 0;
            const DeviceWord& word = *exchange.word(channel);
            if (number == 2) s.ended = exchange.word(channel);
            EXPECT(half == 1 || word.stage == (number == 2 || number == 4 ? Stage::kReceived : Stage::kIdle));
            sums.sums(channel, s, nullptr);
            EXPECT(word.stage == (number == 4 ? Stage::kReceived : Stage::kIdle));
            if (half == 1 && number == 2) continue;  // left open, too
            if (half == 1) receive(sums, channel, s.answer);
            out.resize(want.size());
            EXPECT(sums.error().status == Status::kOk);
            EXPECT(out == want);
        }
    }
} catch (const std::exception& error) {
    wrong = "rank " + std::to_string(rank) + ": " + error.what();
}

int run(const Case& c) {
    std::vector<Member> all = members(c, 20'000'000), sums = members(c, 20'000'000, true);
    std::vector<std::string> wrong(all.size());
    std::vector<std::thread> ranks;
    for (size_t r = 0; r < all.size(); ++r)
        ranks.emplace_back([&, r] { rank_of(c, static_cast<int>(r), all[r], *sums[r].exchange, wrong[r]); });
    for (std::thread& rank : ranks) rank.join();
    int failed = 0;
    for (const std::string& text : wrong) {
        failed |= !text.empty();
        if (!text.empty()) std::printf("%s\n", text.c_str());
    }
    std::printf("world %d, T %d, hidden %d, top-%d of %d, %d blocks%s%s%s%s: %s\n", c.world, c.tokens,
                c.hidden, c.top_k, c.experts, static_cast<int>(c.max_blocks), c.host ? ", host" : "",
                c.stagger ? ", staggered" : "", c.direct ? ", mixed" : "", c.epoch ? ", late" : "",
                failed ? "FAILED" : "passed");
    std::fflush(stdout);
    return failed;
}

// Rank 0 dispatches `first` slots and rank 1 `second`, or exchanges sums of them; rank 2 does not come, if
// there is one, and may be masked; then it has told them to stop, as one does that nobody answers. What
// stopped each.
std::vector<ErrorWord> stopped(const Case& c, int64_t timeout_us, int first, int second, bool only_sums,
                               bool masked = false) {
    std::vector<Member> all = members(c, timeout_us, only_sums);
    ErrorWord blame;
    blame.status = Status::kTimeout;
    blame.peer = 0;
    blame.epoch_expected = c.epoch + 1;
    for (size_t r = 0; r < 2 && masked; ++r) {
        all[r].exchange->mask_ranks({2});
        store_release(as<char>(all[r].window) + all[r].layout.abort_word(2), abort_word_of(blame));
    }
    std::vector<std::thread> ranks;
    for (size_t r = 0; r < 2; ++r)
        ranks.emplace_back([&, r] {
            // So that rank 0 waits, and looks for who tells it to stop.
            if (masked && r == 1) std::this_thread::sleep_for(std::chrono::milliseconds(200));
            const int slots = r == 0 ? first : second;
            Tokens t = make(c, static_cast<int>(r), slots, 1);
            Arrived arrived;
            const DispatchArgs d = dispatch_args(c, t, slots, arrived);
            if (!only_sums) {
                all[r].exchange->dispatch(0, d, nullptr);
                return;
            }
            const std::vector<int32_t> places(arrived.ids.size(), -1);
            std::vector<uint16_t> out(t.x.size() + 1);
            SumsArgs s{d, {}};
            s.answer.places = places.data();
            s.answer.out = reinterpret_cast<char*>(out.data());
            s.answer.receive = true;
            all[r].exchange->sums(0, s, nullptr);
        });
    for (std::thread& rank : ranks) rank.join();
    return {all[0].exchange->error(), all[1].exchange->error()};
}

int faults() {
    int failed = 0;
    auto check = [&failed](bool right, const char* what) {
        failed += !right;
        std::printf("%s: %s\n", what, right ? "passed" : "FAILED");
        std::fflush(stdout);
    };
    for (const bool only_sums : {false, true}) {
        bool right = true;
        for (const ErrorWord& e : stopped({2, 8, 64, 3, 8, 4, false, 0}, 20'000'000, 5, 8, only_sums))
            right &= e.status == Status::kSlotsDiffer ||
                     (e.status == Status::kAborted && e.cause == Status::kSlotsDiffer);
        check(right, only_sums ? "ranks that give different T for sums are told"
                               : "ranks that give different T are told");
        const std::vector<ErrorWord> alone =
            stopped({3, 8, 64, 3, 8, 4, false, 0}, 3'000'000, 8, 8, only_sums);
        right = false;
        for (const ErrorWord& e : alone) right |= e.status == Status::kTimeout && (e.missing[0] >> 2 & 1);
        for (const ErrorWord& e : alone)
            right &= e.status == Status::kTimeout || e.status == Status::kAborted;
        check(right, only_sums ? "a rank that does not come to sums is named"
                               : "a rank that does not come is named");
        right = true;
        for (const ErrorWord& e : stopped({3, 8, 64, 3, 8, 4, false, 0}, 20'000'000, 8, 8, only_sums, true))
            right &= e.status == Status::kOk;
        check(right,
              only_sums ? "a masked rank is not waited for in sums" : "a masked rank is not waited for");
    }
    return failed;
}

}  // namespace
}  // namespace ep::cuda

int main() {
    using ep::cuda::Case;
    const Case cases[] = {
        {1, 3, 64, 2, 3, 2, false, 0},
        {2, 5, 64, 3, 8, 4, false, 0},
        {2, 40, 264, 4, 9, 3, false, 0},
        {3, 9, 128, 8, 16, 2, false, 0},
        {2, 5, 64, 3, 8, 4, true, 0},
        {3, 7, 64, 2, 7, 3, true, 0},
        {4, 5, 64, 3, 8, 2, false, 2},
        {2, 150, 32, 2, 5, 3, false, 0},
        {2, 3, 128, 3, 8, 12, false, 0},
        {2, 1, 4096, 2, 5, 20, false, 0},  // rows that several blocks bring to their experts
        {4, 5, 64, 3, 8, 4, false, 0, 2},
        {3, 3, 128, 8, 16, 12, false, 0, 1},
        {2, 5, 64, 3, 8, 4, false, 0, 0, 0x7FFFFFFF - 6},  // where words begin with their first epochs again
    };
    int failed = 0;
    for (const Case& c : cases) failed += ep::cuda::run(c);
    failed += ep::cuda::faults();
    std::printf("%d failed\n", failed);
    return failed != 0;
}
