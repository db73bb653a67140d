// Who of one worker's live requests will finish last. Twin: rollout/finish_last.py, which tells the formula.
// Invariants: chances sum to 1; what cannot be computed gives equal shares. For the few dozen requests of an engine: the
// twin's arrays pay only for thousands.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace slipstream {

// Cumulative hazards [rows, bins + 1], linear in the log of the length between edges.
struct HazardTables {
  const float* values;
  int64_t bins;
  float per_bin;

  float at(int64_t row, float tokens) const {
    const float place = std::max(std::log(tokens) * per_bin, 0.0f);
    const int64_t below = static_cast<int64_t>(std::min(place, static_cast<float>(bins - 1)));
    const float* edge = values + row * (bins + 1) + below;
    return edge[0] + (edge[1] - edge[0]) * (place - static_cast<float>(below));
  }
};

struct LiveRow {
  int64_t row;             // of the tables
  float so_far, now;       // tokens, and the hazard there
  float remaining, speed;  // tokens that the limit leaves, tokens a round
};

// Log of the chance that a request is done after `rounds`.
inline float log_done(const HazardTables& tables, const LiveRow& r, float rounds) {
  const float ahead = rounds * r.speed;
  if (ahead >= r.remaining) return 0.0f;
  return std::log(std::max(1.0f - std::exp(r.now - tables.at(r.row, r.so_far + ahead)), 1e-20f));
}

// The place at which rising `values` come to `wanted`, linear between their places.
inline float place_of(const std::vector<double>& values, const std::vector<float>& places, double wanted) {
  const size_t above = static_cast<size_t>(std::lower_bound(values.begin(), values.end(), wanted) - values.begin());
  if (above == 0) return places.front();
  if (above == values.size()) return places.back();
  const double share = (wanted - values[above - 1]) / (values[above] - values[above - 1]);
  return static_cast<float>(places[above - 1] + share * (static_cast<double>(places[above]) - places[above - 1]));
}

// coarse: rising shares of the longest time that any request may take; levels: rising chances that all are done.
inline void finish_last(const HazardTables& tables, const std::vector<LiveRow>& rows, const std::vector<float>& coarse,
                        const std::vector<double>& levels, double* chances) {
  float longest = 0.0f;
  for (const LiveRow& r : rows) longest = std::max(longest, std::max(r.remaining, 1.0f) / r.speed);
  std::vector<float> times(coarse);
  std::vector<double> all_done(coarse.size(), 0.0);
  for (size_t g = 0; g < times.size(); ++g) {
    times[g] *= longest;
    for (const LiveRow& r : rows) all_done[g] += log_done(tables, r, times[g]);
    all_done[g] = std::exp(all_done[g]);
  }
  const size_t fine = levels.size();
  std::vector<float> logs(rows.size() * fine), total(fine, 0.0f);
  for (size_t f = 0; f < fine; ++f) {
    const float rounds = place_of(all_done, times, levels[f]);
    for (size_t i = 0; i < rows.size(); ++i) total[f] += logs[i * fine + f] = log_done(tables, rows[i], rounds);
  }
  double sum = 0.0;
  for (size_t i = 0; i < rows.size(); ++i) {
    const float* mine = logs.data() + i * fine;
    float chance = 0.0f, done = 0.0f, others = 0.0f;
    for (size_t f = 0; f < fine; ++f) {
      const float next = std::exp(mine[f]), rest = std::exp(total[f] - mine[f]);
      if (f > 0) chance += (next - done) * (rest + others) / 2;
      done = next;
      others = rest;
    }
    chance += 1.0f - done;  // what lies beyond the span ends after everybody else has
    chances[i] = std::isfinite(chance) ? std::max(chance, 0.0f) : 0.0;
    sum += chances[i];
  }
  for (size_t i = 0; i < rows.size(); ++i) chances[i] = sum > 1e-12 ? chances[i] / sum : 1.0 / static_cast<double>(rows.size());
}

}  // namespace slipstream
