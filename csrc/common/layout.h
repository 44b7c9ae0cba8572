// Where everything in a window lives, and what a flag word means. Host, device and tests use these structs
// and no others.
//
// A window is the memory that a rank lets its peers write into. It starts with one abort word and one meeting
// word per peer; after that comes one region per channel, each a complete instance: flags, dispatch window,
// combine window. See docs/protocol.md.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace ep {

constexpr int64_t kLine = 128;        // bytes a flag has for itself: a cache line of any machine we run on
constexpr int kMaxWorld = 72;         // ranks in one NVLink domain
constexpr int kMaskWords = 2;         // 64-bit words of a rank mask
constexpr uint32_t kClosed = 0xFFFF;  // count of a combine flag that closes an exchange without data
constexpr uint64_t kEpochMask = (uint64_t{1} << 48) - 1;

static_assert(kMaxWorld <= 64 * kMaskWords);

// Words: 48 bits of epoch, 16 bits of count (flag), of status and blamed rank + 1 (abort: status.h) or of
// Meeting (meeting word).
EP_HD constexpr uint64_t make_word(uint64_t epoch, uint32_t low) {
    return (epoch & kEpochMask) << 16 | (low & 0xFFFF);
}
EP_HD constexpr uint64_t word_epoch(uint64_t word) {
    return word >> 16;
}
EP_HD constexpr uint32_t word_low(uint64_t word) {
    return static_cast<uint32_t>(word & 0xFFFF);
}
EP_HD constexpr uint64_t next_epoch(uint64_t epoch) {
    return (epoch + 1) & kEpochMask;
}
// A word that needs no flag, where only sums are exchanged: it says itself that it is of this exchange, by 31
// bits made of the epoch, never 0 as in memory that nobody has written. Then `mine`, whether the rank that it
// goes to has the expert, and 32 bits of anything.
EP_HD constexpr uint64_t ask_tag(uint64_t epoch) {
    return epoch % 0x7FFFFFFF + 1;
}
EP_HD constexpr uint64_t make_ask(uint64_t epoch, bool mine, uint32_t low) {
    return (ask_tag(epoch) << 1 | (mine ? 1 : 0)) << 32 | low;
}
EP_HD constexpr bool ask_is_of(uint64_t word, uint64_t epoch) {
    return word >> 33 == ask_tag(epoch);
}
EP_HD constexpr bool ask_is_mine(uint64_t word) {
    return (word >> 32 & 1) != 0;
}
EP_HD constexpr uint32_t ask_low(uint64_t word) {
    return static_cast<uint32_t>(word);
}
// Signed distance a - b of two epochs, right across the wrap at 2^48.
EP_HD constexpr int64_t epoch_distance(uint64_t a, uint64_t b) {
    return static_cast<int64_t>((a - b) << 16) >> 16;
}

// How far a rank is in recover(); see Exchange::recover.
enum class Meeting : uint32_t { kNone = 0, kHere = 1, kAgreed = 2 };

EP_HD constexpr int64_t align_line(int64_t n) {
    return (n + kLine - 1) / kLine * kLine;
}

// What an exchange moves; equal on all ranks, fixed when the communicator is made.
struct ExchangeShape {
    int64_t world;
    int64_t top_k;
    int64_t max_tokens;   // tokens a rank may dispatch in one call
    int64_t row_bytes;    // a dispatched row
    int64_t scale_bytes;  // the scales of a dispatched row, 0 if it has none
    int64_t wire_bytes;   // a row on the way back
    int64_t num_chunks;   // flags per source
    int64_t num_channels;
    int64_t weights_back;  // 1: combine carries one fp32 weight per (row, k)
};

// What a source says about its exchange beside the flag, so that ranks which disagree notice.
struct SourceHeader {
    uint32_t tokens;
    uint32_t slots;  // T: slots per source in this exchange
};
constexpr int64_t kSlotsWord = 8;  // T as a word of its own, behind the header in its line
static_assert(sizeof(SourceHeader) <= kSlotsWord);

// What one source has in a region of a channel: source s has `bytes` from `at + s * pitch` in the window on.
struct SourceBlock {
    int64_t at, pitch, bytes;
};

// Byte offsets from the start of a window.
struct WindowLayout {
    ExchangeShape shape;
    int64_t dispatch_flags, combine_flags, headers, ids, weights, scales, rows, combine_rows,
        combine_weights;  // in a channel
    int64_t channels;     // first channel
    int64_t channel_bytes;
    int64_t total;

    EP_HD static WindowLayout make(const ExchangeShape& s) {
        WindowLayout l{};
        const int64_t slots = s.world * s.max_tokens;
        l.shape = s;
        int64_t at = 0;
        auto place = [&at](int64_t bytes) {
            const int64_t offset = at;
            at += align_line(bytes);
            return offset;
        };
        l.dispatch_flags = place(s.world * s.num_chunks * kLine);
        l.combine_flags = place(s.world * s.num_chunks * kLine);
        l.headers = place(s.world * kLine);
        l.ids = place(slots * s.top_k * 4);
        l.weights = place(slots * s.top_k * 4);
        l.scales = place(slots * s.scale_bytes);
        l.rows = place(slots * s.row_bytes);
        l.combine_rows = place(slots * s.wire_bytes);
        l.combine_weights = place(s.weights_back ? slots * s.top_k * 4 : 0);
        l.channel_bytes = at;
        l.channels = 2 * s.world * kLine;
        l.total = l.channels + s.num_channels * l.channel_bytes;
        return l;
    }

    // Of a channel, up to the combine rows: what a GPU has of its own if windows are in host memory.
    EP_HD int64_t copy_bytes() const { return combine_rows; }
    EP_HD int64_t abort_word(int64_t source) const { return source * kLine; }
    EP_HD int64_t meeting_word(int64_t source) const { return (shape.world + source) * kLine; }
    EP_HD int64_t channel(int64_t c) const { return channels + c * channel_bytes; }
    EP_HD int64_t dispatch_flag(int64_t c, int64_t source, int64_t chunk) const {
        return channel(c) + dispatch_flags + (source * shape.num_chunks + chunk) * kLine;
    }
    EP_HD int64_t combine_flag(int64_t c, int64_t source, int64_t chunk) const {
        return channel(c) + combine_flags + (source * shape.num_chunks + chunk) * kLine;
    }
    EP_HD int64_t header(int64_t c, int64_t source) const { return channel(c) + headers + source * kLine; }
    // A dispatched row stands at slot source * T + token, so that the rows of all sources are one tensor
    // [world * T, ...].
    EP_HD int64_t id_row(int64_t c, int64_t slot) const { return channel(c) + ids + slot * shape.top_k * 4; }
    EP_HD int64_t weight_row(int64_t c, int64_t slot) const {
        return channel(c) + weights + slot * shape.top_k * 4;
    }
    EP_HD int64_t scale_row(int64_t c, int64_t slot) const {
        return channel(c) + scales + slot * shape.scale_bytes;
    }
    EP_HD int64_t row(int64_t c, int64_t slot) const { return channel(c) + rows + slot * shape.row_bytes; }
    // The words of an exchange of sums: T, and in the place of a row the weights of a token, 8 bytes each.
    // Their place does not depend on T, so that ranks with different ones find each other's.
    EP_HD int64_t slots_word(int64_t c, int64_t source) const { return header(c, source) + kSlotsWord; }
    EP_HD int64_t weight_words(int64_t c, int64_t source, int64_t token) const {
        return row(c, source * shape.max_tokens + token);
    }

    // What one source has of `slots` tokens in `chunks` chunks.
    struct Blocks {
        SourceBlock dispatch_flags, headers, ids, weights, scales, rows, combine_flags, combine_rows;
    };
    EP_HD Blocks blocks(int64_t c, int64_t slots, int64_t chunks) const {
        auto lines = [&](int64_t first, int64_t second, int64_t count) {
            return SourceBlock{first, second - first, count * kLine};
        };
        auto per_slot = [&](int64_t first, int64_t second) {
            return SourceBlock{first, second - first, second - first};
        };
        const int64_t back = combine_row(c, 0, 0);
        return {lines(dispatch_flag(c, 0, 0), dispatch_flag(c, 1, 0), chunks),
                lines(header(c, 0), header(c, 1), 1),
                per_slot(id_row(c, 0), id_row(c, slots)),
                per_slot(weight_row(c, 0), weight_row(c, slots)),
                per_slot(scale_row(c, 0), scale_row(c, slots)),
                per_slot(row(c, 0), row(c, slots)),
                lines(combine_flag(c, 0, 0), combine_flag(c, 1, 0), chunks),
                {back, combine_row(c, 1, 0) - back, combine_row(c, 0, slots) - back}};
    }
    // Combined rows are never handed out as a tensor: their place does not depend on T.
    EP_HD int64_t combine_row(int64_t c, int64_t from, int64_t token) const {
        return channel(c) + combine_rows + (from * shape.max_tokens + token) * shape.wire_bytes;
    }
};

}  // namespace ep
