// The frozen tier: one prompt's weighted history as an immutable suffix automaton in one block of memory.
//
// Invariants
// - The block is position independent: it may be copied, written to a file and mapped by other processes as it is.
// - It never changes once built: any number of threads and processes read it without a lock.
// - w(s) is the summed weight of the occurrences of s.
// - States lie in the order of their heaviest continuations: drafting reads memory forwards.
#pragma once
#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include <array>
#include <cstring>
#include <ctime>
#include <string>
#include <vector>

#include "block.h"
#include "suffix_automaton.h"

namespace slipstream {

constexpr uint32_t kLinearScan = 8;
constexpr uint32_t kLineEdges = kLine / sizeof(Edge);
constexpr int32_t kFrozenRoot = 0;

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

// Weighted sequences to index, oldest first. ages: visits since each was sampled (1: the newest).
struct Corpus {
  std::vector<int32_t> tokens;
  std::vector<int64_t> offsets;
  std::vector<float> weights;
  std::vector<uint8_t> ages;
};

constexpr char kFrozenMagic[9] = "SLPFRZ02";

class Frozen {
 public:
  // Raises BadBlock or std::system_error.
  static std::shared_ptr<const Frozen> map(const std::string& path) {
    return std::make_shared<const Frozen>(Block::map(path, kFrozenMagic));
  }

  // sizes of the header: states, places of other edges, sequences, tokens.
  explicit Frozen(std::shared_ptr<const char> block) : block_(std::move(block)) {
    const BlockHeader& h = Block::header(block_.get());
    states_ = reinterpret_cast<const State*>(block_.get() + sizeof h);
    others_ = reinterpret_cast<const Edge*>(states_ + h.sizes[0]);
    ages_ = reinterpret_cast<const uint8_t*>(others_ + h.sizes[1]);
  }

  static size_t block_bytes(size_t states, size_t others, size_t sequences) {
    return (sizeof(BlockHeader) + states * sizeof(State) + others * sizeof(Edge) + sequences + 7) / 8 * 8;
  }

  void write(const std::string& path) const { Block::write(block_.get(), path); }
  size_t num_tokens() const { return Block::header(block_.get()).sizes[3]; }
  size_t bytes() const { return Block::header(block_.get()).bytes; }

  static constexpr int32_t root() { return kFrozenRoot; }
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
  int32_t find(int32_t at, int32_t token) const {
    const State& s = states_[at];
    return s.token == token ? s.target : find_other(at, token);
  }

  // A cursor on its way over the tokens next..last: `at` stands for the last `matched` tokens. is_known: the next token
  // occurs somewhere.
  struct Walk {
    const int32_t *next, *last;
    int32_t at, matched;
    bool looks_at_others, is_known;
    bool done() const { return next == last; }
  };

  // A walk's beginning: passes the tokens along the states that `prefetch_path` fetched (mostly those of the draft that was
  // accepted), then prefetches what `advance` needs. Mostly only the last token was not expected, which `prefetch_token`
  // has fetched.
  void follow_path(Walk& walk) const {
    const State* s = &states_[walk.at];
    while (!walk.done() && s->token == *walk.next && s->target == walk.at + 1) {
      ++walk.next;
      ++walk.matched;
      ++walk.at;
      ++s;
    }
    if (walk.done()) return;
    if (s->token == *walk.next) {
      prefetch(&states_[s->target]);
      walk.at = s->target;
      ++walk.matched;
      ++walk.next;
      return;
    }
    if (walk.next + 1 == walk.last) {
      const int32_t known = find(kFrozenRoot, *walk.next);
      if (known < 0) return forget(walk);
      if (walk.at == kFrozenRoot) return move(walk, known);
      walk.is_known = true;
      if (!s->slots) return move(walk, -1);
    }
    look_at_others(walk, *s);
    if (s->link >= 0) prefetch(&states_[s->link]);
  }

  // Both go on until the walk needs memory that is not near, and prefetch that: a caller that takes turns between many
  // walks waits for none of them. Amortised constant time per token. First along the heaviest continuation.
  void advance(Walk& walk) const {
    if (walk.looks_at_others) return;
    if (walk.matched < 0) walk.matched = states_[walk.at].length;
    const State* s = &states_[walk.at];
    while (s->token == *walk.next) {
      ++walk.matched;
      walk.is_known = false;
      const int32_t target = s->target;
      const bool near = target == walk.at + 1;
      walk.at = target;
      s = &states_[target];
      if (++walk.next == walk.last || !near) return prefetch(s);
    }
    if (walk.at == kFrozenRoot) return move(walk, find_other(kFrozenRoot, *walk.next));
    if (walk.is_known && !s->slots) return move(walk, -1);
    look_at_others(walk, *s);
  }
  // Then where the token leaves it.
  void branch_off(Walk& walk) const {
    if (!walk.looks_at_others) return;
    walk.looks_at_others = false;
    move(walk, find_other(walk.at, *walk.next));
  }

  uint8_t age(int32_t mark) const { return ages_[mark]; }

  // Fetches the states of `count` tokens along the heaviest continuation, as far as they lie side by side; the first is
  // the caller's.
  void prefetch_path(int32_t at, int count) const {
    const char* first = reinterpret_cast<const char*>(&states_[at]);
    const ptrdiff_t last = count * static_cast<ptrdiff_t>(sizeof(State));
    for (ptrdiff_t byte = kLine; byte <= last; byte += kLine) prefetch(first + byte);
  }
  // Fetches how such a path goes on where it jumps: without this a third of all rows wait for memory.
  void prefetch_jump(int32_t at, int count) const {
    for (int i = 0; i < count; ++i) {
      const State& s = states_[at + i];
      if (s.target == at + i + 1) continue;
      if (s.token == kNoToken) return;
      prefetch(&states_[s.target]);
      return prefetch_path(s.target, count - i);
    }
  }
  void prefetch_ages() const { prefetch(ages_); }
  // Fetches where the root knows a token.
  void prefetch_token(int32_t token) const { prefetch(&others_[first_slot(states_[kFrozenRoot], token)]); }

  // Where the cache line begins that a hash table looks into first; the others follow, the first one after the last.
  static uint32_t home_line(int32_t token, uint32_t slots) {
    return (static_cast<uint32_t>(token) * 2654435769u >> 8) & (slots - 1) & ~(kLineEdges - 1);
  }

 private:
  // A token that occurs nowhere is looked up at the root before any shorter context is, whose states are seldom near.
  void look_at_others(Walk& walk, const State& s) const {
    if (!walk.is_known) prefetch_token(*walk.next);
    if (s.slots) prefetch(&others_[first_slot(s, *walk.next)]);
    walk.looks_at_others = true;
  }

  // Passes a token that occurs nowhere.
  static void forget(Walk& walk) {
    walk.at = kFrozenRoot;
    walk.matched = 0;
    ++walk.next;
  }

  void move(Walk& walk, int32_t target) const {
    if (target < 0 && !walk.is_known) {
      walk.is_known = walk.at != kFrozenRoot && find(kFrozenRoot, *walk.next) >= 0;
      if (!walk.is_known) return forget(walk);
    }
    if (target >= 0) {
      walk.at = target;
      ++walk.matched;
      ++walk.next;
      walk.is_known = false;
    } else {
      walk.at = states_[walk.at].link;
      walk.matched = -1;  // the length of the state, once it is loaded
    }
    prefetch(&states_[walk.at]);
  }

  uint32_t first_slot(const State& s, int32_t token) const {
    return s.slots <= kLinearScan ? s.more : s.more + home_line(token, s.slots);
  }

  int32_t find_other(int32_t at, int32_t token) const {
    const uint32_t slots = states_[at].slots;
    const Edge* edges = others_ + states_[at].more;
    if (slots <= kLinearScan) {
      for (uint32_t i = 0; i < slots; ++i)
        if (edges[i].token == token) return edges[i].target;
      return -1;
    }
    // A whole line at a time: where in it a token stands cannot be predicted.
    for (uint32_t i = home_line(token, slots);; i = (i + kLineEdges) & (slots - 1)) {
      const Edge* line = edges + i;
      const uint32_t same = which_bear(line, token);
      if (same) return line[__builtin_ctz(same)].target;
      if (line[kLineEdges - 1].token == kNoToken) return -1;
    }
  }

  // Bit k: whether edge k of a line bears the token.
  static uint32_t which_bear(const Edge* line, int32_t token) {
#ifdef __SSE2__
    const __m128i wanted = _mm_set1_epi32(token);
    const auto four = [&](const Edge* edges) {
      const auto* pairs = reinterpret_cast<const float*>(edges);
      const __m128 tokens = _mm_shuffle_ps(_mm_loadu_ps(pairs), _mm_loadu_ps(pairs + 4), _MM_SHUFFLE(2, 0, 2, 0));
      return _mm_movemask_ps(_mm_castsi128_ps(_mm_cmpeq_epi32(_mm_castps_si128(tokens), wanted)));
    };
    return static_cast<uint32_t>(four(line) | four(line + 4) << 4);
#else
    uint32_t same = 0;
    for (uint32_t k = 0; k < kLineEdges; ++k) same |= static_cast<uint32_t>(line[k].token == token) << k;
    return same;
#endif
  }

  std::shared_ptr<const char> block_;
  const State* states_;  // `more` is where its other edges begin, `slots` how many places they take
  const Edge* others_;
  const uint8_t* ages_;
};

}  // namespace slipstream
