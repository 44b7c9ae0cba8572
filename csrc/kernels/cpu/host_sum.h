// Sums of a few numbers over the ranks of one machine: what hosts agree on before each step of an engine.
//
// Each rank owns a board that its peers map and read: two banks, each with a round number and the rank's
// values. In round r a rank writes its values into bank r % 2 of its board, stores r there (a release), and
// adds up the same bank of all boards once they hold r. It writes that bank again in round r + 2, when it has
// seen everybody's r + 1, which each stored after it had read all of r: so two banks are enough, and nothing
// is ever reset.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "../../common/status.h"
#include "waiting.h"

namespace ep::cpu {

class HostSum {
  public:
    static int64_t board_bytes(int64_t capacity) { return 2 * bank_bytes(capacity); }

    // boards: one of each rank, zeroed, as mapped here. A wait keeps its core for `spin_us` and naps then.
    HostSum(int64_t rank, int64_t capacity, int64_t spin_us, std::vector<char*> boards);

    // values[i] becomes the sum of all ranks' values[i]; count <= capacity, equal on all ranks. kWaiting
    // after `patience_us`: call again with the same arguments. kTimeout and kSlotsDiffer stay, with blamed()
    // set.
    Status sum(int32_t* values, int64_t count, int64_t timeout_us, int64_t patience_us);

    int64_t blamed() const { return blamed_; }
    int64_t waited_us() const { return waited_us_; }

  private:
    struct Bank {
        uint64_t round;
        int64_t count;
    };
    static int64_t bank_bytes(int64_t capacity) { return 64 + (capacity * 4 + 63) / 64 * 64; }
    Bank* bank(int64_t rank) const {
        return reinterpret_cast<Bank*>(boards_[rank] + (round_ % 2) * bank_bytes(capacity_));
    }
    static int32_t* values_of(Bank* bank) {
        return reinterpret_cast<int32_t*>(reinterpret_cast<char*>(bank) + 64);
    }

    int64_t rank_, capacity_, spin_us_;
    std::vector<char*> boards_;
    uint64_t round_ = 0;
    std::optional<Clock::time_point> waiting_since_;  // of a wait that has returned kWaiting
    Status failed_ = Status::kOk;
    int64_t blamed_ = -1;
    int64_t waited_us_ = 0;
};

}  // namespace ep::cpu
