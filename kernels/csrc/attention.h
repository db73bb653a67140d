// Ragged causal attention over the slot cache, float32. Twin: kernels/reference.py (append_kv, ragged_attention).
// Invariant: the sums of a token depend on its own slot and position only (lanes are positions modulo 16, blocks in
// rising order), so its output is the same to the bit for every batch, draft width and prefill chunk.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "simd.h"
#include "step_threads.h"
#include "vector_math.h"

namespace slipstream {

// keys [slots, kv_heads, blocks, head_dim, 16]: a block's 16 positions are the lanes, so a score needs no horizontal
// sum and a new key touches one block. values [slots, kv_heads, blocks * 16, head_dim].
struct CacheShape {
  int64_t slots, kv_heads, blocks, head_dim;
  int64_t length() const { return blocks * kWide; }
  int64_t head_at(int64_t slot, int64_t head) const { return (slot * kv_heads + head) * length() * head_dim; }
};

// Rows [tokens, heads, dim] as the model made them: the last axis side by side, the others at any distance in floats.
struct Rows {
  const float* data;
  int64_t token, head;
  const float* at(int64_t t, int64_t h) const { return data + t * token + h * head; }
};

inline void append_kv(const CacheShape& s, float* keys, float* values, const Rows& new_keys, const Rows& new_values,
                      int64_t num_tokens, const int64_t* slots, const int64_t* positions) {
  for (int64_t t = 0; t < num_tokens; ++t) {
    const int64_t block = positions[t] / kWide, lane = positions[t] % kWide;
    for (int64_t h = 0; h < s.kv_heads; ++h) {
      const float *key = new_keys.at(t, h), *value = new_values.at(t, h);
      const int64_t base = s.head_at(slots[t], h);
      float* column = keys + base + block * s.head_dim * kWide + lane;
      for (int64_t d = 0; d < s.head_dim; ++d) column[d * kWide] = key[d];
      std::copy(value, value + s.head_dim, values + base + positions[t] * s.head_dim);
    }
  }
}

constexpr int kMostQueries = 4;      // queries that share what they read of the cache
constexpr int64_t kTaskTokens = 16;  // tokens that one thread takes at a time, at most

// One query: where it lies, where its result goes, and its positions start .. end - 1.
struct QueryPlace {
  const float* query;
  float* out;
  int64_t start, end;
};

struct AttentionArgs {
  CacheShape shape;
  int64_t num_tokens, num_heads;
  Rows query;                          // [num_tokens, num_heads, head_dim]
  const float *keys, *values;
  const int64_t *slots, *positions;    // [num_tokens]
  float scale, softcap;                // softcap 0: none
  int64_t window;                      // 0: unbounded
  float* out;                          // [num_tokens, num_heads, head_dim]
};

#define SLIPSTREAM_ISA_FILE "attention_isa.inc"
#include "for_each_isa.h"

inline void attend_tokens(Isa isa, const AttentionArgs& a, int64_t begin, int64_t end) {
  thread_local std::vector<float> scores;
  scores.resize(static_cast<size_t>(kMostQueries * a.shape.length()));
#ifdef SLIPSTREAM_X86
  if (isa == Isa::kAvx512) return avx512::attend_tokens(a, begin, end, scores.data());
  if (isa == Isa::kAvx2) return avx2::attend_tokens(a, begin, end, scores.data());
#endif
  plain::attend_tokens(a, begin, end, scores.data());
}

inline void ragged_attention(Isa isa, StepThreads* threads, const AttentionArgs& a) {
  int64_t read = 0;
  for (int64_t t = 0; t < a.num_tokens; ++t)
    read += a.window > 0 ? std::min(a.positions[t] + 1, a.window) : a.positions[t] + 1;
  const int64_t work = 4 * read * a.num_heads * a.shape.head_dim;  // operations of all tokens
  const int64_t tokens = std::clamp<int64_t>(kTaskWork * a.num_tokens / std::max<int64_t>(work, 1), 1, kTaskTokens);
  for_each_task(threads, (a.num_tokens + tokens - 1) / tokens, [&](int64_t task) {
    attend_tokens(isa, a, task * tokens, std::min(a.num_tokens, (task + 1) * tokens));
  });
}

}  // namespace slipstream
