// Drafting a chain from a prompt's tiers: the heaviest continuation of the longest matches. Plain twins:
// kernels/suffix_index.py (automaton), kernels/live_text.py.
//
// Invariants
// - The relative weight of "c follows s" is w(sc) / (w(s) + escape). In the frozen tier text that ends at s counts in
//   w(s); in the live tier, whose text is not complete, w counts the kMaxPlaces latest places that go on. The escape
//   weight keeps what was seen once from looking certain.
// - A draft's path probability is the product of its tokens' calibrated probabilities; its score, their sum over the
//   draft, is the expected number of accepted tokens.
#pragma once
#include "calibration.h"
#include "suffix_frozen.h"
#include "suffix_live.h"

namespace slipstream {

// min_match: least context to start from; min_resume: least context to go on from where a text ends. enough: expected
// accepted tokens with which no shorter context is asked.
struct DraftLimits {
  int max_tokens, min_match, min_resume;
  float min_prob, escape, enough;
};

// A chain in caller-owned buffers of at least max_tokens entries. match_len, source, age: of its first token.
struct Draft {
  int32_t* tokens;
  float* probs;
  int16_t* cells;
  int count = 0;
  float score = 0.0f, path = 1.0f;  // path: the probability that all tokens are accepted
  int32_t match_len = 0;
  Source source = kSourceNone;
  uint8_t age = 0;

  void begin(int32_t match, Source from, uint8_t from_age) {
    count = 0;
    score = 0.0f;
    path = 1.0f;
    match_len = match;
    source = from;
    age = from_age;
  }

  // False when the token is not worth drafting.
  bool add(int32_t token, float relative_weight, int match, Source from, uint8_t from_age, const Calibration& calibration,
           const DraftLimits& limits) {
    const int16_t cell = cell_of(source_class(from, from_age), match, relative_weight);
    const float prob = calibration.probability(cell, relative_weight) * path;
    if (prob < limits.min_prob || count == limits.max_tokens) return false;
    tokens[count] = token;
    cells[count] = cell;
    probs[count++] = prob;
    score += prob;
    path = prob;
    return true;
  }
};

// Who drafts from a live tier, and where its own text ends.
struct LiveView {
  const Live& tier;
  int32_t own_sequence;
  uint32_t own_end;
  Source source(uint32_t place) const {
    const int32_t sequence = tier.sequence(place);
    return sequence == own_sequence ? kSelf : sequence == kPromptSequence ? kPrompt : kSibling;
  }
};

// Both functions go on with a draft that has begun.
// Follows the heaviest continuation from a state that stands for the last `matched` tokens. Where the text ends, the
// longest suffix that goes on elsewhere takes over: text of period k is drafted further than its last period.
inline void follow(const Frozen& tier, int32_t at, int matched, const Calibration& calibration,
                   const DraftLimits& limits, Draft& out) {
  Child child;
  while (out.count < limits.max_tokens) {
    if (!tier.best(at, child)) {
      at = tier.state(at).link;
      if (at < 0 || tier.state(at).length < limits.min_resume) return;
      matched = tier.state(at).length;
      continue;
    }
    const float total = std::max(tier.state(at).weight, child.weight);
    if (!out.add(child.token, child.weight / (total + limits.escape), matched, kHistory, tier.age(child.mark),
                 calibration, limits))
      return;
    at = child.target;
    ++matched;
  }
}

// The contexts a row may still be asked for, the longest first: a state that stands for the last `matched` tokens, and how
// many of those that go on.
struct Contexts {
  int32_t at, matched;
  int left;

  // A shorter context is not asked where a longer one promises enough.
  bool any(const DraftLimits& limits, const Draft& best) const {
    return left > 0 && at > kFrozenRoot && matched >= limits.min_match &&
           !(best.score >= limits.enough && matched <= best.match_len);
  }
};

// The best of `best` and the drafts from up to `count` of the contexts. `spare` is scratch of the same size.
inline void draft_from(const Frozen& tier, Contexts& contexts, int count, const Calibration& calibration,
                       const DraftLimits& limits, Draft& best, Draft& spare) {
  while (count > 0 && contexts.any(limits, best)) {
    if (Child first; tier.best(contexts.at, first)) {
      --count;
      --contexts.left;
      spare.begin(contexts.matched, kHistory, tier.age(first.mark));
      follow(tier, contexts.at, contexts.matched, calibration, limits, spare);
      if (spare.score > best.score) std::swap(best, spare);
    }
    contexts.at = tier.state(contexts.at).link;
    if (contexts.at > kFrozenRoot) contexts.matched = tier.state(contexts.at).length;
  }
}

// Places that go on with the same text.
struct Group {
  std::array<uint32_t, kMaxPlaces> at;
  int count = 0;

  // Those whose match has at least `length` tokens.
  static Group of(const Places& places, int length) {
    Group out;
    for (int i = 0; i < places.count; ++i)
      if (places.length[i] >= length) out.at[out.count++] = places.next[i];
    return out;
  }
  int num_with(const Live& tier, int32_t token) const {
    int found = 0;
    for (int i = 0; i < count; ++i) found += tier.token(at[i]) == token;
    return found;
  }
  // Leaves the places that bear this token, and steps behind it; the last place is where its text may end.
  uint32_t pass(const Live& tier, int32_t token) {
    int kept = 0;
    uint32_t end = 0;
    for (int i = 0; i < count; ++i) {
      if (tier.token(at[i]) != token) continue;
      end = at[i];
      if (const uint32_t next = tier.after(end)) at[kept++] = next;
    }
    count = kept;
    return end;
  }
};

// Follows what most places of the group go on with; ties go to the latest. Where all their texts have ended, the longest
// match of the end takes over.
inline void follow(const LiveView& view, Group group, int matched, const Calibration& calibration,
                   const DraftLimits& limits, Draft& out) {
  const Live& tier = view.tier;
  Places places;
  while (out.count < limits.max_tokens) {
    int most = 0, lead = 0;
    for (int i = 0; i < group.count && 2 * most <= group.count; ++i) {
      const int found = group.num_with(tier, tier.token(group.at[i]));
      if (found > most) {
        most = found;
        lead = i;
      }
    }
    const int32_t token = tier.token(group.at[lead]);
    const float votes = static_cast<float>(most);
    const Source source = view.source(group.at[lead]);
    if (!out.count) out.source = source;
    if (!out.add(token, votes / (static_cast<float>(group.count) + limits.escape), matched, source, 0, calibration,
                 limits))
      return;
    ++matched;
    const uint32_t end = group.pass(tier, token);
    if (group.count) continue;
    tier.find(end, limits.min_resume, places);
    if (!(matched = places.longest_below(kMaxMatch + 1))) return;
    group = Group::of(places, matched);
  }
}

// As from the frozen tier: the best of `best` and the drafts from the longest matches.
inline void draft_from(const LiveView& view, int max_candidates, const Calibration& calibration,
                       const DraftLimits& limits, Draft& best, Draft& spare) {
  Places places;
  view.tier.find(view.own_end, limits.min_match, places);
  int matched = kMaxMatch + 1;
  for (int tried = 0; tried < max_candidates && (matched = places.longest_below(matched)); ++tried) {
    if (best.score >= limits.enough && matched <= best.match_len) return;
    spare.begin(matched, kSelf, 0);
    follow(view, Group::of(places, matched), matched, calibration, limits, spare);
    if (spare.score > best.score) std::swap(best, spare);
  }
}

}  // namespace slipstream
