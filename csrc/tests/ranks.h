// Ranks as threads of one process, and calls whose data any thread can make again: what the C++ tests are
// built on.
#pragma once

#include <barrier>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "../common/memory_order.h"
#include "../kernels/cpu/exchange.h"

namespace ep::test {

using cpu::Exchange;
using cpu::Layout;

// Prints the failure and the summary, and ends the program.
[[noreturn]] void fail(const std::string& what);

inline void check(bool ok, const std::string& what) {
    if (!ok) throw std::runtime_error(what);
}
template <class A, class B>
void check_equal(A is, B wanted, const std::string& what) {
    check(is == static_cast<A>(wanted), what + " is " + std::to_string(static_cast<int64_t>(is)) + ", " +
                                            std::to_string(static_cast<int64_t>(wanted)) + " was wanted");
}

// splitmix64: the same numbers on every machine.
struct Random {
    uint64_t state;
    uint64_t next() {
        uint64_t z = (state += 0x9E3779B97F4A7C15u);
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
        return z ^ (z >> 31);
    }
    int64_t below(int64_t n) { return static_cast<int64_t>(next() % static_cast<uint64_t>(n)); }
};

// What a world of ranks is made for.
struct Setup {
    int64_t world = 3;
    int64_t top_k = 3;
    int64_t experts = 7;  // not a multiple of the world: ranks hold different numbers of them
    int64_t max_tokens = 9;
    int64_t hidden = 128;
    int64_t chunks = 1;
    int64_t channels = 1;
    DType payload = DType::kF32;  // in the window; kE4M3 is quantised from fp32 rows
    DType wire = DType::kF32;
    DType result = DType::kF32;  // of y and of what combine returns
    Layout layout = Layout::kRankMajor;
    bool local_ids = true;
    uint64_t epoch = 0;
    int64_t timeout_us = 60'000'000;

    int64_t row_bytes() const {
        return payload == DType::kBytes ? hidden + 16 : hidden * element_bytes(payload);
    }
    int64_t scale_bytes() const {
        if (payload == DType::kE4M3) return hidden / kScaleBlock * 4;
        return payload == DType::kBytes ? 12 : 0;
    }
    std::vector<int32_t> expert_rank() const {
        std::vector<int32_t> rank;
        for (int64_t e = 0; e < experts; ++e) rank.push_back(static_cast<int32_t>(e * 5 % world));
        return rank;
    }
};

// What rank `rank` dispatches in exchange `number`: every thread can make it again to know what it should
// have got. All values are small whole numbers, so every sum is exact in every format and the reference needs
// no order.
struct Call {
    int64_t tokens, slots;
    std::vector<int32_t> ids;
    std::vector<int64_t> wide_ids;
    std::vector<float> weights, x;
    std::vector<char> row, scales;  // as they should stand in the window

    Call(const Setup& s, int64_t number, int64_t rank) {
        Random of_all{static_cast<uint64_t>(number) * 7919 + 1};  // T is equal on all ranks
        slots = 1 + of_all.below(s.max_tokens);
        Random random{static_cast<uint64_t>(number) * 1000003 + static_cast<uint64_t>(rank) * 17 + 5};
        tokens = random.below(4) ? random.below(slots + 1) : 0;
        for (int64_t t = 0; t < tokens; ++t) {
            std::vector<int32_t> left;
            for (int64_t e = 0; e < s.experts; ++e) left.push_back(static_cast<int32_t>(e));
            for (int64_t j = 0; j < s.top_k; ++j) {
                const int64_t at = random.below(static_cast<int64_t>(left.size()));
                ids.push_back(random.below(8) ? left[at] : -1);
                left.erase(left.begin() + at);
                weights.push_back(static_cast<float>(1 + random.below(2)));
            }
            for (int64_t i = 0; i < s.hidden; ++i) x.push_back(static_cast<float>(random.below(7) - 3));
        }
        wide_ids.assign(ids.begin(), ids.end());
        row.resize(tokens * s.row_bytes());
        scales.resize(tokens * s.scale_bytes());
        if (s.payload == DType::kBytes) {
            for (char& byte : row) byte = static_cast<char>(random.below(256));
            for (char& byte : scales) byte = static_cast<char>(random.below(256));
        } else if (s.payload == DType::kE4M3) {
            for (int64_t t = 0; t < tokens; ++t)
                cpu::quantize_row(reinterpret_cast<uint8_t*>(&row[t * s.row_bytes()]),
                                  reinterpret_cast<float*>(&scales[t * s.scale_bytes()]), &x[t * s.hidden],
                                  DType::kF32, s.hidden);
        } else if (tokens) {
            cpu::convert_row(row.data(), s.payload, x.data(), DType::kF32, tokens * s.hidden);
        }
    }

    cpu::DispatchInput input(const Setup& s, bool wide = false) const {
        const bool quantised = s.payload == DType::kE4M3;
        return {quantised ? static_cast<const void*>(x.data()) : row.data(),
                quantised ? DType::kF32 : s.payload,
                quantised ? nullptr : scales.data(),
                wide ? static_cast<const void*>(wide_ids.data()) : ids.data(),
                wide,
                weights.data(),
                tokens,
                slots};
    }
};

// Expert e multiplies a row by this.
inline float factor(int32_t expert) {
    return static_cast<float>(1 + expert % 3);
}

// Windows and exchanges of all ranks, and a thread for each.
class Ranks {
  public:
    explicit Ranks(const Setup& setup) : setup(setup) {
        const ExchangeShape shape{
            setup.world,       setup.top_k,         setup.max_tokens,
            setup.row_bytes(), setup.scale_bytes(), setup.hidden * element_bytes(setup.wire),
            setup.chunks,      setup.channels,      0};
        layout = WindowLayout::make(shape);
        for (int64_t r = 0; r < setup.world; ++r) {
            auto* window = static_cast<char*>(std::aligned_alloc(kLine, align_line(layout.total)));
            std::memset(window, 0, layout.total);
            // As if exchanges had been running since epoch 0.
            for (int64_t c = 0; c < setup.channels; ++c)
                for (int64_t s = 0; s < setup.world; ++s)
                    for (int64_t chunk = 0; chunk < setup.chunks; ++chunk) {
                        store_release(window + layout.dispatch_flag(c, s, chunk), make_word(setup.epoch, 0));
                        store_release(window + layout.combine_flag(c, s, chunk), make_word(setup.epoch, 0));
                    }
            windows.push_back(window);
        }
        for (int64_t r = 0; r < setup.world; ++r) {
            const cpu::Settings settings{shape,           r,  setup.hidden, setup.wire,      setup.payload,
                                         setup.local_ids, -7, setup.epoch,  setup.timeout_us};
            exchanges.push_back(std::make_unique<Exchange>(
                settings, cpu::Placement(r, setup.world, setup.expert_rank()), windows));
        }
    }
    ~Ranks() {
        for (char* window : windows) std::free(window);
    }
    Ranks(const Ranks&) = delete;

    Exchange& operator[](int64_t rank) { return *exchanges[rank]; }

    // Runs act(rank) in a thread per rank. The first failure ends the program: the other ranks may wait for
    // this one at places that have no deadline.
    void run(const std::function<void(int64_t)>& act) {
        std::vector<std::thread> threads;
        for (int64_t r = 0; r < setup.world; ++r)
            threads.emplace_back([&, r] {
                try {
                    act(r);
                } catch (const std::exception& error) {
                    fail("rank " + std::to_string(r) + ": " + error.what());
                }
            });
        for (std::thread& thread : threads) thread.join();
    }

    Setup setup;
    WindowLayout layout;
    std::vector<char*> windows;
    std::vector<std::unique_ptr<Exchange>> exchanges;
};

// One rank's part in exchange `number`, with every result compared.
class Part {
  public:
    Part(Ranks& ranks, int64_t rank, int64_t number, int64_t channel = 0, uint64_t without = 0)
        : ranks_(ranks),
          s_(ranks.setup),
          rank_(rank),
          channel_(channel),
          without_(without),
          own_(s_, number, rank) {
        for (int64_t r = 0; r < s_.world; ++r) calls_.emplace_back(s_, number, r);
        const auto expert_rank = s_.expert_rank();
        for (int64_t e = 0; e < s_.experts; ++e)
            if (expert_rank[e] == rank) local_.push_back(static_cast<int32_t>(e));
    }

    Status send(bool wide = false) { return ranks_[rank_].dispatch_send(channel_, own_.input(s_, wide)); }
    Status wait() { return ranks_[rank_].dispatch_wait(channel_); }

    // Compares all that was received and makes y of it.
    void receive() {
        Exchange& exchange = ranks_[rank_];
        const int64_t k = s_.top_k, capacity = s_.world * own_.slots;
        std::vector<int32_t> tokens(s_.world), per_expert(local_.size()), wanted_per_expert(local_.size(), 0);
        const int64_t rows = exchange.dispatch_counts(channel_, tokens.data(), per_expert.data());
        const bool by_expert = s_.layout == Layout::kExpertMajor, view = s_.layout == Layout::kRankMajor;
        const int64_t lead = by_expert ? static_cast<int64_t>(local_.size()) * capacity
                             : view    ? capacity
                                       : rows;
        std::vector<char> out(lead * s_.row_bytes()), scales(lead * s_.scale_bytes());
        std::vector<int32_t> ids(lead * k);
        std::vector<float> weights(lead * k);
        exchange.dispatch_read(channel_, s_.layout, {out.data(), scales.data(), ids.data(), weights.data()});
        const char* got_rows = view ? ranks_.windows[rank_] + ranks_.layout.row(channel_, 0) : out.data();
        const char* got_scales =
            view ? ranks_.windows[rank_] + ranks_.layout.scale_row(channel_, 0) : scales.data();

        std::vector<float> y(lead * s_.hidden, 0.0f);
        int64_t next = 0;
        for (int64_t source = 0; source < s_.world; ++source) {
            const Call& call = calls_[source];
            const bool absent = without_ >> source & 1;
            check_equal(tokens[source], absent ? 0 : call.tokens, "tokens_per_source");
            for (int64_t t = 0; t < call.tokens && !absent; ++t) {
                bool any = false;
                float sum = 0;
                auto compare = [&](int64_t at) {
                    check(!std::memcmp(got_rows + at * s_.row_bytes(), &call.row[t * s_.row_bytes()],
                                       s_.row_bytes()),
                          "a row is not what its source sent");
                    check(!s_.scale_bytes() ||
                              !std::memcmp(got_scales + at * s_.scale_bytes(),
                                           &call.scales[t * s_.scale_bytes()], s_.scale_bytes()),
                          "scales are not what their source sent");
                };
                for (int64_t j = 0; j < k; ++j) {
                    const int32_t id = call.ids[t * k + j];
                    const int64_t e = index_of(id);
                    if (e < 0) continue;
                    any = true;
                    sum += call.weights[t * k + j] * factor(id);
                    if (by_expert) {
                        const int64_t at = e * capacity + wanted_per_expert[e];
                        compare(at);
                        for (int64_t i = 0; i < s_.hidden; ++i)
                            y[at * s_.hidden + i] = factor(id) * call.x[t * s_.hidden + i];
                    }
                    ++wanted_per_expert[e];
                }
                const int64_t at = view ? source * own_.slots + t : next;
                if (!by_expert && (any || view)) {
                    for (int64_t j = 0; j < k; ++j) {
                        const int32_t id = call.ids[t * k + j];
                        const int64_t e = s_.local_ids ? index_of(id) : any ? id : -1;
                        check_equal(ids[at * k + j], e < 0 ? -7 : e, "a received id");
                        check(weights[at * k + j] == (e < 0 ? 0.0f : call.weights[t * k + j]),
                              "a received weight");
                    }
                }
                if (!any) continue;
                ++next;
                if (by_expert) continue;
                compare(at);
                for (int64_t i = 0; i < s_.hidden; ++i)
                    y[at * s_.hidden + i] = sum * call.x[t * s_.hidden + i];
            }
        }
        check_equal(rows, next, "rows that came");
        check(per_expert == wanted_per_expert, "rows_per_expert");
        y_.resize(y.size() * element_bytes(s_.result));
        if (!y.empty())
            cpu::convert_row(y_.data(), s_.result, y.data(), DType::kF32, static_cast<int64_t>(y.size()));
    }

    Status give_back() { return ranks_[rank_].combine_send(channel_, s_.layout, y_.data(), s_.result); }

    // Waits for the sums and compares them.
    Status finish() {
        std::vector<char> out(own_.tokens * s_.hidden * element_bytes(s_.result), 'x');
        const Status status = ranks_[rank_].combine_recv(channel_, out.data(), s_.result);
        if (status == Status::kOk) compare_result(out);
        return status;
    }

    void compare_result(const std::vector<char>& out) const {
        const auto expert_rank = s_.expert_rank();
        std::vector<float> wanted(own_.tokens * s_.hidden, 0.0f);
        for (int64_t t = 0; t < own_.tokens; ++t)
            for (int64_t j = 0; j < s_.top_k; ++j) {
                const int32_t id = own_.ids[t * s_.top_k + j];
                if (id < 0 || (without_ >> expert_rank[id] & 1)) continue;
                const float weight = own_.weights[t * s_.top_k + j] * factor(id);
                for (int64_t i = 0; i < s_.hidden; ++i)
                    wanted[t * s_.hidden + i] += weight * own_.x[t * s_.hidden + i];
            }
        std::vector<char> bytes(out.size());
        if (!bytes.empty())
            cpu::convert_row(bytes.data(), s_.result, wanted.data(), DType::kF32,
                             static_cast<int64_t>(wanted.size()));
        check(bytes == out, "the result of combine is not the reference's");
    }

    // The whole exchange; every step must succeed.
    void all(bool wide = false) {
        check_equal(static_cast<int>(send(wide)), 0, "status of dispatch_send");
        check_equal(static_cast<int>(wait()), 0, "status of dispatch_wait");
        receive();
        check_equal(static_cast<int>(give_back()), 0, "status of combine_send");
        check_equal(static_cast<int>(finish()), 0, "status of combine_recv");
    }

    const Call& own() const { return own_; }
    const std::vector<char>& y() const { return y_; }

  private:
    int64_t index_of(int32_t id) const {
        for (size_t i = 0; i < local_.size(); ++i)
            if (local_[i] == id) return static_cast<int64_t>(i);
        return -1;
    }

    Ranks& ranks_;
    const Setup& s_;
    int64_t rank_, channel_;
    uint64_t without_;  // mask of ranks that take no part
    Call own_;
    std::vector<Call> calls_;
    std::vector<int32_t> local_;
    std::vector<char> y_;
};

}  // namespace ep::test
