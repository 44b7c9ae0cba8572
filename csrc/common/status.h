// How an exchange can fail. The codes are part of the interface with ep_backend/_native.py.
#pragma once

#include <cstdint>

#include "layout.h"

namespace ep {

enum class Status : int32_t {
    kOk = 0,
    kTimeout = 1,      // this rank's own deadline passed
    kAborted = 2,      // a peer stopped; it blames `peer`, for `cause`
    kAhead = 3,        // a flag is of a later epoch than the one awaited
    kSlotsDiffer = 4,  // a source used another T, or says it has more tokens than slots
    kPeerClosed = 5,   // a peer closed the exchange without sending the rows this rank waited for
    kBadId = 6,        // an expert id is neither -1 nor in [0, num_experts); nothing was sent
    kDuplicateId = 7,  // an expert stands twice in a token's top-k; nothing was sent
    kWrongState = 8,  // the channel is not at the point of the exchange that the call needs; nothing was sent
    kRecovering = 9,  // recover() has been called here, and not all ranks have come to it
    kWaiting = 10,    // the wait goes on: call again
};

enum class Phase : int32_t { kDispatch = 0, kCombine = 1 };

// The sticky error word: the first failure that stops the communicator, with all that a person needs to find
// the cause.
struct ErrorWord {
    Status status = Status::kOk;
    int32_t peer = -1;      // rank that is blamed
    int32_t reporter = -1;  // rank that noticed
    Phase phase = Phase::kDispatch;
    int64_t channel = 0;
    uint64_t epoch_expected = 0;
    uint64_t epoch_seen = 0;
    int64_t waited_us = 0;
    Status cause = Status::kOk;         // of kAborted: what stopped the reporter
    uint64_t missing[kMaskWords] = {};  // ranks whose flag had not come
};

// The abort word of a rank that was stopped by `e`, and what a peer reads from it.
EP_HD inline uint64_t abort_word_of(const ErrorWord& e) {
    return make_word(e.epoch_expected,
                     static_cast<uint32_t>(e.status) << 8 | static_cast<uint32_t>(e.peer + 1));
}
EP_HD inline void read_abort_word(uint64_t word, int32_t reporter, ErrorWord& e) {
    e.status = Status::kAborted;
    e.cause = static_cast<Status>(word_low(word) >> 8);
    e.peer = static_cast<int32_t>(word_low(word) & 0xFF) - 1;
    e.reporter = reporter;
    e.epoch_seen = word_epoch(word);
}

}  // namespace ep
