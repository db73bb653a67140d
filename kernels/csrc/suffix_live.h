// The live tier: the sequences of this step, open for appending in any order.
//
// Invariants
// - w(s) is the number of occurrences of s, the ends of unfinished sequences included.
// - Sequence kPromptSequence is the prompt's own text: it is there from the beginning and does not begin with kStart.
// - An occurrence is counted in the first kMaxChain states of its suffix chain. Where chains are shorter (all but
//   strongly repetitive text) counts are exact; otherwise those of the shortest contexts fall behind, never ahead.
// - Not safe to read while another thread appends.
#pragma once
#include "suffix_automaton.h"

namespace slipstream {

constexpr int kMaxChain = 32;
constexpr int32_t kPromptSequence = 0;

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

// A sequence is its cursor, which the caller keeps.
class Live {
 public:
  Live(std::shared_ptr<IndexMemory> memory, const int32_t* prompt, size_t length) : automaton_(std::move(memory), true) {
    int32_t cursor = root();
    for (size_t i = 0; i < length; ++i) append(cursor, prompt[i], kPromptSequence);
  }

  int32_t root() const { return automaton_.root(); }

  // Opens a sequence; returns its number and sets its cursor.
  int32_t open(int32_t& cursor) {
    cursor = automaton_.step(root(), kStart);
    count(cursor, num_sequences_);
    return num_sequences_++;
  }

  // Appends a token: a step, then counting along the suffix chain of the new cursor.
  void append(int32_t& cursor, int32_t token, int32_t sequence) {
    cursor = automaton_.step(cursor, token);
    count(cursor, sequence);
    ++num_tokens_;
  }

  int32_t find(int32_t at, int32_t token) const {
    const int32_t* known = automaton_.find(at, token);
    return known ? *known : -1;
  }
  const State& state(int32_t at) const { return automaton_.state(at); }
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
  void count(int32_t at, int32_t sequence) {
    for (int i = 0; i < kMaxChain && at != root(); ++i) {
      State& s = automaton_.state(at);
      prefetch(&s + 2);  // where the next token's chain mostly comes through
      s.weight += 1.0f;
      s.mark = sequence;
      at = s.link;
    }
  }

  SuffixAutomaton automaton_;
  int32_t num_sequences_ = 1;
  size_t num_tokens_ = 0;
};

}  // namespace slipstream
