// See host_sum.h.
#include "host_sum.h"

#include <algorithm>

#include "../../common/memory_order.h"

namespace ep::cpu {

HostSum::HostSum(int64_t rank, int64_t capacity, int64_t spin_us, std::vector<char*> boards)
    : rank_(rank), capacity_(capacity), spin_us_(spin_us), boards_(std::move(boards)) {}

Status HostSum::sum(int32_t* values, int64_t count, int64_t timeout_us, int64_t patience_us) {
    if (failed_ != Status::kOk) return failed_;
    const auto called = Clock::now();
    if (!waiting_since_) {
        ++round_;
        Bank* own = bank(rank_);
        own->count = count;
        std::copy(values, values + count, values_of(own));
        store_release(&own->round, round_);
    }
    const auto start = waiting_since_.value_or(called);
    waiting_since_.reset();

    const int64_t world = static_cast<int64_t>(boards_.size());
    int64_t awaited = 0, naps = 0;
    while (true) {
        // The clock comes first: a rank that was stopped for long finds what has come meanwhile before it
        // blames anybody.
        waited_us_ = microseconds_since(start);
        while (awaited < world && load_acquire(&bank(awaited)->round) == round_) ++awaited;
        if (awaited == world) break;
        if (waited_us_ > timeout_us) {
            blamed_ = awaited;
            return failed_ = Status::kTimeout;
        }
        if (microseconds_since(called) > patience_us) {
            waiting_since_ = start;
            return Status::kWaiting;
        }
        if (waited_us_ < spin_us_)
            pause();
        else
            back_off(naps++);
    }
    std::fill(values, values + count, 0);
    for (int64_t r = 0; r < world; ++r) {
        Bank* theirs = bank(r);
        if (theirs->count != count) {
            blamed_ = r;
            return failed_ = Status::kSlotsDiffer;
        }
        for (int64_t i = 0; i < count; ++i) values[i] += values_of(theirs)[i];
    }
    return Status::kOk;
}

}  // namespace ep::cpu
