// Taking in what was accepted: every row's place in its frozen tier goes on, and its text in the live one.
//
// Invariants
// - Rows that share a live tier belong to one Extender, which writes there without a lock; between two calls nothing that
//   was written is unlinked.
// - Text is linked in the order of the rows, some tokens after it was written: what linking touches was fetched meanwhile.
//   A row's text is written before its walk begins, whose loads then wait beside those of the text.
#pragma once
#include "suffix_batch.h"

namespace slipstream {

class Extender {
 public:
  // Takes turns between the walks of up to kRows rows; where one has passed its tokens, the next row's begins, so that
  // there are always enough loads under way.
  void run(const Batch& batch, size_t first, size_t last, const int32_t* values, const int64_t* offsets) {
    const LinkAll link_all{*this};
    size_t next = first, fetched = first, active = 0;
    while (active || next < last) {
      for (; fetched < last && fetched < next + kRows; ++fetched)
        fetch(batch[fetched], values, offsets + batch[fetched].row);
      for (; active < kRows && next < fetched; ++next) {
        OpenRequest& request = *batch[next].request;
        const int32_t* begin = values + offsets[batch[next].row];
        const int32_t* end = values + offsets[batch[next].row + 1];
        append(request, begin, end);
        Turn& turn = turns_[active];
        turn = {{begin, end, request.at, request.matched, false, false}, &request};
        request.frozen->follow_path(turn.walk);
        if (turn.walk.done()) turn.leave();
        else ++active;
      }
      // All walks do the same at a time, which a processor predicts better than what each of them does next.
      for (size_t i = 0; i < active; ++i) turns_[i].request->frozen->advance(turns_[i].walk);
      for (size_t i = 0; i < active;) {
        Turn& turn = turns_[i];
        turn.request->frozen->branch_off(turn.walk);
        if (turn.walk.done()) {
          turn.leave();
          turn = turns_[--active];
        } else {
          ++i;
        }
      }
    }
  }

 private:
  static constexpr size_t kRows = 64;
  static constexpr uint32_t kUnlinked = 64;  // tokens, a power of two
  static constexpr int kPathTokens = 16;     // of a walk are fetched ahead

  struct Turn {
    Frozen::Walk walk;
    OpenRequest* request;
    void leave() const {
      request->at = walk.at;
      request->matched = walk.matched;
    }
  };

  // At the end of a call, also of one that memory has run out in: text that is not linked must not be looked up.
  struct LinkAll {
    Extender& extender;
    ~LinkAll() { extender.link_all(); }
  };

  static void fetch(const BatchRow& row, const int32_t* values, const int64_t* offsets) {
    const OpenRequest& request = *row.request;
    prefetch(&request.frozen->state(request.at));
    request.frozen->prefetch_path(request.at, static_cast<int>(std::min<int64_t>(offsets[1] - offsets[0], kPathTokens)));
    if (offsets[0] != offsets[1]) request.frozen->prefetch_token(values[offsets[1] - 1]);
    request.live->prefetch_next(request.cursor);
  }

  void append(OpenRequest& request, const int32_t* next, const int32_t* last) {
    Live& live = *request.live;
    request.length += static_cast<int32_t>(last - next);
    int32_t before = request.last_token;
    uint32_t cursor = request.cursor;
    for (; next != last; before = *next++) {
      if (live.is_full()) {
        link_all();
        live.widen();
      }
      if (written_ - linked_ == kUnlinked) link_one();
      unlinked_[written_++ % kUnlinked] = live.write(cursor, before, *next);
    }
    request.cursor = cursor;
    request.last_token = before;
  }

  void link_one() { unlinked_[linked_++ % kUnlinked].link(); }
  void link_all() {
    while (linked_ != written_) link_one();
  }

  std::array<Turn, kRows> turns_;
  std::array<Live::Unlinked, kUnlinked> unlinked_;
  uint32_t linked_ = 0, written_ = 0;
};

}  // namespace slipstream
