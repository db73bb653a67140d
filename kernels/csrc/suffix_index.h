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
constexpr size_t kLinearScan = 8;

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

inline void prefetch(const void* at) { __builtin_prefetch(at); }

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
    SuffixAutomaton automaton;
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
    }
    states_ = std::move(automaton.states());
    states_.push({0, -1, kNoToken, 0, 0.0f, static_cast<uint32_t>(others_.size()), 0});
    states_.shrink();
  }

  int32_t find(int32_t at, int32_t token) const {
    const State& s = states_[at];
    if (s.token == token) return s.target;
    const Edge *first = others_.data() + s.more, *last = others_.data() + states_[at + 1].more;
    if (static_cast<size_t>(last - first) <= kLinearScan) {
      for (; first != last; ++first)
        if (first->token == token) return first->target;
      return -1;
    }
    first = std::lower_bound(first, last, token, [](const Edge& edge, int32_t t) { return edge.token < t; });
    return first != last && first->token == token ? first->target : -1;
  }

  // Moves a cursor (state, length of the match) past `token`; amortised constant time.
  void advance(int32_t& at, int32_t& matched, int32_t token) const {
    for (;;) {
      const int32_t target = find(at, token);
      if (target >= 0) {
        at = target;
        ++matched;
        return;
      }
      if (at == kRoot) {
        matched = 0;
        return;
      }
      at = states_[at].link;
      matched = states_[at].length;
    }
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
    for (uint32_t i = s.more; i < states_[at + 1].more; ++i) visit(others_[i].token, others_[i].target);
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

  void pack(State& state, std::vector<Child>& children) {
    const size_t best = static_cast<size_t>(
        std::min_element(children.begin(), children.end(), heavier) - children.begin());
    state.token = children[best].token;
    state.target = children[best].target;
    children[best] = children.back();
    children.pop_back();
    if (children.size() > kLinearScan)
      std::sort(children.begin(), children.end(), [](const Child& a, const Child& b) { return a.token < b.token; });
    for (const Child& child : children) others_.push({child.token, child.target});
  }

  FlatBuffer<State> states_;  // `more` is where the other edges begin; the next state's is where they end
  FlatBuffer<Edge> others_;
  size_t num_tokens_, num_plain_;
};

// The sequences of this step, open for appending in any order. Not safe to read while another thread appends.
class Live {
 public:
  int32_t open() {
    last_.push_back(automaton_.step(kRoot, kStart));
    return static_cast<int32_t>(last_.size() - 1);
  }

  void append(int32_t sequence, int32_t token) {
    int32_t at = last_[sequence] = automaton_.step(last_[sequence], token);
    ++num_tokens_;
    FlatBuffer<State>& states = automaton_.states();
    for (int i = 0; i < kMaxChain && at != kRoot; ++i) {
      State& s = states[at];
      s.weight += 1.0f;
      s.mark = sequence;
      at = s.link;
    }
  }

  int32_t cursor(int32_t sequence) const { return last_[sequence]; }
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
  size_t num_tokens() const { return num_tokens_; }
  size_t bytes() const { return automaton_.bytes() + last_.capacity() * sizeof(int32_t); }

 private:
  SuffixAutomaton automaton_;
  std::vector<int32_t> last_;
  size_t num_tokens_ = 0;
};

struct DraftLimits {
  int max_tokens, min_match;
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

// Follows the heaviest continuation from a state. own: what the request's own end adds to w(state).
template <typename Tier>
void follow(const Tier& tier, int32_t at, float own, const DraftLimits& limits, Draft& out) {
  float prob = 1.0f;
  Child child;
  while (out.count < limits.max_tokens && tier.best(at, child)) {
    const float total = std::max(tier.state(at).weight - own, child.weight);
    prob *= child.weight / (total + limits.escape);
    if (prob < limits.min_prob) return;
    if (out.count == 0) out.mark = child.mark;
    out.tokens[out.count] = child.token;
    out.probs[out.count++] = prob;
    out.score += prob;
    at = child.target;
    own = 0.0f;
  }
}

// The best of the longest continued match and up to max_candidates - 1 shorter ones. Result in `best`; `spare` is
// scratch of the same size.
template <typename Tier>
void draft_from(const Tier& tier, int32_t at, int32_t matched, float own, int max_candidates, const DraftLimits& limits,
                Draft& best, Draft& spare) {
  // A shorter context cannot add much to a draft that is nearly certain already.
  const float enough = 0.8f * static_cast<float>(limits.max_tokens);
  for (int tried = 0; tried < max_candidates && at != kRoot && best.score < enough;) {
    if (matched < limits.min_match) return;
    if (tier.state(at).token != kNoToken) {
      ++tried;
      spare.count = 0;
      spare.score = 0.0f;
      follow(tier, at, own, limits, spare);
      spare.match_len = matched;
      if (spare.score > best.score) std::swap(best, spare);
    }
    at = tier.state(at).link;
    matched = tier.state(at).length;
  }
}

}  // namespace slipstream
