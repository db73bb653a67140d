// sample_verify on the CPU: Gumbel-max sampling along drafts. Twin: kernels/reference.py (sample_verify).
// Invariant: a request reads its own rows only; nothing here depends on the batch, its order or the draft width.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "philox.h"
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

class Sampler {
 public:
  explicit Sampler(int vocab) : vocab_(vocab), scaled_(vocab) {}

  Sampled sample(const float* logits, const RowParams& row, uint32_t position) {
    float peak = -std::numeric_limits<float>::infinity();
    int best = 0;
    bool bad = false;
    for (int v = 0; v < vocab_; ++v) {
      bad |= std::isnan(logits[v]);
      if (logits[v] > peak) {
        peak = logits[v];
        best = v;
      }
    }
    if (bad || !std::isfinite(peak)) return {0, 0.0f, false};
    if (row.temperature == 0.0f) return {best, 0.0f, true};
    scale(logits, row.temperature);
    const bool filtered = row.top_k > 0 || row.top_p < 1.0f;
    if (filtered) filter(row.top_k, row.top_p);
    const float top = scaled_[best];
    const int token = argmax_noisy(row, position);
    const double mass = mass_below(top);
    return {token, static_cast<float>(double(scaled_[token]) - double(top) - std::log(mass)), true};
  }

 private:
  static constexpr int kSumBlock = 1024;

  SLIPSTREAM_CLONES void scale(const float* logits, float temperature) {
    for (int v = 0; v < vocab_; ++v) scaled_[v] = logits[v] / temperature;
  }

  // sum of exp(scaled - top); lanes are summed in float over a few hundred terms, then in double.
  SLIPSTREAM_CLONES double mass_below(float top) const {
    double mass = 0.0;
    for (int first = 0; first < vocab_; first += kSumBlock) {
      const int last = std::min(vocab_, first + kSumBlock);
      Lanes sum = {};
      int v = first;
      for (; v + kLanes <= last; v += kLanes) {
        Lanes x;
        load(x, scaled_.data() + v);
        x -= top;
        exp_nonpositive(x);
        sum += x;
      }
      if (v < last) {
        Lanes x = Lanes{} - std::numeric_limits<float>::infinity();
        for (int i = 0; v + i < last; ++i) x[i] = scaled_[v + i] - top;
        exp_nonpositive(x);
        sum += x;
      }
      mass += lane_sum(sum);
    }
    return mass;
  }

  // Removes what top-k and top-p leave out by writing -inf; the most probable token always stays.
  void filter(int32_t top_k, float top_p) {
    order_.resize(vocab_);
    std::iota(order_.begin(), order_.end(), 0);
    std::stable_sort(order_.begin(), order_.end(), [&](int a, int b) { return scaled_[a] > scaled_[b]; });
    size_t keep = top_k > 0 ? std::min<size_t>(top_k, order_.size()) : order_.size();
    if (top_p < 1.0f) {
      const double peak = scaled_[order_[0]];
      double total = 0.0;
      for (size_t j = 0; j < keep; ++j) total += std::exp(double(scaled_[order_[j]]) - peak);
      double before = 0.0;
      size_t kept = 0;
      for (; kept < keep && before < double(top_p) * total; ++kept)
        before += std::exp(double(scaled_[order_[kept]]) - peak);
      keep = kept;
    }
    for (size_t j = keep; j < order_.size(); ++j) scaled_[order_[j]] = -std::numeric_limits<float>::infinity();
  }

  // argmax of scaled + noise; the two logarithms run only for tokens whose bound can still win.
  int argmax_noisy(const RowParams& row, uint32_t position) const {
    const uint32_t uid_low = static_cast<uint32_t>(row.uid), uid_high = static_cast<uint32_t>(row.uid >> 32);
    const uint32_t key_low = static_cast<uint32_t>(row.seed), key_high = static_cast<uint32_t>(row.seed >> 32);
    float best = -std::numeric_limits<float>::infinity();
    int token = 0;
    for (int block = 0; block * 4 < vocab_; ++block) {
      const Word4 bits = philox4x32({static_cast<uint32_t>(block), position, uid_low, uid_high}, key_low, key_high);
      const int last = std::min(4, vocab_ - block * 4);
      for (int i = 0; i < last; ++i) {
        const int v = block * 4 + i;
        if (!(scaled_[v] + gumbel_bound(bits[i]) > best)) continue;
        const float noisy = scaled_[v] + gumbel_from_bits(bits[i]);
        if (noisy > best) {
          best = noisy;
          token = v;
        }
      }
    }
    return token;
  }

  int vocab_;
  std::vector<float> scaled_;
  std::vector<int> order_;
};

struct VerifyArgs {
  const float* logits;  // [rows, vocab]
  int vocab, num_requests;
  const int64_t* offsets;  // [num_requests + 1]
  const int32_t* drafts;   // [rows]
  const uint64_t *seed, *uid;
  const int32_t* position;
  const float *temperature, *top_p;
  const int32_t *top_k, *remaining, *stop_ids, *stop_offsets;
  int32_t* tokens;  // [rows]
  float* logprobs;  // [rows]
  int32_t* count;   // [num_requests]
  int8_t* finish;   // [num_requests]
};

inline void sample_verify(const VerifyArgs& a) {
  Sampler sampler(a.vocab);
  for (int i = 0; i < a.num_requests; ++i) {
    const RowParams row{a.seed[i], a.uid[i], a.temperature[i], a.top_p[i], a.top_k[i]};
    const int32_t *stop_first = a.stop_ids + a.stop_offsets[i], *stop_last = a.stop_ids + a.stop_offsets[i + 1];
    a.count[i] = 0;
    a.finish[i] = kNone;
    for (int64_t j = a.offsets[i]; j < a.offsets[i + 1]; ++j) {
      const uint32_t position = static_cast<uint32_t>(a.position[i] + (j - a.offsets[i]));
      const Sampled drawn = sampler.sample(a.logits + j * a.vocab, row, position);
      if (!drawn.ok) {
        a.finish[i] = kError;
        break;
      }
      a.tokens[j] = drawn.token;
      a.logprobs[j] = drawn.logprob;
      ++a.count[i];
      if (std::find(stop_first, stop_last, drawn.token) != stop_last)
        a.finish[i] = kStop;
      else if (a.count[i] >= a.remaining[i])
        a.finish[i] = kLength;
      if (a.finish[i] != kNone || drawn.token != a.drafts[j]) break;
    }
  }
}

}  // namespace slipstream
