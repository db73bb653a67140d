// The requests of an engine step, as the passes over them want them.
#pragma once
#include "shared_text.h"

namespace slipstream {

// cursor: where the request's own text, `length` tokens with kStart, ends in the live tier; at, matched: its longest match
// in the frozen one (matched below 0: the length of the state). One cache line: every pass over a batch reads it. Who
// opened it holds the tiers.
struct alignas(kLine) OpenRequest {
  Live* live = nullptr;
  const Frozen* frozen = nullptr;
  const SharedText* shared = nullptr;  // null: none
  int32_t at = kFrozenRoot, matched = 0, length = 1, sequence = 0;
  uint32_t cursor = 0;
  int32_t last_token = kStart;
  uint64_t last_call = 0;
};
static_assert(sizeof(OpenRequest) == kLine, "a request must not straddle cache lines");

// A row of the caller's buffers and whose it is.
struct BatchRow {
  OpenRequest* request;
  int32_t row;
};
using Batch = std::vector<BatchRow>;

}  // namespace slipstream
