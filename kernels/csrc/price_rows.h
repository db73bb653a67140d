// What a step's price and its drafts depend on, row by row of the live requests.
// Twins: rollout/price_rows.py. Invariant: a row depends on its own numbers and on those of the batch as a whole; what is
// no number gives the defined value of the twin.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

namespace slipstream {

// The per-slot numbers of a table; accepted [slots, sources].
struct SlotCounts {
  const int64_t *rounds, *drafted, *accepted;
  int64_t num_sources;
};

// A request that has had no round yet is taken for one with `rounds` rounds of these tokens each.
struct RatePrior {
  double rounds, drafted, accepted;
};

// Tokens gained (at least 1) and draft tokens verified per round.
inline void round_rates(const SlotCounts& counts, const RatePrior& prior, int64_t slot, float& speed, double& width) {
  int64_t accepted = 0;
  for (int64_t s = 0; s < counts.num_sources; ++s) accepted += counts.accepted[slot * counts.num_sources + s];
  const double rounds = static_cast<double>(counts.rounds[slot]) + prior.rounds;
  speed = static_cast<float>(1.0 + (static_cast<double>(accepted) + prior.rounds * prior.accepted) / rounds);
  width = (static_cast<double>(counts.drafted[slot]) + prior.rounds * prior.drafted) / rounds;
}

// See PriceBudget in rollout/budget.py.
struct RowPrice {
  double base, tok, num_live, num_queued, hedge, margin;
};

inline float least_probability(const RowPrice& p, double chance, double speed, double width) {
  const double rows = std::max(p.num_live, 1.0), waiting = p.num_queued / (p.num_queued + rows);
  const double mixed = (1.0 - p.hedge) * chance + p.hedge / rows;
  const double last = (1.0 - waiting) * (mixed == mixed ? mixed : 0.0) + waiting / rows;
  const double spent = p.base * last + p.tok * (1.0 + width);
  if (!(spent > 0.0)) return 0.0f;  // tokens are free
  const double least = p.tok * speed / spent;
  return static_cast<float>(std::min(p.margin * (least <= 1.0 ? std::max(least, 0.0) : 1.0), 1.0));
}

// A reliability curve made strictly rising, and its inverse; see AcceptanceModel.estimates_for. curve [3, buckets].
class InverseCurve {
 public:
  static constexpr int64_t kMostBuckets = 64;

  InverseCurve(const double* curve, int64_t buckets, double prior_tokens) : points_(buckets + 2) {
    double highest = 0.0;
    for (int64_t i = 0; i < buckets; ++i) {
      const double middle = prior_tokens * (static_cast<double>(i) + 0.5) / static_cast<double>(buckets);
      const double count = curve[i] + prior_tokens;
      highest = std::max(highest, (curve[2 * buckets + i] + middle) / count);
      share_[i + 1] = std::clamp(highest, 0.0, 1.0) + 1e-9 * static_cast<double>(i);
      estimate_[i + 1] = (curve[buckets + i] + middle) / count;
    }
    share_[0] = estimate_[0] = 0.0;
    share_[buckets + 1] = 1.0 + 1e-6;
    estimate_[buckets + 1] = 1.0;
  }

  float at(float probability) const {
    const double wanted = probability;
    if (!(wanted > share_[0])) return wanted == wanted ? static_cast<float>(estimate_[0]) : probability;
    const int64_t above = std::upper_bound(share_, share_ + points_, wanted) - share_;
    if (above == points_) return static_cast<float>(estimate_[points_ - 1]);
    const double slope = (estimate_[above] - estimate_[above - 1]) / (share_[above] - share_[above - 1]);
    return static_cast<float>(slope * (wanted - share_[above - 1]) + estimate_[above - 1]);
  }

 private:
  const int64_t points_;
  double share_[kMostBuckets + 2], estimate_[kMostBuckets + 2];
};

}  // namespace slipstream
