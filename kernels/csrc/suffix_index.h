// The two tiers of one prompt's drafter index, and drafting from either. Plain twin: kernels/suffix_index.py.
//
// Invariants
// - w(s) is the summed weight of the occurrences of s; the estimate of "c follows s" is
//   p(c | s) = w(sc) / (w(s) + escape): the escape weight keeps what was seen once from looking certain. Text that
//   ends at s counts in w(s), except the drafting request's own end.
// - Frozen never changes once built: any number of threads read it without a lock.
// - Live counts an occurrence in the first kMaxChain states of its suffix chain. Where chains are shorter (all but
//   strongly repetitive text) counts are exact; otherwise those of the shortest contexts fall behind, never ahead.
#pragma once
#include <algorithm>
#include <array>
#include <ctime>
#include <vector>

#include "suffix_automaton.h"

namespace slipstream {

constexpr int kMaxChain = 32;
constexpr uint32_t kLinearScan = 8;

struct Child {
  int32_t token, target;
  float weight;
  int32_t mark;
};

// Heavier first; ties go to what was seen last, then to the smaller token, so that drafts are reproducible.
inline bool heavier(const Child& a, const Child& b) {
  if (a.weight != b.weight) return a.weight > b.weight;
  if (a.mark != b.mark) return a.mark > b.mark;
  return a.token < b.token;
}

inline double thread_seconds() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// Weighted sequences to index. The first num_plain of them are prompts: they do not begin with kStart.
struct Corpus {
  std::vector<int32_t> tokens;
  std::vector<int64_t> offsets;
  std::vector<float> weights;
  size_t num_plain = 0;
};

class Frozen {
 public:
  Frozen() : Frozen(Corpus{{}, {0}, {}, 0}) {}

  explicit Frozen(const Corpus& corpus) : num_tokens_(corpus.tokens.size()), num_plain_(corpus.num_plain) {
    SuffixAutomaton automaton = insert(corpus);
    freeze(automaton);
  }

  // CPU seconds of this thread for inserting and for freezing: what the benchmark reports.
  static std::array<double, 2> build_seconds(const Corpus& corpus) {
    const double start = thread_seconds();
    SuffixAutomaton automaton = insert(corpus);
    const double inserted = thread_seconds();
    Frozen().freeze(automaton);
    return {inserted - start, thread_seconds() - inserted};
  }

  // Inserts every sequence; each state then holds the weight of the prefixes that end exactly there.
  static SuffixAutomaton insert(const Corpus& corpus) {
    SuffixAutomaton automaton(false);
    for (size_t i = 0; i < corpus.weights.size(); ++i) {
      int32_t at = i < corpus.num_plain ? kRoot : automaton.step(kRoot, kStart);
      for (int64_t j = corpus.offsets[i]; j < corpus.offsets[i + 1]; ++j) {
        if (at != kRoot) visit(automaton, at, corpus.weights[i], static_cast<int32_t>(i));
        at = automaton.step(at, corpus.tokens[j]);
      }
      if (at != kRoot) visit(automaton, at, corpus.weights[i], static_cast<int32_t>(i));
    }
    return automaton;
  }

  // Propagates weights over suffix links, longest first, and lays the edges out: heaviest inline, others packed.
  void freeze(SuffixAutomaton& automaton) {
    propagate(automaton.states());
    others_.reserve(automaton.num_edges_beyond_first());
    const size_t count = automaton.states().size();
    std::vector<Child> children;
    for (size_t s = 0; s < count; ++s) {
      State& state = automaton.states()[s];
      const uint32_t first = static_cast<uint32_t>(others_.size());
      if (state.more) {
        children.clear();
        automaton.each_edge(static_cast<int32_t>(s), [&](int32_t token, int32_t target) {
          const State& to = automaton.states()[target];
          children.push_back({token, target, to.weight, to.mark});
        });
        pack(state, children);
      }
      state.more = first;
      state.slots = static_cast<uint32_t>(others_.size()) - first;
    }
    states_ = std::move(automaton.states());
    states_.shrink();
  }

  int32_t find(int32_t at, int32_t token) const {
    const State& s = states_[at];
    return s.token == token ? s.target : find_other(at, token);
  }

  // A cursor on its way over the tokens next..last: `at` stands for the last `matched` tokens.
  struct Walk {
    const int32_t *next, *last;
    int32_t at, matched;
    bool looks_at_others;
    bool done() const { return next == last; }
  };

  // One load's worth of the walk, and the prefetch of what the next one needs: a caller that takes turns between many
  // walks waits for none of them. Amortised constant time per token.
  void advance(Walk& walk) const {
    const State& s = states_[walk.at];
    if (walk.matched < 0) walk.matched = s.length;
    int32_t target = -1;
    if (walk.looks_at_others) {
      target = find_other(walk.at, *walk.next);
      walk.looks_at_others = false;
    } else if (s.token == *walk.next) {
      target = s.target;
    } else if (s.slots) {
      walk.looks_at_others = true;
      prefetch(&others_[first_slot(walk.at, *walk.next)]);
      return;
    }
    if (target >= 0) {
      walk.at = target;
      ++walk.matched;
      ++walk.next;
    } else if (walk.at == kRoot) {
      ++walk.next;
    } else {
      walk.at = s.link;
      walk.matched = -1;  // the length of the state, once it is loaded
    }
    prefetch(&states_[walk.at]);
  }

  const State& state(int32_t at) const { return states_[at]; }
  bool best(int32_t at, Child& out) const {
    const State& s = states_[at];
    if (s.token == kNoToken) return false;
    const State& to = states_[s.target];
    out = {s.token, s.target, to.weight, to.mark};
    return true;
  }
  template <typename Visit>
  void each_edge(int32_t at, Visit visit) const {
    const State& s = states_[at];
    if (s.token == kNoToken) return;
    visit(s.token, s.target);
    for (uint32_t i = s.more; i < s.more + s.slots; ++i)
      if (others_[i].token != kNoToken) visit(others_[i].token, others_[i].target);
  }

  bool is_prompt(int32_t mark) const { return static_cast<size_t>(mark) < num_plain_; }
  size_t num_tokens() const { return num_tokens_; }
  size_t bytes() const { return states_.bytes() + others_.bytes(); }

 private:
  static void visit(SuffixAutomaton& automaton, int32_t at, float weight, int32_t mark) {
    State& s = automaton.states()[at];
    s.weight += weight;
    s.mark = mark;
  }

  static void propagate(FlatBuffer<State>& states) {
    int32_t longest = 0;
    for (size_t s = 0; s < states.size(); ++s) longest = std::max(longest, states[s].length);
    std::vector<uint32_t> start(static_cast<size_t>(longest) + 2, 0);
    for (size_t s = 0; s < states.size(); ++s) ++start[states[s].length + 1];
    for (size_t i = 1; i < start.size(); ++i) start[i] += start[i - 1];
    std::vector<int32_t> by_length(states.size());
    for (size_t s = 0; s < states.size(); ++s) by_length[start[states[s].length]++] = static_cast<int32_t>(s);
    for (size_t i = by_length.size(); i-- > 1;) {  // the root comes first and has no link
      const State& s = states[by_length[i]];
      State& up = states[s.link];
      up.weight += s.weight;
      up.mark = std::max(up.mark, s.mark);
    }
  }

  // Up to kLinearScan other edges lie side by side; more of them fill a hash table, at most two thirds of it.
  void pack(State& state, std::vector<Child>& children) {
    const size_t best = static_cast<size_t>(
        std::min_element(children.begin(), children.end(), heavier) - children.begin());
    state.token = children[best].token;
    state.target = children[best].target;
    children[best] = children.back();
    children.pop_back();
    if (children.size() <= kLinearScan) {
      for (const Child& child : children) others_.push({child.token, child.target});
      return;
    }
    uint32_t slots = 2 * kLinearScan;
    while (slots * 2 < children.size() * 3) slots *= 2;
    const size_t first = others_.extend(slots);
    std::fill(others_.data() + first, others_.data() + first + slots, Edge{kNoToken, 0});
    for (const Child& child : children) {
      uint32_t i = home_slot(child.token, slots);
      while (others_[first + i].token != kNoToken) i = (i + 1) & (slots - 1);
      others_[first + i] = {child.token, child.target};
    }
  }

  static uint32_t home_slot(int32_t token, uint32_t slots) {
    return (static_cast<uint32_t>(token) * 2654435769u >> 8) & (slots - 1);
  }

  uint32_t first_slot(int32_t at, int32_t token) const {
    const uint32_t first = states_[at].more, slots = states_[at].slots;
    return slots <= kLinearScan ? first : first + home_slot(token, slots);
  }

  int32_t find_other(int32_t at, int32_t token) const {
    const uint32_t first = states_[at].more, slots = states_[at].slots;
    const Edge* edges = others_.data() + first;
    if (slots <= kLinearScan) {
      for (uint32_t i = 0; i < slots; ++i)
        if (edges[i].token == token) return edges[i].target;
      return -1;
    }
    uint32_t i = home_slot(token, slots);
    while (edges[i].token != token && edges[i].token != kNoToken) i = (i + 1) & (slots - 1);
    return edges[i].token == token ? edges[i].target : -1;
  }

  FlatBuffer<State> states_;  // `more` is where its other edges begin, `slots` how many places they take
  FlatBuffer<Edge> others_;
  size_t num_tokens_, num_plain_;
};

// The sequences of this step, open for appending in any order. A sequence is its cursor, which the caller keeps. Not
// safe to read while another thread appends.
class Live {
 public:
  // Opens a sequence; returns its number and sets its cursor.
  int32_t open(int32_t& cursor) {
    cursor = automaton_.step(kRoot, kStart);
    count(cursor, num_sequences_);
    return num_sequences_++;
  }

  // An append is a step, then counting along the suffix chain of the new cursor. Steps of other sequences may come in
  // between: a state split meanwhile lies on the same chain with its clone, so both are counted once.
  void step(int32_t& cursor, int32_t token) {
    cursor = automaton_.step(cursor, token);
    ++num_tokens_;
  }

  // Counts one state of the chain and returns the next one, prefetched; kRoot ends the chain.
  int32_t count(int32_t at, int32_t sequence) {
    State& s = automaton_.states()[at];
    s.weight += 1.0f;
    s.mark = sequence;
    prefetch(&state(s.link));
    return s.link;
  }

  int32_t find(int32_t at, int32_t token) const {
    const int32_t* known = automaton_.find(at, token);
    return known ? *known : -1;
  }
  const State& state(int32_t at) const { return automaton_.states()[at]; }
  bool best(int32_t at, Child& out) const {
    bool any = false;
    automaton_.each_edge(at, [&](int32_t token, int32_t target) {
      const State& to = state(target);
      const Child child{token, target, to.weight, to.mark};
      if (!any || heavier(child, out)) out = child;
      any = true;
    });
    return any;
  }
  template <typename Visit>
  void each_edge(int32_t at, Visit visit) const {
    automaton_.each_edge(at, visit);
  }
  void prefetch_edges(int32_t at) const { automaton_.prefetch_edges(at); }
  void prefetch_search(int32_t at, int32_t token) const { automaton_.prefetch_search(at, token); }
  size_t num_tokens() const { return num_tokens_; }
  size_t bytes() const { return automaton_.bytes(); }

 private:
  SuffixAutomaton automaton_{true};
  int32_t num_sequences_ = 0;
  size_t num_tokens_ = 0;
};

// min_match: least context to start from; min_resume: least context to go on from where a text ends.
struct DraftLimits {
  int max_tokens, min_match, min_resume;
  float min_prob, escape;
};

// A chain in caller-owned buffers of at least max_tokens entries. score: the expected number of accepted tokens.
struct Draft {
  int32_t* tokens;
  float* probs;
  int count = 0;
  float score = 0.0f;
  int32_t match_len = 0, mark = 0;
};

// Follows the heaviest continuation from a state. Where the text ends, the longest suffix that goes on elsewhere takes
// over: text of period k is drafted further than its last period. own_end: the state of the request's own text (kRoot in
// a tier without it): on its suffix chain, where drafts start, the request's own end is no evidence.
template <typename Tier>
void follow(const Tier& tier, int32_t at, int32_t own_end, const DraftLimits& limits, Draft& out) {
  float prob = 1.0f;
  bool is_suffix = own_end != kRoot;
  Child child;
  while (out.count < limits.max_tokens) {
    if (!tier.best(at, child)) {
      is_suffix = at == own_end || is_suffix;
      at = tier.state(at).link;
      if (at <= kRoot || tier.state(at).length < limits.min_resume) return;
      continue;
    }
    const float total = std::max(tier.state(at).weight - (is_suffix ? 1.0f : 0.0f), child.weight);
    prob *= child.weight / (total + limits.escape);
    if (prob < limits.min_prob) return;
    if (out.count == 0) out.mark = child.mark;
    out.tokens[out.count] = child.token;
    out.probs[out.count++] = prob;
    out.score += prob;
    at = child.target;
    is_suffix = false;
  }
}

// The best of the longest continued match and up to max_candidates - 1 shorter ones. Result in `best`; `spare` is
// scratch of the same size.
template <typename Tier>
void draft_from(const Tier& tier, int32_t at, int32_t matched, int32_t own_end, int max_candidates,
                const DraftLimits& limits, Draft& best, Draft& spare) {
  // A shorter context of the same tier cannot add much to a draft that is nearly certain already.
  const float enough = 0.8f * static_cast<float>(limits.max_tokens);
  for (int tried = 0; tried < max_candidates && at != kRoot && (tried == 0 || best.score < enough);) {
    if (matched < limits.min_match) return;
    if (tier.state(at).token != kNoToken) {
      ++tried;
      spare.count = 0;
      spare.score = 0.0f;
      follow(tier, at, own_end, limits, spare);
      spare.match_len = matched;
      if (spare.score > best.score) std::swap(best, spare);
    }
    at = tier.state(at).link;
    matched = tier.state(at).length;
  }
}

}  // namespace slipstream
