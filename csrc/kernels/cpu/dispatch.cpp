// Dispatch: rows, metadata and flags out; rows in the layout that was asked for back. See exchange.h.
#include <algorithm>
#include <cstring>

#include "../../common/memory_order.h"
#include "exchange.h"

namespace ep::cpu {

Status Exchange::check_ids(const void* ids, bool are_64_bit, int64_t tokens) {
    const int64_t k = settings_.shape.top_k;
    for (int64_t i = 0; i < tokens * k; ++i) {
        const int64_t id =
            are_64_bit ? static_cast<const int64_t*>(ids)[i] : static_cast<const int32_t*>(ids)[i];
        if (id < -1 || id >= placement_.num_experts()) return Status::kBadId;
        ids_[i] = static_cast<int32_t>(id);
    }
    for (int64_t t = 0; t < tokens; ++t)
        if (placement_.has_duplicate(&ids_[t * k], k)) return Status::kDuplicateId;
    return Status::kOk;
}

// Checks the call and opens the exchange. On any failure nothing has been sent and the channel is as it was.
Status Exchange::begin_dispatch(int64_t channel, const DispatchInput& in) {
    const int64_t k = settings_.shape.top_k;
    if (const Status s = check_ids(in.ids, in.ids_are_64_bit, in.tokens); s != Status::kOk) return s;
    if (channels_[channel].open())
        if (const Status s = close(channel); s != Status::kOk) return s;
    Channel& ch = channels_[channel];
    ch.epoch = next_epoch(ch.epoch);
    ch.stage = Stage::kSent;
    ch.tokens = in.tokens;
    ch.slots = in.slots;
    std::copy_n(ids_.begin(), in.tokens * k, ch.ids.begin());
    return Status::kOk;
}

void Exchange::encode_row(const DispatchInput& in, int64_t token, char* row, char* scales) const {
    const ExchangeShape& shape = settings_.shape;
    if (settings_.payload == DType::kE4M3 && in.type != DType::kE4M3) {
        const char* x = static_cast<const char*>(in.x) + token * settings_.hidden * element_bytes(in.type);
        quantize_row(reinterpret_cast<uint8_t*>(row), reinterpret_cast<float*>(scales), x, in.type,
                     settings_.hidden);
        return;
    }
    std::memcpy(row, static_cast<const char*>(in.x) + token * shape.row_bytes, shape.row_bytes);
    if (shape.scale_bytes)
        std::memcpy(scales, static_cast<const char*>(in.scales) + token * shape.scale_bytes,
                    shape.scale_bytes);
}

Status Exchange::dispatch_send(int64_t channel, const DispatchInput& in) {
    if (error_.status != Status::kOk) return error_.status;
    if (const Status s = begin_dispatch(channel, in); s != Status::kOk) return s;
    const Channel& ch = channels_[channel];
    const ExchangeShape& shape = settings_.shape;
    const int64_t k = shape.top_k, first_slot = settings_.rank * ch.slots;

    for (int64_t d = 0; d < shape.world; ++d) {
        if (masked_.test(d)) continue;
        *reinterpret_cast<SourceHeader*>(windows_[d] + layout_.header(channel, settings_.rank)) = {
            static_cast<uint32_t>(in.tokens), static_cast<uint32_t>(ch.slots)};
        if (in.tokens == 0) continue;  // pointers may be null
        // Every token's ids and weights go to everybody, a foreign id says "no row": slots need no scan and
        // no map.
        std::memcpy(windows_[d] + layout_.id_row(channel, first_slot), ch.ids.data(), in.tokens * k * 4);
        std::memcpy(windows_[d] + layout_.weight_row(channel, first_slot), in.weights, in.tokens * k * 4);
    }
    auto flag_all = [&](int64_t chunk, int64_t tokens) {
        for (int64_t d = 0; d < shape.world; ++d)
            if (!masked_.test(d))
                store_release(windows_[d] + layout_.dispatch_flag(channel, settings_.rank, chunk),
                              make_word(ch.epoch, static_cast<uint32_t>(tokens)));
    };
    for (int64_t chunk = 0; chunk < shape.num_chunks; ++chunk) {
        const int64_t begin = std::min(in.tokens, chunk_begin(chunk, ch.slots));
        const int64_t end = std::min(in.tokens, chunk_begin(chunk + 1, ch.slots));
#if defined(EP_TEST_FLAG_FIRST)  // a race that scripts/sanitizers.sh must find, in a program of its own
        flag_all(chunk, end - begin);
#endif
        for (int64_t t = begin; t < end; ++t) {
            const RankMask route = placement_.route(&ch.ids[t * k], k);
            if (!route.any()) continue;
            encode_row(in, t, row_.data(), row_.data() + shape.row_bytes);
            for (int64_t d = 0; d < shape.world; ++d) {
                if (!route.test(d) || masked_.test(d)) continue;
                std::memcpy(windows_[d] + layout_.row(channel, first_slot + t), row_.data(), shape.row_bytes);
                if (shape.scale_bytes)
                    std::memcpy(windows_[d] + layout_.scale_row(channel, first_slot + t),
                                row_.data() + shape.row_bytes, shape.scale_bytes);
            }
        }
        flag_all(chunk, end - begin);
    }
    return Status::kOk;
}

Status Exchange::dispatch_wait(int64_t channel) {
    if (error_.status != Status::kOk) return error_.status;
    Channel& ch = channels_[channel];
    if (ch.stage != Stage::kSent) return Status::kWrongState;
    uint32_t tokens[kMaxWorld];
    if (const Status s = wait_flags(channel, Phase::kDispatch, tokens); s != Status::kOk) return s;
    if (const Status s = check_headers(channel); s != Status::kOk) return s;
    ch.stage = Stage::kReceived;
    return Status::kOk;
}

Status Exchange::check_headers(int64_t channel) {
    const Channel& ch = channels_[channel];
    for (int64_t r = 0; r < settings_.shape.world; ++r) {
        if (masked_.test(r)) continue;
        const auto& header = *reinterpret_cast<const SourceHeader*>(own() + layout_.header(channel, r));
        if (header.slots == ch.slots && header.tokens <= header.slots) continue;
        ErrorWord error;
        error.status = Status::kSlotsDiffer;
        error.peer = static_cast<int32_t>(r);
        error.reporter = static_cast<int32_t>(settings_.rank);
        error.channel = channel;
        error.epoch_expected = ch.epoch;
        error.epoch_seen = ch.epoch;
        return fail(error);
    }
    return Status::kOk;
}

int64_t Exchange::dispatch_counts(int64_t channel, int32_t* tokens_per_source,
                                  int32_t* rows_per_expert) const {
    const int64_t k = settings_.shape.top_k;
    for (int64_t r = 0; r < settings_.shape.world; ++r)
        tokens_per_source[r] = static_cast<int32_t>(tokens_of(channel, r));
    std::fill_n(rows_per_expert, placement_.num_local(), 0);
    int64_t rows = 0;
    for_each_row(channel, [&](int64_t, int64_t, int64_t slot) {
        const int32_t* ids = ids_at(channel, slot);
        for (int64_t j = 0; j < k; ++j)
            if (placement_.is_local(ids[j])) ++rows_per_expert[placement_.local_index(ids[j])];
        ++rows;
    });
    return rows;
}

void Exchange::dispatch_read(int64_t channel, Layout layout, const ReceivedRows& out) const {
    const ExchangeShape& shape = settings_.shape;
    const int64_t k = shape.top_k, capacity = shape.world * channels_[channel].slots;
    auto copy_row = [&](int64_t to, int64_t slot) {
        std::memcpy(static_cast<char*>(out.rows) + to * shape.row_bytes, own() + layout_.row(channel, slot),
                    shape.row_bytes);
        if (shape.scale_bytes)
            std::memcpy(static_cast<char*>(out.scales) + to * shape.scale_bytes,
                        own() + layout_.scale_row(channel, slot), shape.scale_bytes);
    };
    auto copy_metadata = [&](int64_t to, int64_t slot) {
        const int32_t* ids = ids_at(channel, slot);
        const float* weights = weights_at(channel, slot);
        for (int64_t j = 0; j < k; ++j) {
            const bool kept = settings_.local_ids ? placement_.is_local(ids[j]) : ids[j] >= 0;
            out.ids[to * k + j] = !kept                 ? settings_.pad_id
                                  : settings_.local_ids ? placement_.local_index(ids[j])
                                                        : ids[j];
            out.weights[to * k + j] = kept ? weights[j] : 0.0f;
        }
    };
    switch (layout) {
        case Layout::kRankMajor:
            std::fill_n(out.ids, capacity * k, settings_.pad_id);
            std::fill_n(out.weights, capacity * k, 0.0f);
            for_each_row(channel, [&](int64_t, int64_t, int64_t slot) { copy_metadata(slot, slot); });
            return;
        case Layout::kCompact: {
            int64_t next = 0;
            for_each_row(channel, [&](int64_t, int64_t, int64_t slot) {
                copy_row(next, slot);
                copy_metadata(next++, slot);
            });
            return;
        }
        case Layout::kExpertMajor: {
            std::vector<int64_t> filled(placement_.num_local(), 0);
            for_each_row(channel, [&](int64_t, int64_t, int64_t slot) {
                const int32_t* ids = ids_at(channel, slot);
                for (int64_t j = 0; j < k; ++j) {
                    if (!placement_.is_local(ids[j])) continue;
                    const int64_t e = placement_.local_index(ids[j]);
                    copy_row(e * capacity + filled[e]++, slot);
                }
            });
            return;
        }
    }
}

}  // namespace ep::cpu
