// A generalised suffix automaton that grows: what the frozen tier is made from.
//
// Invariants
// - Indices are 32-bit and count from the start of the arena, so reading a state takes no table of chunks.
// - A state stands for the substrings that end at the same places; `length` is the longest of them, `link` the state
//   of the longest suffix that also ends elsewhere. Every edge into a state bears the same token, so the occurrences
//   of "s followed by c" are the occurrences of the state that c leads to: one weight a state is all the counting.
// - The state a sequence has reached has the length of the whole sequence. A clone takes the shorter strings of a
//   state and leaves its longest in place, so that state stays right whatever is inserted later.
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <memory>
#include <utility>

#include "arena.h"

namespace slipstream {

constexpr int32_t kNoToken = std::numeric_limits<int32_t>::min();
constexpr int32_t kStart = -1;  // the symbol before the first token of a response

struct Edge {
  int32_t token, target;
};

// token, target: the first edge (kNoToken: none). more: where the other edges are. mark: the last sequence that came
// through. slots: in a frozen tier, the places of the other edges; while one is laid out, the new number plus 1. 32 bytes:
// two states a cache line, none on two.
struct State {
  int32_t length, link, token, target;
  float weight;
  uint32_t more;
  int32_t mark;
  uint32_t slots;
};
static_assert(sizeof(State) == 32, "a state must not straddle cache lines");

// Text of the live tier (suffix_live.h). earlier: the places before each token's of the same pair, and of the same token.
struct LivePage {
  static constexpr uint32_t kTokens = 84;
  int32_t sequence;
  uint32_t next, previous, unused;
  int32_t token[kTokens];
  struct Earlier {
    uint32_t pair, single;
  } earlier[kTokens];
};
static_assert(sizeof(LivePage) == 1024, "a place counts words");

// What the indexes that grow are made of. Sizes are of addresses: 2^31 states, 2^27 edges and 2^32 words.
struct IndexMemory {
  Arena states{size_t{1} << 36}, edges{size_t{1} << 30}, pages{size_t{1} << 34};
};

// Weights belong to the states of whole prefixes: a clone starts with none, and they are propagated over the links at the
// end.
class SuffixAutomaton {
 public:
  explicit SuffixAutomaton(std::shared_ptr<IndexMemory> memory)
      : memory_(std::move(memory)),
        states_(memory_->states),
        clones_(memory_->states),
        edges_(memory_->edges) {
    root_ = add_state({0, -1, kNoToken, 0, 0.0f, 0, 0, 0});
  }

  int32_t root() const { return root_; }
  State& state(int32_t at) const { return states_[at]; }
  size_t num_states() const { return num_states_; }
  size_t num_other_edges(int32_t at) const { return states_[at].more ? count_edges(states_[at].more) : 0; }
  size_t bytes() const { return states_.bytes() + clones_.bytes() + edges_.bytes(); }

  template <typename Visit>
  void each_state(Visit visit) const {
    states_.each_range([&](size_t first, size_t last) {
      for (size_t at = first; at < last; ++at) visit(static_cast<int32_t>(at));
    });
    clones_.each_range([&](size_t first, size_t last) {
      for (size_t at = first; at < last; ++at) visit(static_cast<int32_t>(at));
    });
  }

  // The state after `token` in a sequence that has reached `at`; amortised constant time.
  int32_t step(int32_t at, int32_t token) {
    if (const int32_t* known = find(at, token))
      return states_[*known].length == states_[at].length + 1 ? *known : clone(at, token, *known);
    const int32_t fresh = add_state({states_[at].length + 1, root_, kNoToken, 0, 0.0f, 0, 0, 0});
    int32_t state = at;
    const int32_t* met = nullptr;
    do {
      insert(state, token, fresh);
      state = states_[state].link;
    } while (state >= 0 && !(met = find(state, token)));
    if (state >= 0) {
      const int32_t target = *met;
      prefetch(&states_[target + 2]);  // text that repeats itself comes to the clones in the order of their making
      const bool exact = states_[target].length == states_[state].length + 1;
      states_[fresh].link = exact ? target : clone(state, token, target);
    }
    return fresh;
  }

  template <typename Visit>
  void each_edge(int32_t at, Visit visit) const {
    const State& s = states_[at];
    if (s.token == kNoToken) return;
    visit(s.token, s.target);
    if (!s.more) return;
    const Edge* block = edges_.at(offset_of(s.more));
    const size_t slots = num_slots(log2_of(s.more));
    for (size_t i = log2_of(s.more) >= kHashedLog2; i < slots; ++i)
      if (block[i].token != kNoToken) visit(block[i].token, block[i].target);
  }

 private:
  // A block of 2^k edges is scanned; from 2^kHashedLog2 on it is hashed, after one slot that holds the edge count.
  static constexpr uint32_t kHashedLog2 = 3;
  static constexpr uint32_t kLog2Bits = 5;

  static uint32_t log2_of(uint32_t more) { return more & ((1u << kLog2Bits) - 1); }
  static size_t offset_of(uint32_t more) { return more >> kLog2Bits; }
  static size_t num_slots(uint32_t log2) { return (size_t{1} << log2) + (log2 >= kHashedLog2); }
  static uint32_t home(int32_t token, uint32_t log2) { return static_cast<uint32_t>(token) * 2654435769u >> (32 - log2); }

  int32_t* find(int32_t at, int32_t token) {
    State& s = states_[at];
    if (s.token == token) return &s.target;
    if (!s.more) return nullptr;
    const uint32_t log2 = log2_of(s.more);
    Edge* block = edges_.at(offset_of(s.more));
    if (log2 < kHashedLog2) {
      for (uint32_t i = 0; i < 1u << log2; ++i)
        if (block[i].token == token) return &block[i].target;
      return nullptr;
    }
    Edge& slot = probe(block + 1, log2, token);
    return slot.token == token ? &slot.target : nullptr;
  }

  static Edge& probe(Edge* slots, uint32_t log2, int32_t token) {
    const uint32_t mask = (1u << log2) - 1;
    uint32_t i = home(token, log2);
    while (slots[i].token != token && slots[i].token != kNoToken) i = (i + 1) & mask;
    return slots[i];
  }

  int32_t add_state(const State& state) {
    ++num_states_;
    return static_cast<int32_t>(states_.push(state));
  }

  // Adds an edge that is known to be absent.
  void insert(int32_t at, int32_t token, int32_t target) {
    State& s = states_[at];
    if (s.token == kNoToken) {
      s.token = token;
      s.target = target;
      return;
    }
    if (!s.more) {
      s.more = allocate(0);
    } else if (place(s.more, {token, target})) {
      return;
    } else {
      grow(s);
    }
    place(s.more, {token, target});
  }

  bool place(uint32_t more, Edge edge) {
    const uint32_t log2 = log2_of(more);
    Edge* block = edges_.at(offset_of(more));
    if (log2 >= kHashedLog2) {
      if (static_cast<uint32_t>(block->target) >= (3u << log2) / 4) return false;
      ++block->target;
      probe(block + 1, log2, edge.token) = edge;
      return true;
    }
    for (uint32_t i = 0; i < 1u << log2; ++i)
      if (block[i].token == kNoToken) {
        block[i] = edge;
        return true;
      }
    return false;
  }

  void grow(State& s) {
    const uint32_t old = s.more, log2 = log2_of(old);
    s.more = allocate(log2 + 1);
    for (size_t i = log2 >= kHashedLog2; i < num_slots(log2); ++i) {
      const Edge edge = edges_.at(offset_of(old))[i];
      if (edge.token != kNoToken) place(s.more, edge);
    }
    edges_[offset_of(old)].target = static_cast<int32_t>(free_[log2]);
    free_[log2] = old;
  }

  uint32_t allocate(uint32_t log2) {
    uint32_t more = free_[log2];
    if (more) {
      free_[log2] = static_cast<uint32_t>(edges_[offset_of(more)].target);
    } else {
      const size_t offset = edges_.extend(num_slots(log2));
      more = static_cast<uint32_t>(offset << kLog2Bits) | log2;
    }
    Edge* block = edges_.at(offset_of(more));
    std::fill(block, block + num_slots(log2), Edge{kNoToken, 0});
    return more;
  }

  int32_t clone(int32_t state, int32_t token, int32_t target) {
    ++num_states_;
    const int32_t copy = static_cast<int32_t>(clones_.push(states_[target]));
    states_[copy].length = states_[state].length + 1;
    states_[copy].weight = 0.0f;
    if (const uint32_t more = states_[target].more) {
      const uint32_t log2 = log2_of(more);
      const uint32_t own = allocate(log2);
      const Edge* from = edges_.at(offset_of(more));
      std::copy(from, from + num_slots(log2), edges_.at(offset_of(own)));
      states_[copy].more = own;
    }
    states_[target].link = copy;
    for (int32_t* edge; state >= 0 && (edge = find(state, token)) && *edge == target; state = states_[state].link)
      *edge = copy;
    return copy;
  }

  size_t count_edges(uint32_t more) const {
    const uint32_t log2 = log2_of(more);
    const Edge* block = edges_.at(offset_of(more));
    if (log2 >= kHashedLog2) return static_cast<size_t>(block->target);
    return static_cast<size_t>(
        std::count_if(block, block + (1u << log2), [](const Edge& edge) { return edge.token != kNoToken; }));
  }

  std::shared_ptr<IndexMemory> memory_;
  // Clones lie apart: the states of whole sequences are seldom met again, and between clones they would double the lines
  // that repeated text runs through.
  ArenaArray<State> states_, clones_;
  ArenaArray<Edge> edges_;
  int32_t root_ = 0;
  size_t num_states_ = 0;
  std::array<uint32_t, 32> free_{};
};

}  // namespace slipstream
