// From counts to the probability that a draft token is accepted. Twins: drafter/base.py (geometry),
// rollout/acceptance.py (what fills the table).
// Invariant: a cell is a pure function of (source class, match length, relative weight); q holds one probability a cell.
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>

namespace slipstream {

// Twin: SOURCE_NAMES in drafter/base.py.
enum Source : int8_t { kSourceNone = 0, kSelf = 1, kSibling = 2, kHistory = 3, kPrompt = 4, kShared = 5 };

constexpr int kSourceClasses = 8, kMatchBuckets = 8, kWeightBuckets = 12;
constexpr int kNumCells = kSourceClasses * kMatchBuckets * kWeightBuckets;
constexpr int kMaxBucketed = 32;

// History by age: 1, 2, 3 to 4, 5 and more visits.
constexpr std::array<uint8_t, 256> make_history_classes() {
  std::array<uint8_t, 256> out{};
  for (int age = 0; age < 256; ++age) out[age] = static_cast<uint8_t>(age <= 1 ? 4 : age == 2 ? 5 : age <= 4 ? 6 : 7);
  return out;
}
inline constexpr auto kHistoryClass = make_history_classes();

// self, sibling, prompt, shared, then history.
inline int source_class(Source source, uint8_t age) {
  if (source == kSelf) return 0;
  if (source == kSibling) return 1;
  if (source == kPrompt) return 2;
  if (source == kShared) return 3;
  return kHistoryClass[age];
}

// Match lengths 1, 2, 3, 4, to 6, to 10, to 20, more.
constexpr std::array<uint8_t, kMaxBucketed + 1> make_match_buckets() {
  std::array<uint8_t, kMaxBucketed + 1> out{};
  for (int n = 0; n <= kMaxBucketed; ++n)
    out[n] = static_cast<uint8_t>(n <= 1 ? 0 : n <= 4 ? n - 1 : n <= 6 ? 4 : n <= 10 ? 5 : n <= 20 ? 6 : 7);
  return out;
}
inline constexpr auto kMatchBucket = make_match_buckets();

inline int16_t cell_of(int source_class, int match_len, float relative_weight) {
  const int weight = std::clamp(static_cast<int>(relative_weight * kWeightBuckets), 0, kWeightBuckets - 1);
  const int match = kMatchBucket[std::clamp(match_len, 0, kMaxBucketed)];
  return static_cast<int16_t>((source_class * kMatchBuckets + match) * kWeightBuckets + weight);
}

struct Calibration {
  std::array<float, kNumCells> q{};
  bool is_measured = false;  // before that, the relative weight is taken at its word

  float probability(int16_t cell, float relative_weight) const { return is_measured ? q[cell] : relative_weight; }
};

}  // namespace slipstream
