// Ragged causal attention over the slot cache, float32. Twin: kernels/reference.py (append_kv, ragged_attention).
// Invariant: the sums of a token depend on its own slot and position only (lanes are positions modulo 16, blocks in
// rising order), so its output is the same to the bit for every batch, draft width and prefill chunk.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "vector_math.h"

namespace slipstream {

// keys [slots, kv_heads, blocks, head_dim, 16]: a block's 16 positions are the lanes, so a score needs no horizontal
// sum and a new key touches one block. values [slots, kv_heads, blocks * 16, head_dim].
struct CacheShape {
  int64_t slots, kv_heads, blocks, head_dim;
  int64_t length() const { return blocks * kLanes; }
  int64_t head_at(int64_t slot, int64_t head) const { return (slot * kv_heads + head) * length() * head_dim; }
};

inline void append_kv(const CacheShape& s, float* keys, float* values, const float* new_keys, const float* new_values,
                      int64_t num_tokens, const int64_t* slots, const int64_t* positions) {
  for (int64_t t = 0; t < num_tokens; ++t) {
    const int64_t block = positions[t] / kLanes, lane = positions[t] % kLanes;
    for (int64_t h = 0; h < s.kv_heads; ++h) {
      const float* key = new_keys + (t * s.kv_heads + h) * s.head_dim;
      const float* value = new_values + (t * s.kv_heads + h) * s.head_dim;
      const int64_t base = s.head_at(slots[t], h);
      float* column = keys + base + block * s.head_dim * kLanes + lane;
      for (int64_t d = 0; d < s.head_dim; ++d) column[d * kLanes] = key[d];
      std::copy(value, value + s.head_dim, values + base + positions[t] * s.head_dim);
    }
  }
}

struct AttentionArgs {
  CacheShape shape;
  int64_t num_tokens, num_heads;
  const float *query, *keys, *values;  // query [num_tokens, num_heads, head_dim]
  const int64_t *slots, *positions;    // [num_tokens]
  float scale, softcap;                // softcap 0: none
  int64_t window;                      // 0: unbounded
  float* out;                          // [num_tokens, num_heads, head_dim]
};

// Scores of one query over the blocks first..last, positions outside [start, end) at -inf.
SLIPSTREAM_INLINE void block_scores(const float* query, const float* keys, int64_t start, int64_t end, int64_t dim,
                                    float scale, float softcap, float* scores) {
  const int64_t first = start / kLanes, last = (end - 1) / kLanes;
  for (int64_t b = first; b <= last; ++b) {
    const float* block = keys + b * dim * kLanes;
    Lanes sum = {};
    for (int64_t d = 0; d < dim; ++d) {
      Lanes column;
      load(column, block + d * kLanes);
      sum += column * query[d];
    }
    store(scores + (b - first) * kLanes, sum * scale);
  }
  const int64_t count = (last - first + 1) * kLanes, skipped = start - first * kLanes;
  if (softcap > 0.0f)
    for (int64_t j = 0; j < count; ++j) scores[j] = softcap * std::tanh(scores[j] / softcap);
  const float hidden = -std::numeric_limits<float>::infinity();
  std::fill(scores, scores + skipped, hidden);
  std::fill(scores + (end - first * kLanes), scores + count, hidden);
}

// Turns scores into unnormalised weights in place; returns their sum.
SLIPSTREAM_INLINE float softmax_weights(float* scores, int64_t count) {
  Lanes peak, v, mass = {};
  load(peak, scores);
  for (int64_t j = kLanes; j < count; j += kLanes) {
    load(v, scores + j);
    peak = v > peak ? v : peak;
  }
  const float top = lane_max(peak);
  for (int64_t j = 0; j < count; j += kLanes) {
    load(v, scores + j);
    v -= top;
    exp_nonpositive(v);
    mass += v;
    store(scores + j, v);
  }
  return lane_sum(mass);
}

// out = sum_j weights[j] * values[j] / mass, two chains per 16 components to hide the latency of the additions.
SLIPSTREAM_INLINE void weighted_sum(const float* weights, const float* values, int64_t n, int64_t dim, float mass,
                                    float* out) {
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) {
    Lanes even = {}, odd = {}, row;
    int64_t j = 0;
    for (; j + 1 < n; j += 2) {
      load(row, values + j * dim + d);
      even += row * weights[j];
      load(row, values + (j + 1) * dim + d);
      odd += row * weights[j + 1];
    }
    if (j < n) {
      load(row, values + j * dim + d);
      even += row * weights[j];
    }
    store(out + d, (even + odd) / mass);
  }
  for (; d < dim; ++d) {
    float sum = 0.0f;
    for (int64_t j = 0; j < n; ++j) sum += weights[j] * values[j * dim + d];
    out[d] = sum / mass;
  }
}

SLIPSTREAM_CLONES inline void attend_tokens(const AttentionArgs& a, float* scores) {
  const CacheShape& s = a.shape;
  const int64_t per_kv = a.num_heads / s.kv_heads;
  for (int64_t t = 0; t < a.num_tokens; ++t) {
    const int64_t end = a.positions[t] + 1;
    const int64_t start = a.window > 0 ? std::max<int64_t>(0, end - a.window) : 0;
    const int64_t aligned = start / kLanes * kLanes, count = (end - aligned + kLanes - 1) / kLanes * kLanes;
    for (int64_t h = 0; h < a.num_heads; ++h) {
      const int64_t base = s.head_at(a.slots[t], h / per_kv), at = (t * a.num_heads + h) * s.head_dim;
      block_scores(a.query + at, a.keys + base, start, end, s.head_dim, a.scale, a.softcap, scores);
      const float mass = softmax_weights(scores, count);
      weighted_sum(scores, a.values + base + aligned * s.head_dim, end - aligned, s.head_dim, mass, a.out + at);
    }
  }
}

inline void ragged_attention(const AttentionArgs& a) {
  std::vector<float> scores(a.shape.length());
  attend_tokens(a, scores.data());
}

}  // namespace slipstream
