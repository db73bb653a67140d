// Ragged causal attention over the slot cache, float32. Twin: kernels/reference.py (append_kv, ragged_attention).
// Invariant: the sums of a token run over positions in rising order, whatever else is in the batch, so its output is
// the same to the bit for every batch, draft width and prefill chunk.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "vector_math.h"

namespace slipstream {

struct CacheShape {
  int64_t slots, kv_heads, head_dim, length;  // keys [slots, kv_heads, head_dim, length], values [.., length, head_dim]
};

inline void append_kv(const CacheShape& s, float* keys, float* values, const float* new_keys, const float* new_values,
                      int64_t num_tokens, const int64_t* slots, const int64_t* positions) {
  for (int64_t t = 0; t < num_tokens; ++t)
    for (int64_t h = 0; h < s.kv_heads; ++h) {
      const int64_t base = (slots[t] * s.kv_heads + h) * s.head_dim * s.length;
      const float* key = new_keys + (t * s.kv_heads + h) * s.head_dim;
      const float* value = new_values + (t * s.kv_heads + h) * s.head_dim;
      float* key_column = keys + base + positions[t];
      for (int64_t d = 0; d < s.head_dim; ++d) key_column[d * s.length] = key[d];
      std::copy(value, value + s.head_dim, values + base + positions[t] * s.head_dim);
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

// Scores, softmax and weighted sum of one query head over `n` positions whose keys start at `key` (row stride
// `stride`). `scores` holds n floats.
SLIPSTREAM_CLONES inline void attend_head(const float* query, const float* key, const float* value, int64_t n,
                                          int64_t stride, int64_t dim, float scale, float softcap, float* scores,
                                          float* out) {
  for (int64_t j = 0; j < n; ++j) scores[j] = 0.0f;
  for (int64_t d = 0; d < dim; ++d) {
    const float q = query[d] * scale;
    const float* row = key + d * stride;
    for (int64_t j = 0; j < n; ++j) scores[j] += q * row[j];
  }
  if (softcap > 0.0f)
    for (int64_t j = 0; j < n; ++j) scores[j] = softcap * std::tanh(scores[j] / softcap);
  float peak = -std::numeric_limits<float>::infinity();
  for (int64_t j = 0; j < n; ++j) peak = scores[j] > peak ? scores[j] : peak;
  for (int64_t j = 0; j < n; ++j) scores[j] = exp_nonpositive(scores[j] - peak);
  float mass = 0.0f;
  for (int64_t j = 0; j < n; ++j) mass += scores[j];
  for (int64_t d = 0; d < dim; ++d) out[d] = 0.0f;
  for (int64_t j = 0; j < n; ++j) {
    const float weight = scores[j];
    const float* row = value + j * dim;
    for (int64_t d = 0; d < dim; ++d) out[d] += weight * row[d];
  }
  const float inverse = 1.0f / mass;
  for (int64_t d = 0; d < dim; ++d) out[d] *= inverse;
}

inline void ragged_attention(const AttentionArgs& a) {
  const CacheShape& s = a.shape;
  const int64_t per_kv = a.num_heads / s.kv_heads;
  std::vector<float> scores(s.length);
  for (int64_t t = 0; t < a.num_tokens; ++t) {
    const int64_t end = a.positions[t] + 1;
    const int64_t start = a.window > 0 ? std::max<int64_t>(0, end - a.window) : 0;
    for (int64_t h = 0; h < a.num_heads; ++h) {
      const int64_t base = (a.slots[t] * s.kv_heads + h / per_kv) * s.head_dim * s.length;
      const int64_t at = (t * a.num_heads + h) * s.head_dim;
      attend_head(a.query + at, a.keys + base + start, a.values + base + start * s.head_dim, end - start, s.length,
                  s.head_dim, a.scale, a.softcap, scores.data(), a.out + at);
    }
  }
}

}  // namespace slipstream
