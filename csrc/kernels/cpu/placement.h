// Which rank holds an expert, and which ranks a token goes to.
#pragma once

#include <cstdint>
#include <vector>

#include "../../common/layout.h"

namespace ep::cpu {

struct RankMask {
    uint64_t words[kMaskWords] = {};

    void set(int64_t r) { words[r / 64] |= uint64_t{1} << (r % 64); }
    void clear(int64_t r) { words[r / 64] &= ~(uint64_t{1} << (r % 64)); }
    bool test(int64_t r) const { return words[r / 64] >> (r % 64) & 1; }
    bool any() const { return words[0] | words[1]; }
};

class Placement {
  public:
    // expert_rank[e]: the rank that holds expert e. A rank's experts are numbered in the order of their
    // global ids.
    Placement(int64_t rank, int64_t world, std::vector<int32_t> expert_rank)
        : rank_(static_cast<int32_t>(rank)),
          expert_rank_(std::move(expert_rank)),
          local_(expert_rank_.size()) {
        std::vector<int32_t> held(world, 0);
        for (size_t e = 0; e < expert_rank_.size(); ++e) local_[e] = held[expert_rank_[e]]++;
        num_local_ = held[rank];
    }

    int64_t num_experts() const { return static_cast<int64_t>(expert_rank_.size()); }
    int64_t num_local() const { return num_local_; }
    bool is_local(int32_t id) const { return id >= 0 && expert_rank_[id] == rank_; }
    int32_t local_index(int32_t id) const { return local_[id]; }

    bool any_local(const int32_t* ids, int64_t k) const {
        for (int64_t j = 0; j < k; ++j)
            if (is_local(ids[j])) return true;
        return false;
    }

    // The ranks that a token with these ids goes to; once each.
    RankMask route(const int32_t* ids, int64_t k) const {
        RankMask mask;
        for (int64_t j = 0; j < k; ++j)
            if (ids[j] >= 0) mask.set(expert_rank_[ids[j]]);
        return mask;
    }

    static bool has_duplicate(const int32_t* ids, int64_t k) {
        for (int64_t j = 1; j < k; ++j)
            for (int64_t i = 0; i < j; ++i)
                if (ids[j] >= 0 && ids[i] == ids[j]) return true;
        return false;
    }

  private:
    int32_t rank_;
    std::vector<int32_t> expert_rank_;
    std::vector<int32_t> local_;
    int64_t num_local_ = 0;
};

}  // namespace ep::cpu
