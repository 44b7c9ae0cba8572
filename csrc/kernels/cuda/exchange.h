// One rank's side of the exchanges over GPU memory that its peers can write: what the host keeps, and the
// plan of a call.
//
// Everything is allocated when an Exchange is made; dispatch and combine only launch, so they can be captured
// in a CUDA graph. Calls of a channel happen in the same order on all ranks, on streams that are ordered one
// after another.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <vector>

#include "launch.h"

namespace ep::cuda {

struct Settings {
    ExchangeShape shape;
    int64_t rank;
    int64_t hidden;
    DType wire;
    DType out;
    bool local_ids;
    int32_t pad_id;
    uint64_t epoch;  // epoch of the exchange before the first
    int64_t timeout_us;
    int64_t max_blocks;  // of a launch; equal on all ranks
    // Null: windows are in GPU memory. Else they are in host memory, and this is this GPU's copy of its own,
    // one after another for each channel, `WindowLayout::copy_bytes` each.
    char* copies;
    // Ranks that write into this GPU's memory and whose GPUs' memory this rank writes into, itself among
    // them. If there are any, `copies` is a whole window, which they have mapped.
    std::vector<int64_t> direct;
    // Windows of others are one of this GPU's, from which the host has everything moved: see View.
    bool staged;
    // 0: each row to all its ranks in turn. Else the staggered order, with so many ranks in each group (see
    // staggered_target); equal on all ranks. Not with `copies` or `staged`.
    int32_t stagger;
    // Size of a chunk against the plan's own; equal on all ranks.
    double chunk_scale;
    // 0, or a number that exchanges of this process share of which never more are under way at once than the
    // one with the most channels has: they have places for so many of the largest, together.
    int64_t share;
};

// How `slots` tokens per rank are divided among at most `max_blocks` blocks and `max_chunks` flags.
Plan make_plan(const Settings& settings, int64_t slots);

class Exchange {
  public:
    // Throws std::runtime_error if CUDA fails, or if the launches of this and of the exchanges that exist
    // already could not all be resident on the GPU at once (see Settings::share).
    Exchange(const Settings& settings, const std::vector<int32_t>& expert_rank,
             const std::vector<char*>& windows);
    ~Exchange();
    Exchange(const Exchange&) = delete;
    Exchange& operator=(const Exchange&) = delete;

    // `a` without what the exchange knows itself; plan.slots = T, the rest of the plan may be 0: chosen.
    cudaError_t dispatch(int64_t channel, DispatchArgs a, cudaStream_t stream);
    cudaError_t combine(int64_t channel, CombineArgs a, cudaStream_t stream);
    // Both in one launch, with words for rows in the first (WindowLayout::weight_words); `takes_sums` says
    // whether that can be. What stands in the place of rows must not look like such words: no other rows
    // come.
    cudaError_t sums(int64_t channel, SumsArgs a, cudaStream_t stream);
    bool takes_sums(const Plan& plan, DType y_type) const;
    DeviceWord* word(int64_t channel) const { return view(channel).word; }  // for SumsArgs::ended

    // The first or second half of ending an exchange that nobody combines, where windows are staged: the
    // closing flags out; then wait for those of all others. Both do nothing if the channel has no open
    // exchange.
    cudaError_t close(int64_t channel, bool send, cudaStream_t stream);
    int chunks(const Plan& plan) const { return complete(plan).chunks(); }

    // What stopped the exchange, as the kernels have told the host so far; once, that a peer closed one. Does
    // not wait for the GPU.
    ErrorWord error();
    uint64_t max_epoch() const;
    // Until recover() later kernels, replayed ones too, return at once: nothing leaves this rank.
    void stop();
    // After all ranks have stopped and their streams are idle: every channel goes on behind `epoch`.
    void recover(uint64_t epoch);
    void set_timeout(int64_t us);
    // Waits and sends of later kernels, in captured graphs too, leave these ranks out, and no others. Only
    // while no kernel runs.
    void mask_ranks(const std::vector<int64_t>& ranks);
    const Settings& settings() const { return settings_; }
    int device() const { return device_index_; }
    // Blocks of a kernel that may come before the dispatch ahead of it has ended; see launch_sort.
    int early_blocks() const { return dependent_ ? static_cast<int>(settings_.max_blocks) : 0; }

  private:
    // The other constructor goes on from here, so the destructor gives back what it has taken if it throws.
    explicit Exchange(const Settings& settings) : settings_(settings) {}

    const View& view(int64_t channel) const { return views_[channel]; }
    // Every kernel that a call may launch; those with bulk copies have been when their blocks were counted.
    // CUDA would load it at its first launch, and may wait until nothing runs: on a kernel that waits for a
    // peer, whose host waits in the same way.
    void load_kernels() const;
    Plan complete(Plan plan) const;
    // What combine writes for this rank itself would go through host memory.
    bool keeps_own_apart() const { return settings_.copies != nullptr && settings_.direct.empty(); }
    // Through host memory a block sends or receives, not both.
    int blocks_of(const Plan& plan, bool both_halves) const;

    Settings settings_;
    std::vector<View> views_;  // one per channel
    char* device_ = nullptr;   // everything that kernels need in this GPU's own memory
    ErrorCell* pinned_ = nullptr;
    int device_index_ = 0;
    bool has_places_ = false;
    bool dependent_ = false;
    bool bulk_ = false;  // the GPU has bulk copies and room for two blocks of the kernels that use them
};

}  // namespace ep::cuda
