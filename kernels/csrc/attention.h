// Ragged causal attention over the slot cache, float32. Twin: kernels/reference.py (append_kv, ragged_attention).
// Invariant: the sums of a token depend on its own slot and position only (lanes are positions modulo 16, blocks in
// rising order), so its output is the same to the bit for every batch, draft width and prefill chunk. Tokens of a draft
// tree lie at other places than their positions: they are summed in the order of positions all the same.
#pragma once
#include <algorithm>
#include <array>
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

// Moves tokens to other places of their slots, in the given order: a place may be read before it is written.
inline void move_kv(const CacheShape& s, float* keys, float* values, int64_t count, const int64_t* slots,
                    const int64_t* from, const int64_t* to) {
  for (int64_t i = 0; i < count; ++i)
    for (int64_t h = 0; h < s.kv_heads; ++h) {
      const int64_t base = s.head_at(slots[i], h);
      const float* source = keys + base + from[i] / kWide * s.head_dim * kWide + from[i] % kWide;
      float* target = keys + base + to[i] / kWide * s.head_dim * kWide + to[i] % kWide;
      for (int64_t d = 0; d < s.head_dim; ++d) target[d * kWide] = source[d * kWide];
      std::copy_n(values + base + from[i] * s.head_dim, s.head_dim, values + base + to[i] * s.head_dim);
    }
}

constexpr int kMostQueries = 8;      // queries that share what they read of the cache
constexpr int64_t kTaskTokens = 16;  // tokens that are worked on at a time, at most

// One query: where it lies, where its result goes, and its positions start .. end - 1. Those below `branch` lie at their
// own places; position end - 1 - i lies at back[i]. No place is beyond `places`.
struct QueryPlace {
  const float* query;
  float* out;
  int64_t start, end, branch, places;
  const int64_t* back;
  int64_t place_of(int64_t position) const { return position < branch ? position : back[end - 1 - position]; }
};

struct AttentionArgs {
  CacheShape shape;
  int64_t num_tokens, num_heads;
  Rows query;                          // [num_tokens, num_heads, head_dim]
  const float *keys, *values;
  const int64_t *slots, *places;       // [num_tokens]
  const int64_t *positions, *parents;  // [num_tokens], null without trees; parents: the token before, in this pass, of
                                       // every token whose place is not its position
  const int64_t *prefix_slots, *prefix_lens;  // [slots], null: every slot reads its own; else it reads positions below
                                              // prefix_lens[slot] where prefix_slots[slot] has them
  float scale, softcap;                // softcap 0: none
  int64_t window;                      // 0: unbounded
  float* out;                          // [num_tokens, num_heads, head_dim]
};

// Where a key-value head of a slot begins, and of the slot that holds its first `shared` positions.
struct HeadBase {
  int64_t own, prefix, shared;
};

inline HeadBase head_base(const AttentionArgs& a, int64_t slot, int64_t head) {
  const int64_t own = a.shape.head_at(slot, head), shared = a.prefix_lens ? a.prefix_lens[slot] : 0;
  return {own, shared > 0 ? a.shape.head_at(a.prefix_slots[slot], head) : own, shared};
}

// Follows the tree back from a token until places are positions again; returns the first position that is not.
inline int64_t find_back(const AttentionArgs& a, int64_t token, std::vector<int64_t>& back) {
  back.clear();
  int64_t position = a.positions[token];
  for (int64_t at = token; a.places[at] != position; at = a.parents[at], --position) back.push_back(a.places[at]);
  return position + 1;
}

// Buffers of one thread. back: of every token of a task, see QueryPlace.
struct AttentionScratch {
  std::vector<float> scores;
  std::array<std::vector<int64_t>, kTaskTokens> back;
};

#define SLIPSTREAM_ISA_FILE "attention_isa.inc"
#include "for_each_isa.h"

inline void attend_tokens(Isa isa, const AttentionArgs& a, int64_t begin, int64_t end) {
  thread_local AttentionScratch scratch;
  scratch.scores.resize(static_cast<size_t>(kMostQueries * a.shape.length()));
#ifdef SLIPSTREAM_X86
  if (isa == Isa::kAvx512) return avx512::attend_tokens(a, begin, end, scratch);
  if (isa == Isa::kAvx2) return avx2::attend_tokens(a, begin, end, scratch);
#endif
  plain::attend_tokens(a, begin, end, scratch);
}

// The first token of the slot's own around `token`, which share what they read of the cache, unless they are many.
inline int64_t run_start(const AttentionArgs& a, int64_t token) {
  int64_t first = token;
  while (token < a.num_tokens && first > 0 && a.slots[first - 1] == a.slots[token]) {
    if (token - first == kTaskTokens) return token;
    --first;
  }
  return first;
}

inline void ragged_attention(Isa isa, StepThreads* threads, const AttentionArgs& a) {
  int64_t read = 0;
  for (int64_t t = 0; t < a.num_tokens; ++t)
    read += a.window > 0 ? std::min(a.places[t] + 1, a.window) : a.places[t] + 1;
  const int64_t work = 4 * read * a.num_heads * a.shape.head_dim;  // operations of all tokens
  const int64_t tasks = task_count(threads, work, (a.num_tokens + kTaskTokens - 1) / kTaskTokens, a.num_tokens);
  const auto first = [&](int64_t task) { return run_start(a, task * a.num_tokens / tasks); };
  for_each_task(threads, tasks, [&](int64_t task) {
    for (int64_t from = first(task), end = first(task + 1), to; from < end; from = to) {
      to = std::min(end, from + kTaskTokens);
      attend_tokens(isa, a, from, to);
    }
  });
}

}  // namespace slipstream
