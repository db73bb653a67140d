// Drafting a chain from a tier: the heaviest continuation of the longest matches. Plain twin: kernels/suffix_index.py.
//
// Invariants
// - The relative weight of "c follows s" is w(sc) / (w(s) + escape), text that ends at s counted in w(s), except the
//   drafting request's own end. The escape weight keeps what was seen once from looking certain.
// - A draft's path probability is the product of its tokens' calibrated probabilities; its score, their sum over the
//   draft, is the expected number of accepted tokens.
#pragma once
#include "calibration.h"
#include "suffix_frozen.h"

namespace slipstream {

// min_match: least context to start from; min_resume: least context to go on from where a text ends. enough: expected
// accepted tokens with which no shorter context is asked.
struct DraftLimits {
  int max_tokens, min_match, min_resume;
  float min_prob, escape, enough;
};

// A chain in caller-owned buffers of at least max_tokens entries.
struct Draft {
  int32_t* tokens;
  float* probs;
  int16_t* cells;
  int count = 0;
  float score = 0.0f, path = 1.0f;  // path: the probability that all tokens are accepted
  int32_t match_len = 0;
  Source source = kSourceNone;
  uint8_t age = 0;

  void clear() {
    count = 0;
    score = 0.0f;
    path = 1.0f;
  }

  // False when the token is not worth drafting.
  bool add(int32_t token, float relative_weight, int match, Source from, uint8_t from_age, const Calibration& calibration,
           const DraftLimits& limits) {
    const int16_t cell = cell_of(source_class(from, from_age), match, relative_weight);
    const float prob = calibration.probability(cell, relative_weight) * path;
    if (prob < limits.min_prob || count == limits.max_tokens) return false;
    if (count == 0) {
      source = from;
      age = from_age;
      match_len = match;
    }
    tokens[count] = token;
    cells[count] = cell;
    probs[count++] = prob;
    score += prob;
    path = prob;
    return true;
  }
};

// A tier with what it knows about the origin of a mark.
struct LiveView {
  const Live& tier;
  int32_t own_sequence, own_end;  // own_end: the state of the request's own text
  Source source(int32_t mark) const {
    return mark == own_sequence ? kSelf : mark == kPromptSequence ? kPrompt : kSibling;
  }
  uint8_t age(int32_t) const { return 0; }
};
struct FrozenView {
  const Frozen& tier;
  static constexpr int32_t own_end = -1;
  Source source(int32_t) const { return kHistory; }
  uint8_t age(int32_t mark) const { return tier.age(mark); }
};

// Follows the heaviest continuation from a state that stands for the last `matched` tokens. Where the text ends, the
// longest suffix that goes on elsewhere takes over: text of period k is drafted further than its last period. On the
// suffix chain of the request's own end, where drafts start, that end is no evidence.
template <typename View>
void follow(const View& view, int32_t at, int matched, const Calibration& calibration, const DraftLimits& limits,
            Draft& out) {
  const auto& tier = view.tier;
  bool is_suffix = view.own_end >= 0;
  Child child;
  while (out.count < limits.max_tokens) {
    if (!tier.best(at, child)) {
      is_suffix = at == view.own_end || is_suffix;
      at = tier.state(at).link;
      if (at < 0 || tier.state(at).length < limits.min_resume) return;
      matched = tier.state(at).length;
      continue;
    }
    const float total = std::max(tier.state(at).weight - (is_suffix ? 1.0f : 0.0f), child.weight);
    if (!out.add(child.token, child.weight / (total + limits.escape), matched, view.source(child.mark),
                 view.age(child.mark), calibration, limits))
      return;
    at = child.target;
    ++matched;
    is_suffix = false;
  }
}

// The best of `best` and the drafts from the longest continued match and up to max_candidates - 1 shorter ones. A shorter
// context is not asked where a longer one promises enough. `spare` is scratch of the same size.
template <typename View>
void draft_from(const View& view, int32_t at, int32_t matched, int max_candidates, const Calibration& calibration,
                const DraftLimits& limits, Draft& best, Draft& spare) {
  for (int tried = 0; tried < max_candidates && matched >= limits.min_match && at != view.tier.root();) {
    if (best.score >= limits.enough && matched <= best.match_len) return;
    if (view.tier.state(at).token != kNoToken) {
      ++tried;
      spare.clear();
      follow(view, at, matched, calibration, limits, spare);
      if (spare.score > best.score) std::swap(best, spare);
    }
    at = view.tier.state(at).link;
    if (at < 0) return;
    matched = view.tier.state(at).length;
  }
}

}  // namespace slipstream
