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

// cursor: where the request's own text, `length` tokens with kStart, ends in the live tier; at, matched: its longest match
// in the frozen one (matched below 0: the length of the state).
struct OpenRequest {
  std::shared_ptr<Live> live;
  std::shared_ptr<const Frozen> frozen;
  std::shared_ptr<const SharedText> shared;
  int32_t sequence = 0, at = kFrozenRoot, matched = 0, length = 1;
  uint32_t cursor = 0, prompt = 0;
  int32_t last_token = kStart;
  uint64_t last_call = 0;
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
      again_.clear();
      searches_.clear();
      poor_.clear();
      for (size_t i = begin; i < end; ++i) draft_frozen(*requests[order[i]], out, order[i], options, calibration);
      for (const Again& again : again_) prefetch_jump(*requests[again.row], again.contexts.at, out, again.row);
      for (Again& again : again_) draft_again(*requests[again.row], again, out, options, calibration);
      fetch_places(requests);
      for (const Search& search : searches_) draft_live(*requests[search.row], search, out, options, calibration);
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
  static constexpr size_t kBlockRows = 64;
  static constexpr int kPathTokens = 16;  // of a draft are fetched ahead

  // A row that drafts from shorter contexts of the frozen tier too.
  struct Again {
    int32_t row;
    Contexts contexts;
  };
  // A row that drafts from the shared text too.
  struct Poor {
    int32_t row;
    RecentTokens recent;
  };
  // A row that drafts from the live tier too, and the place that is being fetched for it.
  struct Search {
    int32_t row;
    uint32_t place;
    int hops;
    bool singles, found, done;
  };

  // What the drafts of a block read: states, their links, the path of the heaviest continuation, and where it jumps.
  static void fetch(const std::vector<OpenRequest*>& requests, const std::vector<int32_t>& order, size_t begin,
                    size_t end, const DraftRows& out) {
    for (size_t i = begin; i < end; ++i) {
      const OpenRequest& request = *requests[order[i]];
      prefetch(&request.frozen->state(request.at));
    }
    for (size_t i = begin; i < end; ++i) {
      OpenRequest& request = *requests[order[i]];
      const State& frozen = request.frozen->state(request.at);
      if (request.matched < 0) request.matched = frozen.length;
      request.frozen->prefetch_ages();
      prefetch_path(request, request.at, out, order[i]);
      if (frozen.link >= 0) prefetch(&request.frozen->state(frozen.link));
    }
    for (size_t i = begin; i < end; ++i) {
      const OpenRequest& request = *requests[order[i]];
      if (request.at != kFrozenRoot) prefetch_jump(request, request.at, out, order[i]);
    }
  }
  static void prefetch_path(const OpenRequest& request, int32_t at, const DraftRows& out, int32_t row) {
    request.frozen->prefetch_path(at, std::min<int>(out.max_draft[row], kPathTokens));
  }
  static void prefetch_jump(const OpenRequest& request, int32_t at, const DraftRows& out, int32_t row) {
    request.frozen->prefetch_jump(at, std::min<int>(out.max_draft[row], kPathTokens));
  }

  // The places that the rows' drafts from their live tiers begin with, and whether there are any (Live::find).
  void fetch_places(const std::vector<OpenRequest*>& requests) {
    for (const Search& search : searches_) requests[search.row]->live->prefetch_latest(requests[search.row]->cursor);
    for (bool any = true; any;) {
      any = false;
      for (Search& search : searches_)
        if (!search.done) {
          any = true;
          look_once(*requests[search.row], search);
        }
    }
  }

  // Looks at the place that was fetched the last time and fetches the next one: pairs, and where there is none, single
  // tokens.
  static void look_once(const OpenRequest& request, Search& search) {
    const Live& live = *request.live;
    if (search.place) {
      search.found |= search.place != request.cursor && live.token(search.place) == request.last_token;
      search.place = search.singles ? live.earlier_single(search.place) : live.earlier_pair(search.place);
    } else {
      search.place = search.singles ? live.latest_single(request.cursor) : live.latest_pair(request.cursor);
      search.done = !live.may_be_known(request.cursor);
    }
    if (search.place && ++search.hops <= kMaxPlaces + 1) {
      live.prefetch_earlier(search.place, search.singles);
    } else if (search.found || search.singles) {
      search.done = true;
    } else {
      search.singles = true;
      search.hops = 0;
      search.place = 0;
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
  }

  static DraftLimits limits_of(const OpenRequest& request, const DraftRows& out, int32_t row,
                               const SetOptions& options) {
    // kStart counts as context: a response that has matched from its first token on needs no minimum.
    return {static_cast<int>(std::min<int64_t>(out.max_draft[row], out.width)),
            std::min<int>(options.min_match, request.length),
            options.min_match,
            out.min_prob[row],
            options.escape,
            options.enough};
  }

  void draft_frozen(const OpenRequest& request, const DraftRows& out, int32_t row, const SetOptions& options,
                    const Calibration& calibration) {
    const DraftLimits limits = limits_of(request, out, row, options);
    Draft best = scratch(), spare = row_of(out, row);  // mostly the first draft is the one that stays
    if (limits.max_tokens > 0) {
      if (out.branching[row] > 1) {
        if (draft_tree(request, out, row, options, calibration, limits) < options.shared_below)
          ask_shared(request, row);
        return;
      }
      Contexts contexts{request.at, request.matched, options.max_candidates};
      draft_from(*request.frozen, contexts, 1, calibration, limits, best, spare);
      if (best.score < options.enough) request.live->prefetch_end(request.cursor);
      if (contexts.any(limits, best)) {
        again_.push_back({row, contexts});
        prefetch_path(request, contexts.at, out, row);
      } else {
        search_live(best, row, options);
      }
    }
    store(best, out, row);
    std::copy(chain_.data(), chain_.data() + out.width, out.parents + row * out.width);
  }

  // The other contexts: where the first promises enough, nothing of them is fetched.
  void draft_again(const OpenRequest& request, Again& again, const DraftRows& out, const SetOptions& options,
                   const Calibration& calibration) {
    const int32_t row = again.row;
    Draft best = draft_in(out, row), spare = scratch();
    const float known = best.score;
    draft_from(*request.frozen, again.contexts, again.contexts.left, calibration, limits_of(request, out, row, options),
               best, spare);
    if (best.score > known) store(best, out, row);
    search_live(best, row, options);
  }

  void search_live(const Draft& best, int32_t row, const SetOptions& options) {
    if (best.score < options.enough) searches_.push_back({row, 0, 0, false, false, false});
  }

  // What the row holds so far.
  static Draft draft_in(const DraftRows& out, int32_t row) {
    Draft draft = row_of(out, row);
    draft.count = out.count[row];
    draft.match_len = out.match_len[row];
    draft.source = static_cast<Source>(out.source[row]);
    for (int i = 0; i < draft.count; ++i) draft.score += draft.probs[i];
    return draft;
  }

  void draft_live(const OpenRequest& request, const Search& search, const DraftRows& out, const SetOptions& options,
                  const Calibration& calibration) {
    const int32_t row = search.row;
    Draft best = draft_in(out, row), spare = scratch();
    if (search.found) {
      const LiveView live{*request.live, request.sequence, request.cursor};
      const float known = best.score;
      draft_from(live, options.max_candidates, calibration, limits_of(request, out, row, options), best, spare);
      if (best.score > known) store(best, out, row);
    }
    if (best.score < options.shared_below) ask_shared(request, row);
  }

  void ask_shared(const OpenRequest& request, int32_t row) {
    if (!request.shared) return;
    poor_.push_back({row, {}});
    request.live->copy_last(request.cursor, poor_.back().recent.tokens);
    request.shared->prefetch_slots(poor_.back().recent);
  }

  // The tree's score: the expected number of its tokens that are accepted.
  float draft_tree(const OpenRequest& request, const DraftRows& out, int32_t row, const SetOptions& options,
                  const Calibration& calibration, const DraftLimits& limits) {
    const LiveView live{*request.live, request.sequence, request.cursor};
    const int64_t first = row * out.width;
    TreeRow tree{out.tokens + first, out.parents + first, out.probs + first, out.cells + first};
    tree_drafter_.draft(live, *request.frozen, request.at, request.matched, options.max_candidates, out.branching[row],
                        calibration, limits, tree);
    out.count[row] = tree.count;
    out.match_len[row] = tree.match_len;
    out.source[row] = tree.source;
    out.age[row] = tree.age;
    return std::accumulate(tree.probs, tree.probs + tree.count, 0.0f);
  }

  void draft_shared(const std::vector<OpenRequest*>& requests, const DraftRows& out, const SetOptions& options,
                    const Calibration& calibration) {
    for (const auto& [row, recent] : poor_) requests[row]->shared->prefetch_text(recent);
    for (const auto& [row, recent] : poor_) {
      DraftLimits limits = limits_of(*requests[row], out, row, options);
      limits.min_match = options.min_match;
      Draft best = draft_in(out, row), spare = scratch();
      if (requests[row]->shared->draft(recent, calibration, limits, best, spare)) store(best, out, row);
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
      if (count) request.frozen->prefetch_token(values[offsets[order[i] + 1] - 1]);
    };
    size_t next = first, fetched = first, active = 0;
    while (active || next < last) {
      for (; fetched < last && fetched < next + kBlockRows; ++fetched) fetch_path(fetched);
      for (; active < kBlockRows && next < fetched; ++next) {
        const int32_t row = order[next];
        OpenRequest& request = *requests[row];
        Turn& turn = turns_[active];
        turn = {{values + offsets[row], values + offsets[row + 1], request.at, request.matched, false, false}, &request};
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

  // The live tiers' part of `extend`.
  void append_live(const std::vector<OpenRequest*>& requests, const std::vector<int32_t>& order, size_t begin, size_t end,
                   const int32_t* values, const int64_t* offsets) {
    for (size_t i = begin; i < end; ++i) {
      const int32_t row = order[i];
      const OpenRequest& request = *requests[row];
      request.live->prefetch_end(request.cursor);
      int32_t before = request.last_token;
      for (int64_t j = offsets[row]; j < offsets[row + 1]; ++j) {
        request.live->prefetch_append(before, values[j]);
        before = values[j];
      }
    }
    for (size_t i = begin; i < end; ++i) {
      const int32_t row = order[i];
      OpenRequest& request = *requests[row];
      Live& live = *request.live;
      uint32_t cursor = request.cursor;
      for (int64_t j = offsets[row]; j < offsets[row + 1]; ++j) live.append(cursor, values[j]);
      request.cursor = cursor;
      request.length += static_cast<int32_t>(offsets[row + 1] - offsets[row]);
      if (offsets[row] != offsets[row + 1]) request.last_token = values[offsets[row + 1] - 1];
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
  std::array<Turn, kBlockRows> turns_;
  TreeDrafter tree_drafter_;
  std::vector<Again> again_;
  std::vector<Search> searches_;
  std::vector<Poor> poor_;
  std::vector<int32_t> scratch_tokens_;
  std::vector<float> scratch_probs_;
  std::vector<int16_t> scratch_cells_, chain_;  // chain_: the parents of a chain
};

}  // namespace slipstream
