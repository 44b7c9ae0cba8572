// The CPU exchange with its ranks as threads of one process, so that sanitizers see all of it:
// scripts/sanitizers.sh. usage: exchange_threads [PART OF A TEST'S NAME]
#include <atomic>
#include <chrono>
#include <cstdio>

#include "ranks.h"

namespace ep::test {
namespace {

using Clock = std::chrono::steady_clock;

int passed = 0;

int code(Status s) {
    return static_cast<int>(s);
}

std::vector<int64_t> meet(Exchange& exchange, int64_t timeout_us) {
    return exchange.recover(timeout_us, exchange.max_epoch());
}

void exchanges(const Setup& setup, int64_t count) {
    Ranks ranks(setup);
    ranks.run([&](int64_t rank) {
        for (int64_t n = 0; n < count; ++n) Part(ranks, rank, n, n % setup.channels).all(n % 2);
    });
}

void layouts_and_formats() {
    const DType payloads[] = {DType::kF32, DType::kF16, DType::kBF16, DType::kE4M3, DType::kBytes};
    int64_t variant = 0;
    for (Layout layout : {Layout::kRankMajor, Layout::kCompact, Layout::kExpertMajor})
        for (DType payload : payloads) {
            Setup s;
            s.layout = layout;
            s.payload = payload;
            s.world = 1 + variant % 5;
            s.chunks = 1 + variant % 4;
            s.wire = variant % 2 ? DType::kBF16 : DType::kF32;
            s.result = variant % 3 ? DType::kF32 : DType::kBF16;
            s.local_ids = variant % 2;
            exchanges(s, 25);
            ++variant;
        }
}

void chunks() {
    for (int64_t chunks = 1; chunks <= 4; ++chunks) {
        Setup s;
        s.chunks = chunks;
        s.max_tokens = 6;  // below the number of chunks too: some chunks have no tokens
        exchanges(s, 60);
    }
}

void random_delays() {
    Setup s;
    s.world = 4;
    s.hidden = 16;
    s.chunks = 2;
    Ranks ranks(s);
    ranks.run([&](int64_t rank) {
        Random random{static_cast<uint64_t>(rank)};
        auto dawdle = [&] {
            if (!random.below(6)) std::this_thread::sleep_for(std::chrono::microseconds(random.below(200)));
        };
        for (int64_t n = 0; n < 1000; ++n) {
            Part part(ranks, rank, n);
            dawdle();
            check_equal(code(part.send()), 0, "dispatch_send");
            dawdle();
            check_equal(code(part.wait()), 0, "dispatch_wait");
            dawdle();
            part.receive();
            check_equal(code(part.give_back()), 0, "combine_send");
            dawdle();
            check_equal(code(part.finish()), 0, "combine_recv");
        }
    });
}

// Dispatch on one channel while the other is open, in every order of the halves that keeps the ranks in step.
void two_channels_in_flight() {
    Setup s;
    s.channels = 2;
    s.layout = Layout::kCompact;
    Ranks ranks(s);
    ranks.run([&](int64_t rank) {
        for (int64_t n = 0; n < 100; n += 2) {
            Part a(ranks, rank, n, 0), b(ranks, rank, n + 1, 1);
            const bool swap = n % 4;
            Part &first = swap ? b : a, &second = swap ? a : b;
            check_equal(code(a.send()), 0, "dispatch_send");
            check_equal(code(b.send()), 0, "dispatch_send");
            for (Part* part : {&first, &second}) {
                check_equal(code(part->wait()), 0, "dispatch_wait");
                part->receive();
            }
            check_equal(code(second.give_back()), 0, "combine_send");
            check_equal(code(first.give_back()), 0, "combine_send");
            check_equal(code(first.finish()), 0, "combine_recv");
            check_equal(code(second.finish()), 0, "combine_recv");
        }
    });
}

// A dispatch without combine, on all ranks: closed by close() before or after the rows came, or by the next
// dispatch.
void exchanges_closed_by_all() {
    for (int64_t chunks : {1, 3}) {
        Setup s;
        s.chunks = chunks;
        Ranks ranks(s);
        ranks.run([&](int64_t rank) {
            for (int64_t n = 0; n < 120; ++n) {
                Part part(ranks, rank, n);
                const int64_t how = Random{static_cast<uint64_t>(n)}.below(5);
                if (how == 0) {
                    part.all();
                    continue;
                }
                check_equal(code(part.send()), 0, "dispatch_send");
                if (how == 1) continue;
                if (how == 3 || how == 4) {
                    check_equal(code(part.wait()), 0, "dispatch_wait");
                    part.receive();
                }
                if (how == 4) continue;
                check_equal(code(ranks[rank].close(0)), 0, "close");
            }
        });
    }
}

// Some ranks combine and some close the same exchange: those who wanted rows are told, and the channel goes
// on.
void exchanges_closed_by_some() {
    Setup s;
    s.world = 4;
    Ranks ranks(s);
    ranks.run([&](int64_t rank) {
        for (int64_t n = 0; n < 200; ++n) {
            Part part(ranks, rank, n);
            int64_t closer = -1;
            bool closes = false;
            for (int64_t r = s.world - 1; r >= 0; --r)
                if (!Random{static_cast<uint64_t>(n * 8 + r)}.below(4)) {
                    closer = r;
                    closes |= r == rank;
                }
            check_equal(code(part.send()), 0, "dispatch_send");
            if (closes) {
                if (n % 2) check_equal(code(ranks[rank].close(0)), 0, "close");
                continue;  // else the next dispatch closes
            }
            check_equal(code(part.wait()), 0, "dispatch_wait");
            part.receive();
            check_equal(code(part.give_back()), 0, "combine_send");
            check_equal(code(part.finish()), closer < 0 ? code(Status::kOk) : code(Status::kPeerClosed),
                        "combine_recv");
            if (closer >= 0) check_equal(ranks[rank].closed_by(), closer, "closed_by");
        }
    });
}

void epochs_wrap() {
    for (uint64_t epoch : {(uint64_t{1} << 32) - 6, (uint64_t{1} << 48) - 6, (uint64_t{1} << 47) - 6}) {
        Setup s;
        s.epoch = epoch;
        s.chunks = 2;
        Ranks ranks(s);
        ranks.run([&](int64_t rank) {
            for (int64_t n = 0; n < 3; ++n) Part(ranks, rank, n).all();
            // An exchange that is closed, and a recovery, beside the wrap.
            check_equal(code(Part(ranks, rank, 3).send()), 0, "dispatch_send");
            Part(ranks, rank, 4).all();
            check(meet(ranks[rank], 60'000'000).empty(), "recover");
            for (int64_t n = 5; n < 20; ++n) Part(ranks, rank, n).all();
        });
    }
}

void masked_rank() {
    for (int64_t gone = 0; gone < 3; ++gone) {
        Setup s;
        Ranks ranks(s);
        ranks.run([&](int64_t rank) {
            for (int64_t n = 0; n < 5; ++n) Part(ranks, rank, n).all();
            if (rank == gone) return;
            ranks[rank].mask_ranks({gone});
            for (int64_t n = 5; n < 30; ++n) Part(ranks, rank, n, 0, uint64_t{1} << gone).all();
        });
    }
}

// Where a rank stops.
enum class At { kBeforeDispatch, kBeforeCombine, kBeforeClose };

// One rank stops; the others find out in time and blame it; it comes back and finds out too; all recover.
void stopped_rank() {
    Setup s;
    s.world = 4;
    s.channels = 2;
    Ranks ranks(s);
    std::barrier live(s.world - 1), everybody(s.world);
    ranks.run([&](int64_t rank) {
        int64_t n = 0;
        for (int64_t stopped : {3, 0, 1})
            for (At at : {At::kBeforeDispatch, At::kBeforeCombine, At::kBeforeClose}) {
                for (int i = 0; i < 3; ++i, ++n) Part(ranks, rank, n, n % 2).all();
                const int64_t channel = n % 2;
                Part part(ranks, rank, n, channel);
                if (at != At::kBeforeDispatch) {
                    check_equal(code(part.send()), 0, "dispatch_send");
                    check_equal(code(part.wait()), 0, "dispatch_wait");
                    part.receive();
                }
                const Phase phase = at == At::kBeforeDispatch ? Phase::kDispatch : Phase::kCombine;
                if (rank != stopped) {
                    if (at == At::kBeforeDispatch) check_equal(code(part.send()), 0, "dispatch_send");
                    if (at == At::kBeforeCombine) check_equal(code(part.give_back()), 0, "combine_send");
                    live.arrive_and_wait();  // what is missing from here on is the stopped rank's
                    ranks[rank].set_timeout(200'000 + 50'000 * rank);
                    const auto start = Clock::now();
                    const Status status = at == At::kBeforeDispatch  ? part.wait()
                                          : at == At::kBeforeCombine ? part.finish()
                                                                     : ranks[rank].close(channel);
                    const ErrorWord& error = ranks[rank].error();
                    check(Clock::now() - start < std::chrono::seconds(20), "the deadline came too late");
                    check(status == Status::kTimeout || status == Status::kAborted,
                          "a stopped rank went unnoticed");
                    check_equal(code(error.status), code(status), "sticky status");
                    check_equal(error.peer, stopped, "blamed rank");
                    check(error.reporter != stopped, "the stopped rank cannot have reported");
                    check_equal(static_cast<int>(error.phase), static_cast<int>(phase), "phase");
                    check_equal(error.channel, channel, "channel");
                    if (status == Status::kTimeout)
                        check_equal(error.missing[0], uint64_t{1} << stopped, "missing ranks");
                    // Sticky, on all channels, at once.
                    check_equal(code(part.wait()), code(status), "dispatch_wait after the failure");
                    check_equal(code(Part(ranks, rank, n, 1 - channel).send()), code(status),
                                "dispatch_send");
                    check_equal(code(ranks[rank].close(channel)), code(status), "close after the failure");
                }
                everybody.arrive_and_wait();
                if (rank == stopped) {
                    // It goes on as if nothing had happened, and is told whom the others blamed.
                    Status status = at == At::kBeforeDispatch ? part.send() : Status::kOk;
                    if (at == At::kBeforeDispatch && status == Status::kOk) status = part.wait();
                    if (status == Status::kOk) {
                        if (at == At::kBeforeDispatch) part.receive();
                        check_equal(code(part.give_back()), 0, "combine_send");
                        status = part.finish();
                    }
                    // All flags may have been there already: then the next exchange tells.
                    if (status == Status::kOk && part.send() == Status::kOk) status = part.wait();
                    if (at == At::kBeforeClose && status == Status::kPeerClosed) {
                        check_equal(code(part.send()), 0, "dispatch_send");
                        status = part.wait();
                    }
                    check_equal(code(status), code(Status::kAborted), "status of the rank that was stopped");
                    check_equal(ranks[rank].error().peer, stopped, "blamed rank, by itself");
                    check_equal(code(ranks[rank].error().cause), code(Status::kTimeout), "cause");
                }
                ranks[rank].set_timeout(s.timeout_us);
                check(meet(ranks[rank], 60'000'000).empty(), "recover");
                ++n;
            }
        for (int i = 0; i < 20; ++i, ++n) Part(ranks, rank, n, n % 2).all();
    });
}

// Ranks that come to recover() late or not at all: the others are told who, in time, and may try again.
void late_to_recover() {
    Setup s;
    Ranks ranks(s);
    std::barrier everybody(s.world);
    ranks.run([&](int64_t rank) {
        for (int64_t n = 0; n < 4; ++n) Part(ranks, rank, n).all();
        for (int64_t late = 0; late < s.world; ++late) {
            // One that came first and gave up is not there, though its word is.
            if (rank == late) check(!meet(ranks[rank], 10'000).empty(), "recovered alone");
            everybody.arrive_and_wait();
            if (rank != late)
                for (int attempt = 0; attempt < 2; ++attempt) {
                    const std::vector<int64_t> absent = meet(ranks[rank], 50'000);
                    check(!absent.empty(), "recovered without a rank");
                    check_equal(code(ranks[rank].error().status), code(Status::kRecovering), "sticky status");
                    check_equal(code(Part(ranks, rank, 9).send()), code(Status::kRecovering),
                                "dispatch_send");
                }
            everybody.arrive_and_wait();
            // In another order, some ranks give up once more on the way.
            const bool through = rank == (late + 1) % s.world && meet(ranks[rank], 1'000).empty();
            check(through || meet(ranks[rank], 60'000'000).empty(), "recover when all came");
            everybody.arrive_and_wait();
            for (int64_t n = 10; n < 14; ++n) Part(ranks, rank, n).all();
        }
    });
}

// Every rank gives up and comes back at random, some in the middle of exchanges: whatever succeeds is right,
// and in the end all succeed. T and the routing stay, so only the rows tell exchanges apart; each rank gets
// its own rows back.
void recover_at_random() {
    Setup s;
    s.world = 4;
    Ranks ranks(s);
    std::atomic<int64_t> done{0};
    std::vector<int64_t> successes(s.world, 0);
    ranks.run([&](int64_t rank) {
        Random random{static_cast<uint64_t>(rank) + 77};
        const auto placement = cpu::Placement(rank, s.world, s.expert_rank());
        int64_t attempt = 0;
        bool counted = false;
        const auto end = Clock::now() + std::chrono::seconds(60);
        auto exchange = [&] {
            const int64_t slots = 4, k = s.top_k;
            std::vector<float> x(slots * s.hidden, static_cast<float>(++attempt * 8 + rank)),
                weights(slots * k, 1.0f);
            std::vector<int32_t> ids(slots * k);
            for (int64_t i = 0; i < slots * k; ++i) ids[i] = static_cast<int32_t>((i + i / k) % s.experts);
            const cpu::DispatchInput in{x.data(), DType::kF32,    nullptr, ids.data(),
                                        false,    weights.data(), slots,   slots};
            if (ranks[rank].dispatch_send(0, in) != Status::kOk) return false;
            if (ranks[rank].dispatch_wait(0) != Status::kOk) return false;
            std::vector<float> y(s.world * slots * s.hidden, 0.0f);
            for (int64_t slot = 0; slot < s.world * slots; ++slot) {
                const auto* row =
                    reinterpret_cast<const float*>(ranks.windows[rank] + ranks.layout.row(0, slot));
                for (int64_t j = 0; j < k; ++j)
                    for (int64_t i = 0; i < s.hidden && placement.is_local(ids[slot % slots * k + j]); ++i)
                        y[slot * s.hidden + i] += row[i];
            }
            if (ranks[rank].combine_send(0, Layout::kRankMajor, y.data(), DType::kF32) != Status::kOk)
                return false;
            std::vector<float> out(slots * s.hidden);
            if (ranks[rank].combine_recv(0, out.data(), DType::kF32) != Status::kOk) return false;
            for (size_t i = 0; i < out.size(); ++i)
                check(out[i] == static_cast<float>(k) * x[i], "a row of another exchange came back");
            ++successes[rank];
            return true;
        };
        // Towards the end everybody is patient, so that the last exchanges succeed.
        while (done.load() < s.world) {
            check(Clock::now() < end, "the ranks do not come together again");
            const bool patient = attempt > 150 || counted;
            ranks[rank].set_timeout(patient ? 300'000 : 500 + random.below(4000));
            if (!patient && !random.below(10))
                std::this_thread::sleep_for(std::chrono::milliseconds(random.below(8)));
            if (exchange()) {
                if (patient && !counted) {
                    counted = true;
                    ++done;
                }
                continue;
            }
            while (!meet(ranks[rank], patient ? 300'000 : 500 + random.below(8000)).empty()) {
                if (done.load() == s.world) return;
                check(Clock::now() < end, "the ranks do not recover together");
            }
        }
    });
    for (int64_t r = 0; r < s.world; ++r) check(successes[r] > 0, "no exchange succeeded");
}

void slots_differ() {
    Setup s;
    Ranks ranks(s);
    std::barrier everybody(s.world);
    ranks.run([&](int64_t rank) {
        Part(ranks, rank, 1).all();
        const Call call(s, 2, rank);
        cpu::DispatchInput in = call.input(s);
        in.slots = rank == 1 ? s.max_tokens : s.max_tokens - 1;
        in.tokens = std::min(in.tokens, in.slots);
        check_equal(code(ranks[rank].dispatch_send(0, in)), 0, "dispatch_send");
        everybody.arrive_and_wait();
        const Status status = ranks[rank].dispatch_wait(0);
        check_equal(code(status), code(Status::kSlotsDiffer), "status when T differs");
        check_equal(ranks[rank].error().peer, rank == 1 ? 0 : 1, "blamed rank");
        check(meet(ranks[rank], 60'000'000).empty(), "recover");
        Part(ranks, rank, 3).all();
    });
}

// Wrong arguments and calls out of order: nothing is sent, and the channel goes on.
void wrong_calls() {
    Setup s;
    Ranks ranks(s);
    ranks.run([&](int64_t rank) {
        Exchange& exchange = ranks[rank];
        std::vector<float> out(s.max_tokens * s.hidden);
        for (int64_t n = 0; n < 10; ++n) {
            Call call(s, 40, rank);
            for (int32_t wrong : {-2, static_cast<int32_t>(s.experts)}) {
                call.ids.assign(s.top_k, -1);
                call.ids[0] = wrong;
                cpu::DispatchInput in = call.input(s);
                in.tokens = 1;
                check_equal(code(exchange.dispatch_send(0, in)), code(Status::kBadId), "an id out of range");
            }
            call.ids.assign(s.top_k, 2);
            cpu::DispatchInput in = call.input(s);
            in.tokens = 1;
            check_equal(code(exchange.dispatch_send(0, in)), code(Status::kDuplicateId), "a duplicate id");
            check_equal(code(exchange.dispatch_wait(0)), code(Status::kWrongState), "wait without dispatch");
            check_equal(code(exchange.combine_send(0, s.layout, out.data(), DType::kF32)),
                        code(Status::kWrongState), "combine without dispatch");
            check_equal(code(exchange.combine_recv(0, out.data(), DType::kF32)), code(Status::kWrongState),
                        "combine_recv without dispatch");
            check_equal(code(exchange.close(0)), 0, "close without dispatch");
            Part(ranks, rank, n).all();
        }
    });
}

// A flag ahead of the exchange is an error at once; old abort words and old flags say nothing.
void words_of_other_epochs() {
    Setup s;
    s.world = 2;
    s.epoch = 100;
    Ranks ranks(s);
    std::barrier both(2);
    ranks.run([&](int64_t rank) {
        store_release(ranks.windows[1 - rank] + ranks.layout.abort_word(rank), make_word(100, 1));
        both.arrive_and_wait();
        for (int64_t n = 0; n < 3; ++n) Part(ranks, rank, n).all();
        both.arrive_and_wait();
        if (rank == 0)
            store_release(ranks.windows[1] + ranks.layout.dispatch_flag(0, 0, 0), make_word(109, 0));
        both.arrive_and_wait();
        if (rank == 0) return;
        Part part(ranks, rank, 3);
        check_equal(code(part.send()), 0, "dispatch_send");
        check_equal(code(part.wait()), code(Status::kAhead), "a flag from the future");
        check_equal(ranks[rank].error().epoch_seen, 109, "epoch_seen");
        check_equal(ranks[rank].error().epoch_expected, 104, "epoch_expected");
    });
}

// The same exchange over packed buffers, carried by memcpy.
void packed_buffers() {
    for (Layout layout : {Layout::kRankMajor, Layout::kCompact, Layout::kExpertMajor}) {
        Setup s;
        s.layout = layout;
        s.payload = layout == Layout::kCompact ? DType::kE4M3 : DType::kF32;
        Ranks ranks(s);
        std::barrier all(s.world);
        std::vector<std::vector<char>> sent(s.world);
        std::vector<std::vector<int64_t>> sizes(s.world, std::vector<int64_t>(s.world));
        auto exchange_bytes = [&](int64_t rank) {  // sizes: bytes for each destination
            all.arrive_and_wait();
            std::vector<char> got;
            for (int64_t r = 0; r < s.world; ++r) {
                int64_t at = 0;
                for (int64_t d = 0; d < rank; ++d) at += sizes[r][d];
                got.insert(got.end(), sent[r].begin() + at, sent[r].begin() + at + sizes[r][rank]);
            }
            all.arrive_and_wait();
            return got;
        };
        const int64_t wire_bytes = s.hidden * element_bytes(s.wire);
        ranks.run([&](int64_t rank) {
            for (int64_t n = 0; n < 30; ++n) {
                Exchange& exchange = ranks[rank];
                Part part(ranks, rank, n);
                const cpu::DispatchInput in = part.own().input(s);
                std::vector<int64_t> rows(s.world), counts;
                check_equal(code(exchange.pack_count(0, in, rows.data())), 0, "pack_count");
                int64_t total = 0;
                for (int64_t r = 0; r < s.world; ++r) {
                    sizes[rank][r] = rows[r] * exchange.dispatch_record_bytes();
                    total += sizes[rank][r];
                }
                sent[rank].assign(total, 0);
                exchange.pack_dispatch(0, in, sent[rank].data());
                const std::vector<char> records = exchange_bytes(rank);
                std::vector<int64_t> came(s.world);
                for (int64_t r = 0; r < s.world; ++r) {
                    came[r] = sizes[r][rank] / exchange.dispatch_record_bytes();
                    counts.insert(counts.end(), {came[r], Call(s, n, r).tokens, in.slots});
                }
                check_equal(code(exchange.unpack_dispatch(0, records.data(), counts.data())), 0,
                            "unpack_dispatch");
                all.arrive_and_wait();
                const bool closes = n % 3 == 2;
                total = 0;
                for (int64_t r = 0; r < s.world; ++r) {
                    sizes[rank][r] = cpu::kPackedFlagBytes + came[r] * wire_bytes;
                    total += sizes[rank][r];
                }
                sent[rank].assign(total, 0);
                if (closes) {
                    check_equal(code(exchange.pack_close(0, came.data(), sent[rank].data())), 0,
                                "pack_close");
                } else {
                    part.receive();
                    check_equal(code(exchange.pack_combine(0, s.layout, part.y().data(), s.result,
                                                           sent[rank].data())),
                                0, "pack_combine");
                }
                const std::vector<char> sums = exchange_bytes(rank);
                std::vector<char> out(in.tokens * s.hidden * 4);
                check_equal(code(exchange.unpack_combine(0, sums.data(), out.data(), s.result)),
                            code(closes ? Status::kPeerClosed : Status::kOk), "unpack_combine");
                if (!closes) part.compare_result(out);
            }
        });
    }
}

}  // namespace

void fail(const std::string& what) {
    std::printf("  FAILED: %s\n%d passed, 1 failed; the tests after it did not run\n", what.c_str(), passed);
    std::fflush(stdout);
    std::_Exit(1);
}

}  // namespace ep::test

int main(int argc, char** argv) {
    using namespace ep::test;
    const std::pair<const char*, void (*)()> tests[] = {
        {"layouts_and_formats", layouts_and_formats},
        {"chunks", chunks},
        {"random_delays", random_delays},
        {"two_channels_in_flight", two_channels_in_flight},
        {"exchanges_closed_by_all", exchanges_closed_by_all},
        {"exchanges_closed_by_some", exchanges_closed_by_some},
        {"epochs_wrap", epochs_wrap},
        {"masked_rank", masked_rank},
        {"stopped_rank", stopped_rank},
        {"late_to_recover", late_to_recover},
        {"recover_at_random", recover_at_random},
        {"slots_differ", slots_differ},
        {"wrong_calls", wrong_calls},
        {"words_of_other_epochs", words_of_other_epochs},
        {"packed_buffers", packed_buffers},
    };
    for (const auto& [name, test] : tests) {
        if (argc > 1 && !std::strstr(name, argv[1])) continue;
        const auto start = Clock::now();
        std::printf("%-26s", name);
        std::fflush(stdout);
        try {
            test();
        } catch (const std::exception& error) {
            fail(error.what());
        }
        std::printf("%6.2f s  passed\n", std::chrono::duration<double>(Clock::now() - start).count());
        ++passed;
    }
    std::printf("%d passed, 0 failed\n", passed);
    return passed ? 0 : 1;
}
