// HostSum with its ranks as threads of one process, so that sanitizers see all of it.
#include "../kernels/cpu/host_sum.h"

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <thread>

namespace {

using ep::Status;
using ep::cpu::HostSum;

constexpr int64_t kCapacity = 24, kForever = 20'000'000, kPatience = 50;

void check(bool right, const char* what) {
    if (right) return;
    std::printf("FAILED: %s\n", what);
    std::_Exit(1);
}

// Boards that are aligned as shared memory is.
struct Boards {
    explicit Boards(int64_t world) {
        for (int64_t r = 0; r < world; ++r) {
            const auto size = static_cast<size_t>(HostSum::board_bytes(kCapacity));
            char* board = static_cast<char*>(std::aligned_alloc(64, size));
            std::fill(board, board + size, 0);
            pointers.push_back(board);
        }
    }
    ~Boards() {
        for (char* board : pointers) std::free(board);
    }
    std::vector<char*> pointers;
};

void on_all(int64_t world, const std::function<void(int64_t)>& job) {
    std::vector<std::thread> threads;
    for (int64_t r = 0; r < world; ++r) threads.emplace_back(job, r);
    for (auto& thread : threads) thread.join();
}

Status sum(HostSum& host_sum, int32_t* values, int64_t count, int64_t timeout_us = kForever) {
    Status status;
    do status = host_sum.sum(values, count, timeout_us, kPatience);
    while (status == Status::kWaiting);
    return status;
}

// Every round has other values and another count, and every rank is the late one now and then.
void rounds(int64_t world, int64_t spin_us, int64_t number) {
    Boards boards(world);
    on_all(world, [&](int64_t rank) {
        HostSum host_sum(rank, kCapacity, spin_us, boards.pointers);
        for (int64_t n = 0; n < number; ++n) {
            const int64_t count = 1 + n % kCapacity;
            int32_t values[kCapacity];
            for (int64_t i = 0; i < count; ++i) values[i] = static_cast<int32_t>(n * 1000 + rank * 10 + i);
            if ((n * 7 + rank * 3) % 50 == 0) std::this_thread::sleep_for(std::chrono::microseconds(200));
            check(sum(host_sum, values, count) == Status::kOk, "a sum ends well");
            for (int64_t i = 0; i < count; ++i) {
                const int64_t want = world * (n * 1000 + i) + 10 * world * (world - 1) / 2;
                check(values[i] == want, "a sum is right");
            }
        }
    });
}

void absent_rank() {
    Boards boards(3);
    on_all(2, [&](int64_t rank) {
        HostSum host_sum(rank, kCapacity, 0, boards.pointers);
        int32_t value = 1;
        check(sum(host_sum, &value, 1, 30'000) == Status::kTimeout, "an absent rank ends the wait");
        check(host_sum.blamed() == 2, "the absent rank is named");
        check(host_sum.waited_us() >= 30'000, "the wait had its time");
        check(sum(host_sum, &value, 1) == Status::kTimeout, "the failure stays");
    });
}

void other_count() {
    Boards boards(2);
    on_all(2, [&](int64_t rank) {
        HostSum host_sum(rank, kCapacity, 0, boards.pointers);
        int32_t values[2] = {1, 1};
        check(sum(host_sum, values, 1 + rank) == Status::kSlotsDiffer, "counts must be equal");
        check(host_sum.blamed() == 1 - rank, "the other rank is named");
    });
}

}  // namespace

int main() {
    for (int64_t world : {1, 2, 3, 5})
        for (int64_t spin_us : {0, 100}) rounds(world, spin_us, 2000);
    absent_rank();
    other_count();
    std::printf("host sums: passed\n");
}
