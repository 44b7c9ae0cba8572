// State, waiting and failing; see exchange.h.
#include "exchange.h"

#include <algorithm>

#include "../../common/memory_order.h"

namespace ep::cpu {
namespace {

uint64_t meeting(uint64_t epoch, Meeting how_far) {
    return make_word(epoch, static_cast<uint32_t>(how_far));
}

}  // namespace

Exchange::Exchange(const Settings& settings, Placement placement, std::vector<char*> windows)
    : settings_(settings),
      layout_(WindowLayout::make(settings.shape)),
      placement_(std::move(placement)),
      windows_(std::move(windows)),
      channels_(settings.shape.num_channels),
      floor_(next_epoch(settings.epoch)),
      ids_(settings.shape.max_tokens * settings.shape.top_k),
      row_(settings.shape.row_bytes + settings.shape.scale_bytes),
      acc_(settings.hidden) {
    for (Channel& ch : channels_) {
        ch.epoch = settings.epoch;
        ch.ids.resize(ids_.size());
    }
}

int64_t Exchange::chunk_begin(int64_t chunk, int64_t slots) const {
    return slots * chunk / settings_.shape.num_chunks;
}

int64_t Exchange::tokens_of(int64_t channel, int64_t source) const {
    if (masked_.test(source)) return 0;
    return reinterpret_cast<const SourceHeader*>(own() + layout_.header(channel, source))->tokens;
}

std::vector<int64_t> Exchange::mask_ranks(const std::vector<int64_t>& ranks) {
    masked_ = RankMask{};
    for (const int64_t r : ranks) masked_.set(r);
    std::vector<int64_t> slots;
    for (const Channel& ch : channels_) slots.push_back(ch.slots);
    return slots;
}

uint64_t Exchange::max_epoch() const {
    uint64_t epoch = channels_[0].epoch;
    for (const Channel& ch : channels_)
        if (epoch_distance(ch.epoch, epoch) > 0) epoch = ch.epoch;
    return epoch;
}

// Each rank says in all windows {epoch, kHere}, and {epoch, kAgreed} once every peer has said one of the two;
// epoch is the highest that it has said or seen. It leaves when all have agreed on the same one. A rank that
// has said so writes nothing else until it leaves, even if it gave up in between: an old word of a meeting
// that failed is still true.
std::vector<int64_t> Exchange::recover(int64_t timeout_us, uint64_t epoch) {
    if (error_.status == Status::kOk) {
        error_.status = Status::kRecovering;
        error_.reporter = static_cast<int32_t>(settings_.rank);
    }
    epoch = next_epoch(epoch);
    Meeting said = Meeting::kNone;
    const auto start = Clock::now();
    for (int64_t round = 0;; ++round) {
        const bool late = microseconds_since(start) > timeout_us;
        uint64_t highest = epoch;
        std::vector<int64_t> absent, disagree;
        for (int64_t r = 0; r < settings_.shape.world; ++r) {
            if (r == settings_.rank || masked_.test(r)) continue;
            const uint64_t word = load_acquire(own() + layout_.meeting_word(r));
            const bool here = word_low(word) != 0 && epoch_distance(word_epoch(word), floor_) >= 0;
            if (here && epoch_distance(word_epoch(word), highest) > 0) highest = word_epoch(word);
            if (!here) absent.push_back(r);
            if (word != meeting(epoch, Meeting::kAgreed)) disagree.push_back(r);
        }
        const Meeting say = absent.empty() ? Meeting::kAgreed : Meeting::kHere;
        if (say != said || highest != epoch) {
            said = say;
            epoch = highest;
            for (int64_t r = 0; r < settings_.shape.world; ++r)
                if (r != settings_.rank && !masked_.test(r))
                    store_release(windows_[r] + layout_.meeting_word(settings_.rank), meeting(epoch, said));
            continue;
        }
        if (disagree.empty()) break;
        if (late) return absent.empty() ? disagree : absent;
        back_off(round);
    }
    error_ = ErrorWord{};
    floor_ = next_epoch(epoch);
    for (Channel& ch : channels_) {
        ch.epoch = epoch;
        ch.stage = Stage::kIdle;
        ch.waiting_since.reset();
    }
    return {};
}

// Sticky: the first failure stays, and the peers learn whom to blame instead of waiting for their own
// deadlines.
Status Exchange::fail(ErrorWord word) {
    if (error_.status != Status::kOk) return error_.status;
    error_ = word;
    if (word.status != Status::kAborted) {
        const uint64_t abort = abort_word_of(word);
        for (int64_t r = 0; r < settings_.shape.world; ++r)
            if (r != settings_.rank && windows_[r])  // exchanges over packed buffers map no window of a peer
                store_release(windows_[r] + layout_.abort_word(settings_.rank), abort);
    }
    return error_.status;
}

void Exchange::stop(int64_t channel, Status status) {
    ErrorWord error;
    error.status = status;
    error.reporter = static_cast<int32_t>(settings_.rank);
    error.channel = channel;
    error.epoch_expected = channels_[channel].epoch;
    // Before the first exchange since the start or a recovery the epoch is one that peers take for old.
    if (epoch_distance(error.epoch_expected, floor_) < 0) error.epoch_expected = floor_;
    fail(error);
}

bool Exchange::told_to_stop(int64_t channel, Phase phase, int64_t waited_us) {
    for (int64_t r = 0; r < settings_.shape.world; ++r) {
        if (r == settings_.rank || masked_.test(r)) continue;
        const uint64_t word = load_acquire(own() + layout_.abort_word(r));
        if (word_low(word) == 0 || epoch_distance(word_epoch(word), floor_) < 0) continue;
        ErrorWord error;
        read_abort_word(word, static_cast<int32_t>(r), error);
        error.phase = phase;
        error.channel = channel;
        error.epoch_expected = channels_[channel].epoch;
        error.waited_us = waited_us;
        fail(error);
        return true;
    }
    return false;
}

// Waits for the flags of all sources, each of which must be of exactly this epoch; lows[source] = sum of
// their counts, or kClosed.
Status Exchange::wait_flags(int64_t channel, Phase phase, uint32_t* lows) {
    const uint64_t epoch = channels_[channel].epoch;
    const int64_t world = settings_.shape.world, chunks = settings_.shape.num_chunks;
    RankMask missing;
    for (int64_t r = 0; r < world; ++r) {
        lows[r] = 0;
        if (!masked_.test(r)) missing.set(r);
    }
    std::vector<int64_t> next_chunk(world, 0);
    ErrorWord error;
    error.reporter = static_cast<int32_t>(settings_.rank);
    error.phase = phase;
    error.channel = channel;
    error.epoch_expected = epoch;

    const auto called = Clock::now();
    const auto start = channels_[channel].waiting_since.value_or(called);
    channels_[channel].waiting_since.reset();
    for (int64_t round = 0;; ++round) {
        bool moved = false;
        // The clock comes first: a rank that was stopped for long finds what has come meanwhile before it
        // blames anybody.
        const int64_t waited = microseconds_since(start);
        for (int64_t r = 0; r < world; ++r) {
            while (missing.test(r)) {
                const int64_t at = phase == Phase::kDispatch
                                       ? layout_.dispatch_flag(channel, r, next_chunk[r])
                                       : layout_.combine_flag(channel, r, next_chunk[r]);
                const uint64_t word = load_acquire(own() + at);
                if (word_epoch(word) != epoch) {
                    if (epoch_distance(word_epoch(word), epoch) <= 0) break;
                    error.status = Status::kAhead;
                    error.peer = static_cast<int32_t>(r);
                    error.epoch_seen = word_epoch(word);
                    error.waited_us = waited;
                    return fail(error);
                }
                lows[r] = word_low(word) == kClosed ? kClosed : lows[r] + word_low(word);
                if (++next_chunk[r] == chunks) missing.clear(r);
                moved = true;
            }
        }
        if (!missing.any()) return Status::kOk;
        if (moved) continue;
        if (told_to_stop(channel, phase, waited)) return error_.status;
        if (waited > settings_.timeout_us) {
            int64_t peer = 0;
            while (!missing.test(peer)) ++peer;
            const int64_t at = phase == Phase::kDispatch
                                   ? layout_.dispatch_flag(channel, peer, next_chunk[peer])
                                   : layout_.combine_flag(channel, peer, next_chunk[peer]);
            error.status = Status::kTimeout;
            error.peer = static_cast<int32_t>(peer);
            error.epoch_seen = word_epoch(load_acquire(own() + at));
            error.waited_us = waited;
            std::copy(missing.words, missing.words + kMaskWords, error.missing);
            return fail(error);
        }
        if (settings_.patience_us && microseconds_since(called) > settings_.patience_us) {
            channels_[channel].waiting_since = start;
            return Status::kWaiting;
        }
        back_off(round);
    }
}

}  // namespace ep::cpu
