// One rank's side of the exchanges over CPU memory: the one-sided protocol of docs/protocol.md.
//
//   dispatch_send -> dispatch_wait -> dispatch_read -> combine_send -> combine_recv          (or close
//   instead of combine)
//
// dispatch.cpp and combine.cpp write rows and flags straight into the peers' windows; pack.cpp does the same
// exchange over packed buffers that something else (torch.distributed) carries, with this rank's own window
// as the place where it ends. An Exchange is used by one thread at a time; ranks may be processes or threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "../../common/layout.h"
#include "../../common/status.h"
#include "placement.h"
#include "rows.h"
#include "waiting.h"

namespace ep::cpu {

// Part of the interface with ep_backend/_native.py.
enum class Layout : int32_t { kRankMajor = 0, kCompact = 1, kExpertMajor = 2 };

constexpr int64_t kPackedFlagBytes = 16;  // before the combine rows of a source in a packed buffer

struct Settings {
    ExchangeShape shape;
    int64_t rank;
    int64_t hidden;  // elements of a combined row
    DType wire;      // format of a row on the way back
    DType payload;   // format of a dispatched row in the window
    bool local_ids;  // received ids: index among this rank's experts, else global
    int32_t
        pad_id;  // received id of none: of a row without a local expert, of a foreign expert if ids are local
    uint64_t epoch;  // epoch of the exchange before the first
    int64_t timeout_us;
    // A call that waits returns kWaiting after so long, for the caller to look after other things and call it
    // again; 0: it returns when the wait is over.
    int64_t patience_us = 0;
};

struct DispatchInput {
    const void* x;       // [tokens, row]
    DType type;          // a float format with payload kE4M3 is quantised on the way
    const void* scales;  // [tokens, scale_bytes], when the caller quantised
    const void* ids;     // [tokens, top_k] global expert ids, -1: none
    bool ids_are_64_bit;
    const float* weights;  // [tokens, top_k]
    int64_t tokens;
    int64_t slots;  // T
};

struct ReceivedRows {
    void* rows;  // compact: [rows, row]; expert-major: [local experts, world * T, row]; rank-major: unused,
                 // the window is it
    void* scales;
    int32_t* ids;  // rank-major [world * T, top_k], compact [rows, top_k]
    float* weights;
};

class Exchange {
  public:
    Exchange(const Settings& settings, Placement placement, std::vector<char*> windows);

    // kOk, kBadId or kDuplicateId. Keeps the ids as 32-bit in ids_.
    Status check_ids(const void* ids, bool are_64_bit, int64_t tokens);
    // Nothing is sent unless kOk comes back. Closes a dispatch that is still open first.
    Status dispatch_send(int64_t channel, const DispatchInput& in);
    Status dispatch_wait(int64_t channel);
    // Tokens of each source, rows for each local expert, rows that have a local expert.
    int64_t dispatch_counts(int64_t channel, int32_t* tokens_per_source, int32_t* rows_per_expert) const;
    void dispatch_read(int64_t channel, Layout layout, const ReceivedRows& out) const;

    // y: rank-major and compact one finished row per received row; expert-major [local experts, world * T,
    // hidden], unweighted.
    Status combine_send(int64_t channel, Layout layout, const void* y, DType type);
    Status combine_recv(int64_t channel, void* out, DType type);
    // Ends an exchange without data: sends closing flags, waits for those of the peers.
    Status close(int64_t channel);

    // The same exchange over buffers that another library carries: pack.cpp.
    int64_t dispatch_record_bytes() const;
    Status pack_count(int64_t channel, const DispatchInput& in, int64_t* rows_per_rank);
    void pack_dispatch(int64_t channel, const DispatchInput& in, char* records) const;
    Status unpack_dispatch(int64_t channel, const char* records, const int64_t* counts);
    Status pack_combine(int64_t channel, Layout layout, const void* y, DType type, char* records);
    Status pack_close(int64_t channel, const int64_t* rows_per_source, char* records);
    Status unpack_combine(int64_t channel, const char* records, void* out, DType type);

    // What brings rows to this rank from elsewhere has failed: the peers stop too, instead of running into
    // deadlines of their own. Nobody of them is to blame.
    void stop(int64_t channel, Status status);

    const ErrorWord& error() const { return error_; }
    int32_t closed_by() const { return closed_by_; }  // who made the last combine_recv return kPeerClosed
    // All ranks that are not masked meet, so none of them still writes; then every channel goes on behind the
    // highest `epoch` that one of them gave, and nothing in a window is cleared. Returns the ranks that did
    // not come in time: none, or this rank stays stopped and may call again.
    std::vector<int64_t> recover(int64_t timeout_us, uint64_t epoch);
    uint64_t max_epoch() const;
    void set_timeout(int64_t us) { settings_.timeout_us = us; }
    // Waits and sends leave these ranks out from now on, and no others. Returns the slots of each channel's
    // last exchange, 0 where there was none.
    std::vector<int64_t> mask_ranks(const std::vector<int64_t>& ranks);

  private:
    enum class Stage { kIdle, kSent, kReceived, kReturned };
    // The channel's device word {epoch, open} and what combine needs of the dispatch.
    struct Channel {
        uint64_t epoch = 0;
        Stage stage = Stage::kIdle;
        int64_t tokens = 0;
        int64_t slots = 0;
        std::vector<int32_t> ids;                        // own top-k ids: which ranks return a row
        std::optional<Clock::time_point> waiting_since;  // of a wait that has returned kWaiting
        bool open() const { return stage != Stage::kIdle; }
    };

    Status begin_dispatch(int64_t channel, const DispatchInput& in);
    void encode_row(const DispatchInput& in, int64_t token, char* row, char* scales) const;
    Status wait_flags(int64_t channel, Phase phase, uint32_t* lows);
    Status check_headers(int64_t channel);
    bool told_to_stop(int64_t channel, Phase phase, int64_t waited_us);
    Status fail(ErrorWord word);
    void combine_flags(int64_t channel, uint32_t count);
    Status reduce(int64_t channel, const uint32_t* lows, void* out, DType type);
    char* pack_flag(int64_t channel, uint32_t count, char* records) const;
    int64_t chunk_begin(int64_t chunk, int64_t slots) const;
    int64_t tokens_of(int64_t channel, int64_t source) const;

    // Calls f(source, token, slot) for every received row that has a local expert, in the order of sources
    // and tokens.
    template <class F>
    void for_each_row(int64_t channel, F&& f) const;
    // Calls f(source, token, row, its format) with the sum that this rank returns for each such row.
    template <class F>
    void for_each_partial(int64_t channel, Layout layout, const void* y, DType type, F&& f);

    char* own() const { return windows_[settings_.rank]; }
    const int32_t* ids_at(int64_t channel, int64_t slot) const {
        return reinterpret_cast<const int32_t*>(own() + layout_.id_row(channel, slot));
    }
    const float* weights_at(int64_t channel, int64_t slot) const {
        return reinterpret_cast<const float*>(own() + layout_.weight_row(channel, slot));
    }

    Settings settings_;
    WindowLayout layout_;
    Placement placement_;
    std::vector<char*> windows_;
    std::vector<Channel> channels_;
    RankMask masked_;
    ErrorWord error_;
    int32_t closed_by_ = -1;
    uint64_t floor_;            // abort words below this epoch are of before the last recovery
    std::vector<int32_t> ids_;  // scratch: ids of a call, as 32-bit
    std::vector<char> row_;     // scratch: one encoded row and its scales
    std::vector<float> acc_;    // scratch: one row of sums
};

template <class F>
void Exchange::for_each_row(int64_t channel, F&& f) const {
    const int64_t k = settings_.shape.top_k;
    const int64_t slots = channels_[channel].slots;
    for (int64_t source = 0; source < settings_.shape.world; ++source) {
        const int64_t tokens = tokens_of(channel, source);
        for (int64_t token = 0; token < tokens; ++token) {
            const int64_t slot = source * slots + token;
            if (placement_.any_local(ids_at(channel, slot), k)) f(source, token, slot);
        }
    }
}

template <class F>
void Exchange::for_each_partial(int64_t channel, Layout layout, const void* y, DType type, F&& f) {
    const int64_t n = settings_.hidden, k = settings_.shape.top_k;
    const int64_t y_bytes = n * element_bytes(type);
    const auto* rows = static_cast<const char*>(y);
    const int64_t capacity = settings_.shape.world * channels_[channel].slots;
    std::vector<int64_t> filled(placement_.num_local(), 0);
    int64_t next = 0;
    for_each_row(channel, [&](int64_t source, int64_t token, int64_t slot) {
        const void* partial;
        DType partial_type = type;
        if (layout == Layout::kExpertMajor) {
            const int32_t* ids = ids_at(channel, slot);
            const float* weights = weights_at(channel, slot);
            std::fill(acc_.begin(), acc_.end(), 0.0f);
            for (int64_t j = 0; j < k; ++j) {
                if (!placement_.is_local(ids[j])) continue;
                const int64_t e = placement_.local_index(ids[j]);
                fma_row(acc_.data(), weights[j], rows + (e * capacity + filled[e]++) * y_bytes, type, n);
            }
            partial = acc_.data();
            partial_type = DType::kF32;
        } else {
            partial = rows + (layout == Layout::kRankMajor ? slot : next) * y_bytes;
        }
        ++next;
        f(source, token, partial, partial_type);
    });
}

}  // namespace ep::cpu
