// One engine step over many requests: drafting, and taking in what was accepted.
//
// Invariants
// - What a row gets depends on the row's request and on the tiers it reads, not on the other rows or their order.
// - Rows that share a live tier belong to one worker (suffix_extend.h).
// - The tiers of many requests do not fit into the caches together, and every walk is a chain of loads. One load takes
//   longer than a whole draft that is in the cache, but thirty at a time cost hardly more: what rows will look at is
//   fetched one link a pass, in blocks, and walks take turns. A load that is not fetched ahead shows in the benchmark.
#pragma once
#include <numeric>

#include "suffix_extend.h"
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

struct SetOptions {
  int min_match = 1, max_candidates = 2;
  float escape = 0.5f;
  float enough = 3.0f;        // expected accepted tokens with which no shorter context is asked
  float shared_below = 1.0f;  // and below which the shared text is
};

class StepWorker {
 public:
  void propose(const Batch& batch, size_t first, size_t last, const DraftRows& out, const SetOptions& options,
               const Calibration& calibration) {
    scratch_tokens_.resize(static_cast<size_t>(out.width));
    scratch_probs_.resize(static_cast<size_t>(out.width));
    scratch_cells_.resize(static_cast<size_t>(out.width));
    chain_.resize(static_cast<size_t>(out.width));
    std::iota(chain_.begin(), chain_.end(), int16_t{-1});
    for (size_t begin = first; begin < last; begin += kBlockRows) {
      const size_t end = std::min(last, begin + kBlockRows);
      fetch(batch, begin, end, out);
      again_.clear();
      searches_.clear();
      poor_.clear();
      for (size_t i = begin; i < end; ++i) draft_frozen(batch[i], out, options, calibration);
      for (const Again& again : again_) prefetch_jump(again.at, again.contexts.at, out);
      for (Again& again : again_) draft_again(again, out, options, calibration);
      fetch_places();
      for (const Search& search : searches_) draft_live(search, out, options, calibration);
      if (!poor_.empty()) draft_shared(out, options, calibration);
    }
  }

  void extend(const Batch& batch, size_t first, size_t last, const int32_t* values, const int64_t* offsets) {
    extender_.run(batch, first, last, values, offsets);
  }

 private:
  static constexpr size_t kBlockRows = 64;
  static constexpr int kPathTokens = 16;  // of a draft are fetched ahead

  // A row that drafts from shorter contexts of the frozen tier too.
  struct Again {
    BatchRow at;
    Contexts contexts;
    float score;  // of the draft that the row holds so far
  };
  // A row that drafts from the shared text too.
  struct Poor {
    BatchRow at;
    float score;
    SharedText::Look look;
  };
  // A row that drafts from the live tier too, and the place that is being fetched for it.
  struct Search {
    BatchRow at;
    float score;
    uint32_t place;
    int hops;
    bool singles, found;
  };

  // What the drafts of a block read: states, their links, the path of the heaviest continuation, and where it jumps.
  static void fetch(const Batch& batch, size_t begin, size_t end, const DraftRows& out) {
    for (size_t i = begin; i < end; ++i) prefetch(&batch[i].request->frozen->state(batch[i].request->at));
    for (size_t i = begin; i < end; ++i) {
      OpenRequest& request = *batch[i].request;
      const State& frozen = request.frozen->state(request.at);
      if (request.matched < 0) request.matched = frozen.length;
      request.frozen->prefetch_ages();
      prefetch_path(batch[i], request.at, out);
      prefetch(&request.frozen->state(std::max(frozen.link, kFrozenRoot)));
    }
    for (size_t i = begin; i < end; ++i)
      if (batch[i].request->at != kFrozenRoot) prefetch_jump(batch[i], batch[i].request->at, out);
  }
  static void prefetch_path(const BatchRow& row, int32_t at, const DraftRows& out) {
    row.request->frozen->prefetch_path(at, std::min<int>(out.max_draft[row.row], kPathTokens));
  }
  static void prefetch_jump(const BatchRow& row, int32_t at, const DraftRows& out) {
    row.request->frozen->prefetch_jump(at, std::min<int>(out.max_draft[row.row], kPathTokens));
  }

  // The places that the rows' drafts from their live tiers begin with, and whether there are any (Live::find).
  void fetch_places() {
    for (const Search& search : searches_) search.at.request->live->prefetch_latest(search.at.request->cursor);
    for (size_t active = searches_.size(); active;)
      for (size_t i = 0; i < active;) {
        if (look_once(searches_[i])) ++i;
        else std::swap(searches_[i], searches_[--active]);
      }
  }

  // Looks at the place that was fetched the last time and fetches the next one: pairs, and where there is none, single
  // tokens. False at the end.
  static bool look_once(Search& search) {
    const OpenRequest& request = *search.at.request;
    const Live& live = *request.live;
    if (search.place) {
      search.found |= search.place != request.cursor && live.token(search.place) == request.last_token;
      search.place = search.singles ? live.earlier_single(search.place) : live.earlier_pair(search.place);
    } else {
      if (!live.may_be_known(request.cursor)) return false;
      search.place = search.singles ? live.latest_single(request.cursor) : live.latest_pair(request.cursor);
    }
    if (search.place && ++search.hops <= kMaxPlaces + 1) {
      live.prefetch_earlier(search.place);
    } else if (search.found || search.singles) {
      return false;
    } else {
      search.singles = true;
      search.hops = 0;
      search.place = 0;
    }
    return true;
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

  void draft_frozen(const BatchRow& at, const DraftRows& out, const SetOptions& options,
                    const Calibration& calibration) {
    const OpenRequest& request = *at.request;
    const int32_t row = at.row;
    const DraftLimits limits = limits_of(request, out, row, options);
    Draft best = scratch(), spare = row_of(out, row);  // mostly the first draft is the one that stays
    if (limits.max_tokens > 0) {
      if (out.branching[row] > 1) {
        if (const float score = draft_tree(request, out, row, options, calibration, limits); score < options.shared_below)
          ask_shared(at, score);
        return;
      }
      Contexts contexts{request.at, request.matched, options.max_candidates};
      draft_from(*request.frozen, contexts, 1, calibration, limits, best, spare);
      if (best.score < options.enough) request.live->prefetch_end(request.cursor);
      if (contexts.any(limits, best)) {
        again_.push_back({at, contexts, best.score});
        prefetch_path(at, contexts.at, out);
      } else {
        search_live(best, at, options);
      }
    }
    store(best, out, row);
    std::copy(chain_.data(), chain_.data() + out.width, out.parents + row * out.width);
  }

  // The other contexts: where the first promises enough, nothing of them is fetched.
  void draft_again(Again& again, const DraftRows& out, const SetOptions& options, const Calibration& calibration) {
    const OpenRequest& request = *again.at.request;
    const int32_t row = again.at.row;
    Draft best = draft_in(out, row, again.score), spare = scratch();
    draft_from(*request.frozen, again.contexts, again.contexts.left, calibration, limits_of(request, out, row, options),
               best, spare);
    if (best.score > again.score) store(best, out, row);
    search_live(best, again.at, options);
  }

  void search_live(const Draft& best, const BatchRow& at, const SetOptions& options) {
    if (best.score < options.enough) searches_.push_back({at, best.score, 0, 0, false, false});
  }

  // What the row holds so far.
  static Draft draft_in(const DraftRows& out, int32_t row, float score) {
    Draft draft = row_of(out, row);
    draft.count = out.count[row];
    draft.match_len = out.match_len[row];
    draft.source = static_cast<Source>(out.source[row]);
    draft.score = score;
    return draft;
  }

  void draft_live(const Search& search, const DraftRows& out, const SetOptions& options, const Calibration& calibration) {
    const OpenRequest& request = *search.at.request;
    const int32_t row = search.at.row;
    Draft best = draft_in(out, row, search.score), spare = scratch();
    if (search.found) {
      const LiveView live{*request.live, request.sequence, request.cursor};
      draft_from(live, options.max_candidates, calibration, limits_of(request, out, row, options), best, spare);
      if (best.score > search.score) store(best, out, row);
    }
    if (best.score < options.shared_below) ask_shared(search.at, best.score);
  }

  void ask_shared(const BatchRow& at, float score) {
    const OpenRequest& request = *at.request;
    if (!request.shared) return;
    poor_.emplace_back();
    poor_.back().at = at;
    poor_.back().score = score;
    request.live->copy_last(request.cursor, poor_.back().look.recent);
    request.shared->begin(poor_.back().look);
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

  void draft_shared(const DraftRows& out, const SetOptions& options, const Calibration& calibration) {
    for (Poor& poor : poor_) poor.at.request->shared->find(poor.look);
    for (const Poor& poor : poor_) {
      const int32_t row = poor.at.row;
      DraftLimits limits = limits_of(*poor.at.request, out, row, options);
      limits.min_match = options.min_match;
      Draft best = draft_in(out, row, poor.score), spare = scratch();
      if (poor.at.request->shared->draft(poor.look, calibration, limits, best, spare)) store(best, out, row);
    }
  }

  Extender extender_;
  TreeDrafter tree_drafter_;
  std::vector<Again> again_;
  std::vector<Search> searches_;
  std::vector<Poor> poor_;
  std::vector<int32_t> scratch_tokens_;
  std::vector<float> scratch_probs_;
  std::vector<int16_t> scratch_cells_, chain_;  // chain_: the parents of a chain
};

}  // namespace slipstream
