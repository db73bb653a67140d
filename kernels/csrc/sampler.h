// sample_verify on the CPU: Gumbel-max sampling along drafts. Twin: kernels/reference.py (sample_verify).
// Invariant: a request reads its own rows only; nothing here depends on the batch, its order or the draft width.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

#include "philox.h"
#include "simd.h"
#include "step_threads.h"
#include "vector_math.h"

namespace slipstream {

enum Finish : int8_t { kNone = 0, kStop = 1, kLength = 2, kError = 3 };

struct RowParams {
  uint64_t seed, uid;
  float temperature, top_p;
  int32_t top_k;
};

struct Sampled {
  int32_t token;
  float logprob;
  bool ok;
};

// Philox's counter and key besides the block of the vocabulary.
struct NoiseKey {
  uint32_t position, uid_low, uid_high, seed_low, seed_high;
};

// Buffers of one thread. scaled: the vocabulary, rounded up to a multiple of 16.
struct RowScratch {
  explicit RowScratch(int size) : vocab(size), scaled((size + kWide - 1) / kWide * kWide) {}
  int vocab;
  std::vector<float> scaled;
  std::vector<int> order;
  std::vector<std::pair<int, float>> likely;
};

// Writes -inf over what top-k and top-p leave out; the most probable token always stays. Order: falling, the lower index
// first. Only as many tokens as needed are put in order.
inline void keep_likely(RowScratch& scratch, int32_t top_k, float top_p) {
  float* scaled = scratch.scaled.data();
  std::vector<int>& order = scratch.order;
  order.resize(scratch.vocab);
  std::iota(order.begin(), order.end(), 0);
  const auto before = [&](int a, int b) { return scaled[a] > scaled[b] || (scaled[a] == scaled[b] && a < b); };
  size_t sorted = 0;
  const auto sort_first = [&](size_t count) {
    if (count < order.size()) std::nth_element(order.begin() + sorted, order.begin() + count, order.end(), before);
    std::sort(order.begin() + sorted, order.begin() + count, before);
    sorted = count;
  };
  size_t keep = order.size();
  if (top_k > 0) {
    keep = std::min<size_t>(top_k, keep);
    sort_first(keep);
  } else {
    sort_first(std::min<size_t>(64, keep));
  }
  if (top_p < 1.0f) {
    const double peak = scaled[order[0]];
    double total = 0.0, mass = 0.0;
    for (size_t j = 0; j < keep; ++j) total += std::exp(double(scaled[order[j]]) - peak);
    size_t kept = 0;
    for (; kept < keep && mass < double(top_p) * total; ++kept) {
      if (kept == sorted) sort_first(std::min(keep, 4 * sorted));
      mass += std::exp(double(scaled[order[kept]]) - peak);
    }
    keep = kept;
  }
  std::vector<std::pair<int, float>>& likely = scratch.likely;
  likely.clear();
  for (size_t j = 0; j < keep; ++j) likely.emplace_back(order[j], scaled[order[j]]);
  std::fill_n(scaled, scratch.vocab, -std::numeric_limits<float>::infinity());
  for (const auto& [token, value] : likely) scaled[token] = value;
}

#define SLIPSTREAM_ISA_FILE "sampler_isa.inc"
#include "for_each_isa.h"

template <typename T>
Sampled sample_row(Isa isa, const T* logits, const RowParams& row, uint32_t position, RowScratch& scratch) {
#ifdef SLIPSTREAM_X86
  if (isa == Isa::kAvx512) return avx512::sample_row(logits, row, position, scratch);
  if (isa == Isa::kAvx2) return avx2::sample_row(logits, row, position, scratch);
#endif
  return plain::sample_row(logits, row, position, scratch);
}

template <typename T>
struct VerifyArgs {
  const T* logits;  // [rows, vocab]
  int vocab, num_requests;
  const int64_t* offsets;  // [num_requests + 1]
  const int32_t* drafts;   // [rows]
  const int32_t* parents;  // [rows], of trees: the request's row before each, -1 for its first; null: chains
  const uint64_t *seed, *uid;
  const int32_t* position;
  const float *temperature, *top_p;
  const int32_t *top_k, *remaining, *stop_ids, *stop_offsets;
  int32_t* path;    // [rows], of trees: of every new token, the request's row that it was sampled at
  int32_t* tokens;  // [rows]
  float* logprobs;  // [rows]
  int32_t* count;   // [num_requests]
  int8_t* finish;   // [num_requests]
};

// The row, from `after` on, of the child of row `at` that bears `token`; -1: none. Rows count from the request's first.
template <typename T>
int64_t find_child(const VerifyArgs<T>& a, int i, int64_t at, int32_t token) {
  const int64_t first = a.offsets[i], rows = a.offsets[i + 1] - first;
  if (!a.parents) return a.drafts[first + at] == token ? at + 1 : -1;
  for (int64_t row = at + 1; row < rows; ++row)
    if (a.parents[first + row] == at && a.drafts[first + row - 1] == token) return row;
  return -1;
}

template <typename T>
void verify_request(Isa isa, const VerifyArgs<T>& a, int i, RowScratch& scratch) {
  const RowParams row{a.seed[i], a.uid[i], a.temperature[i], a.top_p[i], a.top_k[i]};
  const int32_t *stop_first = a.stop_ids + a.stop_offsets[i], *stop_last = a.stop_ids + a.stop_offsets[i + 1];
  a.count[i] = 0;
  a.finish[i] = kNone;
  for (int64_t at = 0; at >= 0;) {
    const int64_t logits_row = a.offsets[i] + at, out = a.offsets[i] + a.count[i];
    const uint32_t position = static_cast<uint32_t>(a.position[i] + a.count[i]);
    const Sampled drawn = sample_row(isa, a.logits + logits_row * a.vocab, row, position, scratch);
    if (!drawn.ok) {
      a.finish[i] = kError;
      break;
    }
    a.tokens[out] = drawn.token;
    a.logprobs[out] = drawn.logprob;
    if (a.path) a.path[out] = static_cast<int32_t>(at);
    ++a.count[i];
    if (std::find(stop_first, stop_last, drawn.token) != stop_last)
      a.finish[i] = kStop;
    else if (a.count[i] >= a.remaining[i])
      a.finish[i] = kLength;
    if (a.finish[i] != kNone) break;
    at = find_child(a, i, at, drawn.token);
  }
}

template <typename T>
void sample_verify(Isa isa, StepThreads* threads, const VerifyArgs<T>& a) {
  for_each_task(threads, a.num_requests, [&](int64_t i) {
    thread_local std::optional<RowScratch> scratch;
    if (!scratch || scratch->vocab != a.vocab) scratch.emplace(a.vocab);
    verify_request(isa, a, static_cast<int>(i), *scratch);
  });
}

}  // namespace slipstream
