// Tree drafts: the continuations of a request's own tiers merged, more probable tokens first (but a token that two of
// them propose passes on its place only once the second is met).
//
// Invariants
// - parents[j] < j, or -1 for a child of the request's last token; siblings carry different tokens.
// - probs[j] is the product of the calibrated probabilities on the path to j, so a node never has a more probable child.
#pragma once
#include <queue>

#include "shared_text.h"

namespace slipstream {

struct TreeRow {
  int32_t* tokens;
  int16_t* parents;
  float* probs;
  int16_t* cells;
  int count = 0;
  int32_t match_len = 0;
  Source source = kSourceNone;
  uint8_t age = 0;
};

class TreeDrafter {
 public:
  // Fills `out` with up to limits.max_tokens nodes of at most `branching` children each.
  void draft(const LiveView& live, int32_t live_at, const FrozenView& frozen, int32_t frozen_at, int frozen_matched,
             int max_candidates, int branching, const Calibration& calibration, const DraftLimits& limits, TreeRow& out) {
    queue_ = {};
    num_pushed_ = 0;
    calibration_ = &calibration;
    limits_ = &limits;
    branching_ = branching;
    start(frozen, frozen_at, frozen_matched, max_candidates);
    start(live, live_at, live.tier.state(live_at).length, max_candidates);
    while (!queue_.empty() && out.count < limits.max_tokens) {
      const Node node = queue_.top();
      queue_.pop();
      if (const int known = find_child(out, node.parent, node.token); known >= 0) {
        // The more probable source came first; what the other knows about the text after the token still counts.
        expand(live, frozen, node, known, out.probs[known]);
        continue;
      }
      if (num_children(out, node.parent) == branching) continue;
      const int at = out.count++;
      out.tokens[at] = node.token;
      out.parents[at] = static_cast<int16_t>(node.parent);
      out.probs[at] = node.prob;
      out.cells[at] = node.cell;
      if (at == 0) {
        out.source = node.source;
        out.age = node.age;
        out.match_len = node.matched;
      }
      expand(live, frozen, node, at, node.prob);
    }
  }

 private:
  struct Node {
    float prob;
    int32_t order;  // of being found: ties go to the first
    int32_t parent, token, target, matched;
    int16_t cell;
    Source source;
    uint8_t age;
    bool is_live;
    bool operator<(const Node& other) const {
      return prob != other.prob ? prob < other.prob : order > other.order;
    }
  };

  template <typename View>
  void start(const View& view, int32_t at, int32_t matched, int max_candidates) {
    for (int tried = 0; tried < max_candidates && matched >= limits_->min_match && at != view.tier.root();) {
      if (view.tier.state(at).token != kNoToken) {
        ++tried;
        push_children(view, at, matched, -1, 1.0f, view.own_end >= 0);
      }
      at = view.tier.state(at).link;
      if (at < 0) return;
      matched = view.tier.state(at).length;
    }
  }

  template <typename View>
  void push_children(const View& view, int32_t at, int32_t matched, int parent, float path, bool is_suffix) {
    best_.clear();
    view.tier.each_edge(at, [&](int32_t token, int32_t target) {
      const State& to = view.tier.state(target);
      best_.push_back({token, target, to.weight, to.mark});
    });
    const size_t count = std::min(best_.size(), static_cast<size_t>(branching_));
    std::partial_sort(best_.begin(), best_.begin() + static_cast<ptrdiff_t>(count), best_.end(), heavier);
    for (size_t i = 0; i < count; ++i) {
      const Child& child = best_[i];
      const float total = std::max(view.tier.state(at).weight - (is_suffix ? 1.0f : 0.0f), child.weight);
      const Source source = view.source(child.mark);
      const uint8_t age = view.age(child.mark);
      const float relative_weight = child.weight / (total + limits_->escape);
      const int16_t cell = cell_of(source_class(source, age), matched, relative_weight);
      const float prob = path * calibration_->probability(cell, relative_weight);
      if (prob < limits_->min_prob) continue;
      queue_.push({prob, num_pushed_++, parent, child.token, child.target, matched, cell, source, age,
                   view.own_end >= 0});
    }
  }

  // Where the text ends, the longest suffix that goes on elsewhere takes over, as in a chain.
  template <typename View>
  void expand_in(const View& view, const Node& node, int parent, float path) {
    int32_t at = node.target, matched = node.matched + 1;
    bool is_suffix = false;
    while (view.tier.state(at).token == kNoToken) {
      is_suffix = at == view.own_end || is_suffix;
      at = view.tier.state(at).link;
      if (at < 0 || view.tier.state(at).length < limits_->min_resume) return;
      matched = view.tier.state(at).length;
    }
    push_children(view, at, matched, parent, path, is_suffix);
  }

  void expand(const LiveView& live, const FrozenView& frozen, const Node& node, int parent, float path) {
    if (node.is_live) expand_in(live, node, parent, path);
    else expand_in(frozen, node, parent, path);
  }

  static int find_child(const TreeRow& out, int parent, int32_t token) {
    for (int i = 0; i < out.count; ++i)
      if (out.parents[i] == parent && out.tokens[i] == token) return i;
    return -1;
  }
  static int num_children(const TreeRow& out, int parent) {
    int count = 0;
    for (int i = 0; i < out.count; ++i) count += out.parents[i] == parent;
    return count;
  }

  std::priority_queue<Node> queue_;
  std::vector<Child> best_;
  const Calibration* calibration_ = nullptr;
  const DraftLimits* limits_ = nullptr;
  int branching_ = 1;
  int32_t num_pushed_ = 0;
};

}  // namespace slipstream
