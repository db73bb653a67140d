// From weighted sequences to a frozen tier: insertion, propagation of the weights, layout.
// Invariant: the result depends on the corpus alone, so that every process that builds it gets the same bytes.
#pragma once
#include "suffix_frozen.h"

namespace slipstream {

class FrozenBuilder {
 public:
  static std::shared_ptr<const Frozen> build(const Corpus& corpus, const std::shared_ptr<IndexMemory>& memory) {
    SuffixAutomaton automaton(memory);
    insert(automaton, corpus);
    return FrozenBuilder(automaton).freeze(corpus);
  }

  // CPU seconds of this thread for inserting and for freezing: what the benchmark reports.
  static std::array<double, 2> seconds(const Corpus& corpus, const std::shared_ptr<IndexMemory>& memory) {
    const double start = thread_seconds();
    SuffixAutomaton automaton(memory);
    insert(automaton, corpus);
    const double inserted = thread_seconds();
    FrozenBuilder(automaton).freeze(corpus);
    return {inserted - start, thread_seconds() - inserted};
  }

 private:
  explicit FrozenBuilder(SuffixAutomaton& automaton) : automaton_(automaton) {}

  // Inserts every sequence; each state then holds the weight of the prefixes that end exactly there.
  static void insert(SuffixAutomaton& automaton, const Corpus& corpus) {
    const int32_t root = automaton.root();
    for (size_t i = 0; i < corpus.weights.size(); ++i) {
      int32_t at = automaton.step(root, kStart);
      for (int64_t j = corpus.offsets[i]; j < corpus.offsets[i + 1]; ++j) {
        visit(automaton, at, corpus.weights[i], static_cast<int32_t>(i));
        at = automaton.step(at, corpus.tokens[j]);
      }
      visit(automaton, at, corpus.weights[i], static_cast<int32_t>(i));
    }
  }

  static void visit(SuffixAutomaton& automaton, int32_t at, float weight, int32_t mark) {
    State& s = automaton.state(at);
    s.weight += weight;
    s.mark = mark;
  }

  std::shared_ptr<const Frozen> freeze(const Corpus& corpus) {
    sort_by_length(corpus);
    propagate();
    automaton_.each_state([&](int32_t at) { lay_out_path(at); });
    pad_to(Block::header(block_.get()).sizes[1]);
    translate();
    Block::seal(block_.get(), kFrozenMagic, Frozen::block_bytes(num_laid_out_, num_others_, corpus.weights.size()));
    std::copy(corpus.ages.begin(), corpus.ages.end(), reinterpret_cast<uint8_t*>(others_ + num_others_));
    return std::make_shared<const Frozen>(block_);
  }

  // The root comes first.
  void sort_by_length(const Corpus& corpus) {
    int64_t longest = 0;
    for (size_t i = 0; i + 1 < corpus.offsets.size(); ++i)
      longest = std::max(longest, corpus.offsets[i + 1] - corpus.offsets[i] + 1);
    std::vector<uint32_t> start(static_cast<size_t>(longest) + 2, 0);
    size_t others = 0;
    automaton_.each_state([&](int32_t s) {
      ++start[state(s).length + 1];
      if (state(s).more) others += places(automaton_.num_other_edges(s));
    });
    reserve_block(corpus, others);
    for (size_t i = 1; i < start.size(); ++i) start[i] += start[i - 1];
    by_length_.resize(automaton_.num_states());
    automaton_.each_state([&](int32_t s) { by_length_[start[state(s).length]++] = s; });
  }

  void propagate() {
    for (size_t i = by_length_.size(); i-- > 1;) {
      const State& s = state(by_length_[i]);
      State& up = state(s.link);
      up.weight += s.weight;
      up.mark = std::max(up.mark, s.mark);
    }
  }

  void reserve_block(const Corpus& corpus, size_t others) {
    const size_t states = automaton_.num_states();
    block_ = Block::allocate(Frozen::block_bytes(states, others, corpus.weights.size()));
    const uint64_t sizes[5] = {states, others, corpus.weights.size(), corpus.tokens.size(), 0};
    std::memcpy(block_.get() + offsetof(BlockHeader, sizes), sizes, sizeof sizes);
    out_ = reinterpret_cast<State*>(block_.get() + sizeof(BlockHeader));
    others_ = reinterpret_cast<Edge*>(out_ + states);
  }

  // At most; a table may have to be moved up to the beginning of a line.
  static size_t places(size_t edges) { return edges <= kLinearScan ? edges : table_slots(edges) + kLineEdges - 1; }

  static uint32_t table_slots(size_t edges) {
    uint32_t slots = 2 * kLinearScan;
    while (slots * 2 < edges * 3) slots *= 2;
    return slots;
  }

  // Numbers a state, its heaviest continuation, the heaviest continuation of that, until one that has a number.
  void lay_out_path(int32_t at) {
    while (!state(at).slots) {
      State& from = state(at);
      State& to = out_[num_laid_out_++];
      to = from;
      from.slots = num_laid_out_;
      to.slots = 0;
      to.more = static_cast<uint32_t>(num_others_);
      if (from.more) pack(at, to);
      if (to.token == kNoToken) return;
      at = to.target;
    }
  }

  // The heaviest edge goes inline. Up to kLinearScan others lie side by side; more fill a hash table, at most two thirds.
  // A table begins with a cache line, and each of its lines is filled from its beginning.
  void pack(int32_t at, State& to) {
    children_.clear();
    automaton_.each_edge(at, [&](int32_t token, int32_t target) {
      const State& child = state(target);
      children_.push_back({token, target, child.weight, child.mark});
    });
    const size_t best =
        static_cast<size_t>(std::min_element(children_.begin(), children_.end(), heavier) - children_.begin());
    to.token = children_[best].token;
    to.target = children_[best].target;
    children_[best] = children_.back();
    children_.pop_back();
    if (children_.size() <= kLinearScan) {
      for (const Child& child : children_) others_[num_others_++] = {child.token, child.target};
    } else {
      pad_to(line_begin(num_others_));
      to.more = static_cast<uint32_t>(num_others_);
      pad_to(num_others_ + table_slots(children_.size()));
      fill_table(others_ + to.more, static_cast<uint32_t>(num_others_) - to.more);
    }
    to.slots = static_cast<uint32_t>(num_others_) - to.more;
  }

  void fill_table(Edge* table, uint32_t slots) const {
    for (const Child& child : children_) {
      uint32_t i = Frozen::home_line(child.token, slots);
      while (table[i].token != kNoToken) i = (i + 1) & (slots - 1);
      table[i] = {child.token, child.target};
    }
  }

  // The first place from `at` on that begins a cache line; the block itself begins one.
  size_t line_begin(size_t at) const {
    const size_t before = (sizeof(BlockHeader) + automaton_.num_states() * sizeof(State)) / sizeof(Edge);
    return (before + at + kLineEdges - 1) / kLineEdges * kLineEdges - before;
  }
  void pad_to(size_t end) {
    std::fill(others_ + num_others_, others_ + end, Edge{kNoToken, 0});
    num_others_ = end;
  }

  int32_t number(int32_t at) const { return static_cast<int32_t>(state(at).slots) - 1; }

  void translate() {
    for (size_t s = 0; s < num_laid_out_; ++s) {
      if (out_[s].link >= 0) out_[s].link = number(out_[s].link);
      if (out_[s].token != kNoToken) out_[s].target = number(out_[s].target);
    }
    for (size_t i = 0; i < num_others_; ++i)
      if (others_[i].token != kNoToken) others_[i].target = number(others_[i].target);
  }

  State& state(int32_t at) const { return automaton_.state(at); }

  SuffixAutomaton& automaton_;
  std::vector<int32_t> by_length_;
  std::vector<Child> children_;
  std::shared_ptr<char> block_;
  State* out_ = nullptr;
  Edge* others_ = nullptr;
  size_t num_others_ = 0;
  uint32_t num_laid_out_ = 0;
};

}  // namespace slipstream
