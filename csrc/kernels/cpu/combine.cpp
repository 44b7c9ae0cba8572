// Combine: each rank's weighted sums go back to where the tokens came from, and are added there. See
// exchange.h.
#include <algorithm>
#include <cstring>

#include "../../common/memory_order.h"
#include "exchange.h"

namespace ep::cpu {

// count: 0 with the rows that the source expects (it knows how many), or kClosed without any.
void Exchange::combine_flags(int64_t channel, uint32_t count) {
    for (int64_t d = 0; d < settings_.shape.world; ++d)
        for (int64_t chunk = 0; chunk < settings_.shape.num_chunks && !masked_.test(d); ++chunk)
            store_release(windows_[d] + layout_.combine_flag(channel, settings_.rank, chunk),
                          make_word(channels_[channel].epoch, count));
    channels_[channel].stage = Stage::kReturned;
}

Status Exchange::combine_send(int64_t channel, Layout layout, const void* y, DType type) {
    if (error_.status != Status::kOk) return error_.status;
    if (channels_[channel].stage != Stage::kReceived) return Status::kWrongState;
    for_each_partial(channel, layout, y, type,
                     [&](int64_t source, int64_t token, const void* partial, DType partial_type) {
                         if (!masked_.test(source))
                             convert_row(
                                 windows_[source] + layout_.combine_row(channel, settings_.rank, token),
                                 settings_.wire, partial, partial_type, settings_.hidden);
                     });
    combine_flags(channel, 0);
    return Status::kOk;
}

Status Exchange::combine_recv(int64_t channel, void* out, DType type) {
    if (error_.status != Status::kOk) return error_.status;
    if (channels_[channel].stage != Stage::kReturned) return Status::kWrongState;
    uint32_t lows[kMaxWorld];
    if (const Status s = wait_flags(channel, Phase::kCombine, lows); s != Status::kOk) return s;
    return reduce(channel, lows, out, type);
}

// lows: what the combine flags of all ranks say.
Status Exchange::reduce(int64_t channel, const uint32_t* lows, void* out, DType type) {
    Channel& ch = channels_[channel];
    ch.stage = Stage::kIdle;
    for (int64_t r = 0; r < settings_.shape.world; ++r) {
        if (lows[r] != kClosed) continue;
        // The exchange is over for everybody, so the channel stays usable; only this result is lost.
        closed_by_ = static_cast<int32_t>(r);
        return Status::kPeerClosed;
    }
    const int64_t k = settings_.shape.top_k, n = settings_.hidden;
    for (int64_t t = 0; t < ch.tokens; ++t) {
        const RankMask route = placement_.route(&ch.ids[t * k], k);
        std::fill(acc_.begin(), acc_.end(), 0.0f);
        for (int64_t r = 0; r < settings_.shape.world; ++r)
            if (route.test(r) && !masked_.test(r))
                add_row(acc_.data(), own() + layout_.combine_row(channel, r, t), settings_.wire, n);
        convert_row(static_cast<char*>(out) + t * n * element_bytes(type), type, acc_.data(), DType::kF32, n);
    }
    return Status::kOk;
}

Status Exchange::close(int64_t channel) {
    if (error_.status != Status::kOk) return error_.status;
    Channel& ch = channels_[channel];
    if (!ch.open()) return Status::kOk;
    uint32_t lows[kMaxWorld];
    // Only a rank that has seen all rows of an exchange may say that it is done with them.
    if (ch.stage == Stage::kSent)
        if (const Status s = wait_flags(channel, Phase::kDispatch, lows); s != Status::kOk) return s;
    if (ch.stage != Stage::kReturned) combine_flags(channel, kClosed);
    if (const Status s = wait_flags(channel, Phase::kCombine, lows); s != Status::kOk) return s;
    ch.stage = Stage::kIdle;
    return Status::kOk;
}

}  // namespace ep::cpu
