// The exchange over packed buffers: whoever carries them (torch.distributed) needs no window of a peer. The
// rows end in this rank's own window, where dispatch_read and the sums of combine find them as if a peer had
// written them. See exchange.h.
//
// A dispatch record is [row | scales | ids | weights | token], records of one destination stand together in
// the order of tokens; on the way back each destination gets a flag and then bare wire rows in that same
// order, which need no index.
#include <algorithm>
#include <cstring>

#include "exchange.h"

namespace ep::cpu {

int64_t Exchange::dispatch_record_bytes() const {
    const ExchangeShape& s = settings_.shape;
    return s.row_bytes + s.scale_bytes + s.top_k * 8 + 8;
}

Status Exchange::pack_count(int64_t channel, const DispatchInput& in, int64_t* rows_per_rank) {
    channels_[channel].stage = Stage::kIdle;  // the transport has closed the exchange before in its own way
    if (const Status s = begin_dispatch(channel, in); s != Status::kOk) return s;
    const int64_t k = settings_.shape.top_k;
    std::fill_n(rows_per_rank, settings_.shape.world, 0);
    for (int64_t t = 0; t < in.tokens; ++t) {
        const RankMask route = placement_.route(&channels_[channel].ids[t * k], k);
        for (int64_t d = 0; d < settings_.shape.world; ++d) rows_per_rank[d] += route.test(d);
    }
    return Status::kOk;
}

void Exchange::pack_dispatch(int64_t channel, const DispatchInput& in, char* records) const {
    const ExchangeShape& s = settings_.shape;
    const Channel& ch = channels_[channel];
    for (int64_t d = 0; d < s.world; ++d) {
        for (int64_t t = 0; t < in.tokens; ++t) {
            const int32_t* ids = &ch.ids[t * s.top_k];
            if (!placement_.route(ids, s.top_k).test(d)) continue;
            char* metadata = records + s.row_bytes + s.scale_bytes;
            encode_row(in, t, records, records + s.row_bytes);
            std::memcpy(metadata, ids, s.top_k * 4);
            std::memcpy(metadata + s.top_k * 4, in.weights + t * s.top_k, s.top_k * 4);
            std::memcpy(metadata + s.top_k * 8, &t, 8);
            records += dispatch_record_bytes();
        }
    }
}

// counts: per source {records, tokens, T}.
Status Exchange::unpack_dispatch(int64_t channel, const char* records, const int64_t* counts) {
    const ExchangeShape& s = settings_.shape;
    Channel& ch = channels_[channel];
    for (int64_t r = 0; r < s.world; ++r, counts += 3) {
        *reinterpret_cast<SourceHeader*>(own() + layout_.header(channel, r)) = {
            static_cast<uint32_t>(counts[1]), static_cast<uint32_t>(counts[2])};
        const int64_t first_slot = r * ch.slots;
        // A token that is not for this rank sent nothing at all: its ids must say so.
        auto* ids = reinterpret_cast<int32_t*>(own() + layout_.id_row(channel, first_slot));
        std::fill_n(ids, std::min(counts[1], ch.slots) * s.top_k, -1);
        for (int64_t i = 0; i < counts[0]; ++i, records += dispatch_record_bytes()) {
            const char* metadata = records + s.row_bytes + s.scale_bytes;
            int64_t token;
            std::memcpy(&token, metadata + s.top_k * 8, 8);
            if (token < 0 || token >= ch.slots) continue;  // only with another T, which check_headers reports
            const int64_t slot = first_slot + token;
            std::memcpy(own() + layout_.row(channel, slot), records, s.row_bytes);
            if (s.scale_bytes)
                std::memcpy(own() + layout_.scale_row(channel, slot), records + s.row_bytes, s.scale_bytes);
            std::memcpy(own() + layout_.id_row(channel, slot), metadata, s.top_k * 4);
            std::memcpy(own() + layout_.weight_row(channel, slot), metadata + s.top_k * 4, s.top_k * 4);
        }
    }
    if (const Status status = check_headers(channel); status != Status::kOk) return status;
    ch.stage = Stage::kReceived;
    return Status::kOk;
}

// Also for a source without rows: the flag says whether this rank took part or closed the exchange.
char* Exchange::pack_flag(int64_t channel, uint32_t count, char* records) const {
    const uint64_t flag[2] = {make_word(channels_[channel].epoch, count), 0};
    static_assert(sizeof flag == kPackedFlagBytes);
    std::memcpy(records, flag, sizeof flag);
    return records + sizeof flag;
}

Status Exchange::pack_combine(int64_t channel, Layout layout, const void* y, DType type, char* records) {
    if (channels_[channel].stage != Stage::kReceived) return Status::kWrongState;
    int64_t flagged = 0;
    auto flag_until = [&](int64_t source) {
        for (; flagged < source; ++flagged) records = pack_flag(channel, 0, records);
    };
    for_each_partial(channel, layout, y, type,
                     [&](int64_t source, int64_t, const void* partial, DType partial_type) {
                         flag_until(source + 1);
                         convert_row(records, settings_.wire, partial, partial_type, settings_.hidden);
                         records += settings_.shape.wire_bytes;
                     });
    flag_until(settings_.shape.world);
    channels_[channel].stage = Stage::kReturned;
    return Status::kOk;
}

// A closing flag and as many empty rows as the source expects: the buffers on both sides have the agreed
// sizes.
Status Exchange::pack_close(int64_t channel, const int64_t* rows_per_source, char* records) {
    if (channels_[channel].stage != Stage::kReceived) return Status::kWrongState;
    for (int64_t r = 0; r < settings_.shape.world; ++r) {
        records = pack_flag(channel, kClosed, records);
        std::memset(records, 0, rows_per_source[r] * settings_.shape.wire_bytes);
        records += rows_per_source[r] * settings_.shape.wire_bytes;
    }
    channels_[channel].stage = Stage::kReturned;
    return Status::kOk;
}

Status Exchange::unpack_combine(int64_t channel, const char* records, void* out, DType type) {
    const ExchangeShape& s = settings_.shape;
    const Channel& ch = channels_[channel];
    if (ch.stage != Stage::kReturned) return Status::kWrongState;
    uint32_t lows[kMaxWorld];
    for (int64_t r = 0; r < s.world; ++r) {
        uint64_t flag;
        std::memcpy(&flag, records, sizeof flag);
        records += kPackedFlagBytes;
        lows[r] = word_low(flag);
        if (word_epoch(flag) != ch.epoch) {
            ErrorWord error;
            error.status = Status::kAhead;
            error.peer = static_cast<int32_t>(r);
            error.reporter = static_cast<int32_t>(settings_.rank);
            error.phase = Phase::kCombine;
            error.channel = channel;
            error.epoch_expected = ch.epoch;
            error.epoch_seen = word_epoch(flag);
            return fail(error);
        }
        for (int64_t t = 0; t < ch.tokens; ++t) {
            if (!placement_.route(&ch.ids[t * s.top_k], s.top_k).test(r)) continue;
            std::memcpy(own() + layout_.combine_row(channel, r, t), records, s.wire_bytes);
            records += s.wire_bytes;
        }
    }
    return reduce(channel, lows, out, type);
}

}  // namespace ep::cpu
