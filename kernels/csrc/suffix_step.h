// One engine step over many requests: drafting, and taking in what was accepted.
//
// Invariants
// - What a row gets depends on the row's request and on the tiers it reads, not on the other rows or their order.
// - Rows that share a live tier belong to one worker: `extend` writes there without a lock.
// - The tiers of many requests do not fit into the caches together, and every walk is a chain of loads. One load takes
//   longer than a whole draft that is in the cache, but thirty at a time cost hardly more: what rows will look at is
//   fetched one link a pass, in blocks, and walks take turns. A load that is not fetched ahead shows in the benchmark.
#pragma once
#include <numeric>

#include "suffix_tree_draft.h"

namespace slipstream {

// Buffers of one propose call, rows in batch order. tokens, parents, probs and cells are [rows, width]. branching: most
// children of a node; 1 drafts a chain.
struct DraftRows {
  int64_t rows, width;
  const int32_t* max_draft;
  const float* min_prob;
  const int32_t* branching;
  int32_t* tokens;
  int32_t* count;
  int8_t* source;
  int32_t* age;
  int32_t* match_len;
  float* probs;
  int16_t* cells;
  int16_t* parents;
};

// cursor: what the request's own text has reached in the live tier; at, matched: its longest match in the frozen one
// (matched below 0: the length of the state).
struct OpenRequest {
  std::shared_ptr<Live> live;
  std::shared_ptr<const Frozen> frozen;
  std::shared_ptr<const SharedText> shared;
  int32_t sequence = 0, cursor = 0, at = kFrozenRoot, matched = 0;
  uint32_t prompt = 0;
  uint64_t last_call = 0;
  RecentTokens recent;
};

struct SetOptions {
  int min_match = 1, max_candidates = 2;
  float escape = 0.5f;
  float enough = 3.0f;        // expected accepted tokens with which no shorter context is asked
  float shared_below = 1.0f;  // and below which the shared text is
};

class StepWorker {
 public:
  void propose(const std::vector<OpenRequest*>& requests, const std::vector<int32_t>& order, size_t first, size_t last,
               const DraftRows& out, const SetOptions& options, const Calibration& calibration) {
    scratch_tokens_.resize(static_cast<size_t>(out.width));
    scratch_probs_.resize(static_cast<size_t>(out.width));
    scratch_cells_.resize(static_cast<size_t>(out.width));
    chain_.resize(static_cast<size_t>(out.width));
    std::iota(chain_.begin(), chain_.end(), int16_t{-1});
    for (size_t begin = first; begin < last; begin += kBlockRows) {
      const size_t end = std::min(last, begin + kBlockRows);
      fetch(requests, order, begin, end, out);
      poor_.clear();
      for (size_t i = begin; i < end; ++i) draft_own(*requests[order[i]], out, order[i], options, calibration);
      if (!poor_.empty()) draft_shared(requests, out, options, calibration);
    }
  }

  void extend(const std::vector<OpenRequest*>& requests, const std::vector<int32_t>& order, size_t first, size_t last,
              const int32_t* values, const int64_t* offsets) {
    advance_frozen(requests, order, first, last, values, offsets);
    for (size_t begin = first; begin < last; begin += kBlockRows) {
      const size_t end = std::min(last, begin + kBlockRows);
      append_live(requests, order, begin, end, values, offsets);
    }
  }

 private:
  static constexpr size_t kBlockRows = 32;
  static constexpr int kPathTokens = 16;  // of a draft are fetched ahead

  // What the drafts of a block read: states, their links, the path of the heaviest continuation, and where it jumps.
  static void fetch(const std::vector<OpenRequest*>& requests, const std::vector<int32_t>& order, size_t begin,
                    size_t end, const DraftRows& out) {
    for (size_t i = begin; i < end; ++i) {
      const OpenRequest& request = *requests[order[i]];
      prefetch(&request.frozen->state(request.at));
      prefetch(&request.live->state(request.cursor));
    }
    for (size_t i = begin; i < end; ++i) {
      OpenRequest& request = *requests[order[i]];
      const State& frozen = request.frozen->state(request.at);
      if (request.matched < 0) request.matched = frozen.length;
      request.frozen->prefetch_ages();
      request.frozen->prefetch_path(request.at, std::min<int>(out.max_draft[order[i]], kPathTokens));
      if (frozen.link >= 0) prefetch(&request.frozen->state(frozen.link));
      prefetch(&request.live->state(request.live->state(request.cursor).link));
    }
    for (size_t i = begin; i < end; ++i) {
      const OpenRequest& request = *requests[order[i]];
      request.live->prefetch_edges(request.live->state(request.cursor).link);
      if (request.at != kFrozenRoot)
        request.frozen->prefetch_jump(request.at, std::min<int>(out.max_draft[order[i]], kPathTokens));
    }
  }

  Draft scratch() { return {scratch_tokens_.data(), scratch_probs_.data(), scratch_cells_.data()}; }

  static Draft row_of(const DraftRows& out, int64_t row) {
    return {out.tokens + row * out.width, out.probs + row * out.width, out.cells + row * out.width};
  }

  void store(const Draft& best, const DraftRows& out, int64_t row) const {
    const Draft own = row_of(out, row);
    if (best.tokens != own.tokens) {
      std::copy(best.tokens, best.tokens + best.count, own.tokens);
      std::copy(best.probs, best.probs + best.count, own.probs);
      std::copy(best.cells, best.cells + best.count, own.cells);
    }
    out.count[row] = best.count;
    out.match_len[row] = best.match_len;
    out.source[row] = best.count ? best.source : kSourceNone;
    out.age[row] = best.age;
    std::copy(chain_.data(), chain_.data() + out.width, out.parents + row * out.width);
  }

  void draft_own(const OpenRequest& request, const DraftRows& out, int32_t row, const SetOptions& options,
                 const Calibration& calibration) {
    const int limit = static_cast<int>(std::min<int64_t>(out.max_draft[row], out.width));
    Draft best = scratch(), spare = row_of(out, row);  // mostly the first draft is the one that stays
    if (limit > 0) {
      const int32_t length = request.live->state(request.cursor).length;
      // kStart counts as context: a response that has matched from its first token on needs no minimum.
      const DraftLimits limits{limit, std::min<int>(options.min_match, length), options.min_match, out.min_prob[row],
                               options.escape, options.enough};
      const LiveView live{*request.live, request.sequence, request.cursor};
      const FrozenView frozen{*request.frozen};
      if (out.branching[row] > 1) {
        if (draft_tree(request, live, frozen, out, row, options, calibration, limits) < options.shared_below)
          ask_shared(request, row);
        return;
      }
      draft_from(frozen, request.at, request.matched, options.max_candidates, calibration, limits, best, spare);
      draft_from(live, request.cursor, length, options.max_candidates, calibration, limits, best, spare);
      if (best.score < options.shared_below) ask_shared(request, row);
    }
    store(best, out, row);
  }

  void ask_shared(const OpenRequest& request, int32_t row) {
    if (!request.shared) return;
    poor_.push_back(row);
    request.shared->prefetch_slots(request.recent);
  }

  // The tree's score: the expected number of its tokens that are accepted.
  float draft_tree(const OpenRequest& request, const LiveView& live, const FrozenView& frozen, const DraftRows& out,
                  int32_t row, const SetOptions& options, const Calibration& calibration, const DraftLimits& limits) {
    const int64_t first = row * out.width;
    TreeRow tree{out.tokens + first, out.parents + first, out.probs + first, out.cells + first};
    tree_drafter_.draft(live, request.cursor, frozen, request.at, request.matched, options.max_candidates,
                        out.branching[row], calibration, limits, tree);
    out.count[row] = tree.count;
    out.match_len[row] = tree.match_len;
    out.source[row] = tree.source;
    out.age[row] = tree.age;
    return std::accumulate(tree.probs, tree.probs + tree.count, 0.0f);
  }

  void draft_shared(const std::vector<OpenRequest*>& requests, const DraftRows& out, const SetOptions& options,
                    const Calibration& calibration) {
    for (const int32_t row : poor_) requests[row]->shared->prefetch_text(requests[row]->recent);
    for (const int32_t row : poor_) {
      const int limit = static_cast<int>(std::min<int64_t>(out.max_draft[row], out.width));
      const DraftLimits limits{limit, options.min_match, options.min_match, out.min_prob[row], options.escape,
                               options.enough};
      Draft best = row_of(out, row), spare = scratch();
      best.count = out.count[row];
      for (int i = 0; i < best.count; ++i) best.score += best.probs[i];
      if (requests[row]->shared->draft(requests[row]->recent, calibration, limits, best, spare)) store(best, out, row);
    }
  }

  // Takes turns between the walks of up to kBlockRows rows; where one has passed its tokens, the next row's begins, so
  // that there are always enough loads under way.
  void advance_frozen(const std::vector<OpenRequest*>& requests, const std::vector<int32_t>& order, size_t first,
                      size_t last, const int32_t* values, const int64_t* offsets) {
    const auto fetch_path = [&](size_t i) {
      const OpenRequest& request = *requests[order[i]];
      const int64_t count = offsets[order[i] + 1] - offsets[order[i]];
      prefetch(&request.frozen->state(request.at));
      request.frozen->prefetch_path(request.at, static_cast<int>(std::min<int64_t>(count, kPathTokens)));
    };
    size_t next = first, fetched = first, active = 0;
    while (active || next < last) {
      for (; fetched < last && fetched < next + kBlockRows; ++fetched) fetch_path(fetched);
      for (; active < kBlockRows && next < last; ++next) {
        const int32_t row = order[next];
        OpenRequest& request = *requests[row];
        Turn& turn = turns_[active];
        turn = {{values + offsets[row], values + offsets[row + 1], request.at, request.matched, false}, &request};
        request.frozen->follow_path(turn.walk);
        if (turn.walk.done()) turn.leave();
        else ++active;
      }
      for (size_t i = 0; i < active;) {
        Turn& turn = turns_[i];
        turn.request->frozen->advance(turn.walk);
        if (turn.walk.done()) {
          turn.leave();
          turn = turns_[--active];
        } else {
          ++i;
        }
      }
    }
  }

  // Fetches the states along which the live tier knows the tokens already, and those of the next shorter contexts: where
  // appending will count and clone. All live tiers lie in one arena, so that any of them reads the states of all.
  void fetch_known(const std::vector<OpenRequest*>& requests, const std::vector<int32_t>& order, size_t begin, size_t end,
                   const int32_t* values, const int64_t* offsets) {
    const Live& live = *requests[order[begin]]->live;
    size_t active = 0;
    for (size_t i = begin; i < end; ++i) {
      const int32_t row = order[i];
      ahead_[active] = {values + offsets[row], values + offsets[row + 1], live.state(requests[row]->cursor).link};
      active += offsets[row] != offsets[row + 1];
    }
    while (active) {
      size_t kept = 0;
      for (size_t i = 0; i < active; ++i) {
        Ahead ahead = ahead_[i];
        const State& s = live.state(ahead.at);
        if (s.link >= 0) prefetch(&live.state(s.link));
        if (ahead.next == ahead.last || s.token != *ahead.next) continue;
        ++ahead.next;
        ahead.at = s.target;
        prefetch(&live.state(ahead.at));
        ahead_[kept++] = ahead;
      }
      active = kept;
    }
  }

  // The live tiers' part of `extend`.
  void append_live(const std::vector<OpenRequest*>& requests, const std::vector<int32_t>& order, size_t begin, size_t end,
                   const int32_t* values, const int64_t* offsets) {
    for (size_t i = begin; i < end; ++i) prefetch(&requests[order[i]]->live->state(requests[order[i]]->cursor));
    for (size_t i = begin; i < end; ++i) {
      const OpenRequest& request = *requests[order[i]];
      prefetch(&request.live->state(request.live->state(request.cursor).link));
    }
    for (size_t i = begin; i < end; ++i) {
      const int32_t row = order[i];
      const OpenRequest& request = *requests[row];
      request.live->prefetch_edges(request.live->state(request.cursor).link);
      // A token in a new context is looked up at the root, whose table is the largest of all.
      for (int64_t j = offsets[row]; j < offsets[row + 1]; ++j)
        request.live->prefetch_search(request.live->root(), values[j]);
    }
    fetch_known(requests, order, begin, end, values, offsets);
    for (size_t i = begin; i < end; ++i) {
      const int32_t row = order[i];
      OpenRequest& request = *requests[row];
      Live& live = *request.live;
      int32_t cursor = request.cursor;
      for (int64_t j = offsets[row]; j < offsets[row + 1]; ++j) live.append(cursor, values[j], request.sequence);
      request.cursor = cursor;
      request.recent.append(values + offsets[row], values + offsets[row + 1]);
    }
  }

  struct Turn {
    Frozen::Walk walk;
    OpenRequest* request;
    void leave() const {
      request->at = walk.at;
      request->matched = walk.matched;
    }
  };
  struct Ahead {
    const int32_t *next, *last;
    int32_t at;
  };
  std::array<Turn, kBlockRows> turns_;
  std::array<Ahead, kBlockRows> ahead_;
  TreeDrafter tree_drafter_;
  std::vector<int32_t> poor_;
  std::vector<int32_t> scratch_tokens_;
  std::vector<float> scratch_probs_;
  std::vector<int16_t> scratch_cells_, chain_;  // chain_: the parents of a chain
};

}  // namespace slipstream
