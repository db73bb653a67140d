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
  void draft(const LiveView& live, const Frozen& frozen, int32_t frozen_at, int frozen_matched, int max_candidates,
             int branching, const Calibration& calibration, const DraftLimits& limits, TreeRow& out) {
    queue_ = {};
    groups_.clear();
    num_pushed_ = 0;
    calibration_ = &calibration;
    limits_ = &limits;
    branching_ = branching;
    start(frozen, frozen_at, frozen_matched, max_candidates);
    start(live, max_candidates);
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
  // target: in the live tier the number of a group of places that bear the token, else the state after it.
  struct Node {
    float prob;
    int32_t order;  // of being found: ties go to the first
    int32_t parent, token, target, matched;
    int16_t cell;
    Source source;
    uint8_t age;
    bool operator<(const Node& other) const {
      return prob != other.prob ? prob < other.prob : order > other.order;
    }
  };

  void start(const Frozen& tier, int32_t at, int32_t matched, int max_candidates) {
    for (int tried = 0; tried < max_candidates && matched >= limits_->min_match && at != kFrozenRoot;) {
      if (tier.state(at).token != kNoToken) {
        ++tried;
        push_children(tier, at, matched, -1, 1.0f);
      }
      at = tier.state(at).link;
      if (at < 0) return;
      matched = tier.state(at).length;
    }
  }
  void start(const LiveView& view, int max_candidates) {
    view.tier.find(view.own_end, limits_->min_match, places_);
    int matched = kMaxMatch + 1;
    for (int tried = 0; tried < max_candidates && (matched = places_.longest_below(matched)); ++tried)
      push_children(view, Group::of(places_, matched), matched, -1, 1.0f);
  }

  void push(const Child& child, float total, int32_t matched, int parent, float path, Source source, uint8_t age) {
    const float relative_weight = child.weight / (total + limits_->escape);
    const int16_t cell = cell_of(source_class(source, age), matched, relative_weight);
    const float prob = path * calibration_->probability(cell, relative_weight);
    if (prob < limits_->min_prob) return;
    queue_.push({prob, num_pushed_++, parent, child.token, child.target, matched, cell, source, age});
  }

  size_t sort_best() {
    const size_t count = std::min(best_.size(), static_cast<size_t>(branching_));
    std::partial_sort(best_.begin(), best_.begin() + static_cast<ptrdiff_t>(count), best_.end(), heavier);
    return count;
  }

  void push_children(const Frozen& tier, int32_t at, int32_t matched, int parent, float path) {
    best_.clear();
    tier.each_edge(at, [&](int32_t token, int32_t target) {
      const State& to = tier.state(target);
      best_.push_back({token, target, to.weight, to.mark});
    });
    for (size_t i = 0, count = sort_best(); i < count; ++i)
      push(best_[i], std::max(tier.state(at).weight, best_[i].weight), matched, parent, path, kHistory,
           tier.age(best_[i].mark));
  }

  void push_children(const LiveView& view, const Group& group, int32_t matched, int parent, float path) {
    best_.clear();
    for (int i = 0; i < group.count; ++i) {
      const int32_t token = view.tier.token(group.at[i]);
      const auto known = std::find_if(best_.begin(), best_.end(), [&](const Child& c) { return c.token == token; });
      if (known == best_.end()) best_.push_back({token, i, 1.0f, -i});  // the latest place comes first
      else known->weight += 1.0f;
    }
    for (size_t i = 0, count = sort_best(); i < count; ++i) {
      Child child = best_[i];
      const Source source = view.source(group.at[child.target]);
      child.target = static_cast<int32_t>(groups_.size());
      groups_.push_back(group);
      push(child, static_cast<float>(group.count), matched, parent, path, source, 0);
    }
  }

  // Where the text ends, the longest suffix that goes on elsewhere takes over, as in a chain.
  void expand(const LiveView& live, const Frozen& frozen, const Node& node, int parent, float path) {
    int32_t matched = node.matched + 1;
    if (node.source == kHistory) {
      int32_t at = node.target;
      while (frozen.state(at).token == kNoToken) {
        at = frozen.state(at).link;
        if (at < 0 || frozen.state(at).length < limits_->min_resume) return;
        matched = frozen.state(at).length;
      }
      return push_children(frozen, at, matched, parent, path);
    }
    Group group = groups_[static_cast<size_t>(node.target)];
    const uint32_t end = group.pass(live.tier, node.token);
    if (!group.count) {
      live.tier.find(end, limits_->min_resume, places_);
      if (!(matched = places_.longest_below(kMaxMatch + 1))) return;
      group = Group::of(places_, matched);
    }
    push_children(live, group, matched, parent, path);
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
  std::vector<Group> groups_;
  Places places_;
  const Calibration* calibration_ = nullptr;
  const DraftLimits* limits_ = nullptr;
  int branching_ = 1;
  int32_t num_pushed_ = 0;
};

}  // namespace slipstream
