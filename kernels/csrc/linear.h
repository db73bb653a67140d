// Linear layers over packed weights: out[t, n] = bias[n] + sum_k x[t, k] * weight[n, k].
// Invariant: every output is one chain of fused multiply-adds over k = 0, 1, ..., K - 1 in float32, so it has the same
// bits for every batch it comes in, every draft width, thread count and instruction set. Twin: kernels/linear.py.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "layers.h"
#include "simd.h"
#include "step_threads.h"

namespace slipstream {

constexpr int64_t kPanel = 2 * kWide;  // output columns that lie side by side
constexpr int64_t kDepth = 512;        // of a panel at a time: 64 KiB of float32 stay in the second-level cache
constexpr int64_t kTaskRows = 96;      // rows that one thread takes at a time, a multiple of every tile

inline int64_t num_panels(int64_t n) { return (n + kPanel - 1) / kPanel; }

// [n, k] row by row to [num_panels(n), k, 32]; columns beyond n are zero.
template <typename T>
void pack_linear(const T* weight, int64_t n, int64_t k, T* packed) {
  for (int64_t panel = 0; panel < num_panels(n); ++panel)
    for (int64_t d = 0; d < k; ++d)
      for (int64_t c = 0; c < kPanel; ++c) {
        const int64_t column = panel * kPanel + c;
        packed[(panel * k + d) * kPanel + c] = column < n ? weight[column * k + d] : T{};
      }
}

// x [rows, k], packed as above, bias [n] or null, out [rows, n]; float or Bf16, sums in float.
template <typename T>
struct LinearArgs {
  const T *x, *packed, *bias;
  int64_t rows, n, k;
  T* out;
};

struct LinearPart {
  int64_t first_panel, last_panel, begin, end;  // panels, and rows of x
};

#define SLIPSTREAM_ISA_FILE "linear_isa.inc"
#include "for_each_isa.h"

template <typename T>
void linear_part(Isa isa, const LinearArgs<T>& a, const LinearPart& part) {
  thread_local std::vector<float> sums;
  sums.resize(static_cast<size_t>((part.end - part.begin) * kPanel));
#ifdef SLIPSTREAM_X86
  if (isa == Isa::kAvx512) return avx512::linear_part(a, part, sums.data());
  if (isa == Isa::kAvx2) return avx2::linear_part(a, part, sums.data());
#endif
  plain::linear_part(a, part, sums.data());
}

// task(part) for every part of a product of [rows, k] by [k, n] that is worth `work` operations for up to kTaskRows rows.
// Parts of one size, as many for every thread.
template <typename Task>
void deal_parts(StepThreads* threads, int64_t n, int64_t rows, int64_t work, const Task& task) {
  const int64_t row_tasks = (rows + kTaskRows - 1) / kTaskRows, panels = num_panels(n);
  const int64_t panel_tasks = task_count(threads, work, 1, panels);
  for_each_task(threads, row_tasks * panel_tasks, [&](int64_t i) {
    const int64_t row = i / panel_tasks * kTaskRows, part = i % panel_tasks;
    task(LinearPart{part * panels / panel_tasks, (part + 1) * panels / panel_tasks, row,
                    std::min(rows, row + kTaskRows)});
  });
}

// The weights of one layer, packed. T: float or Bf16.
template <typename T>
class PackedLinear {
 public:
  PackedLinear(int64_t n, int64_t k) : n_(n), k_(k), packed_(static_cast<size_t>(num_panels(n) * kPanel * k)) {}

  int64_t n() const { return n_; }
  int64_t k() const { return k_; }

  // weight [n, k], bias [n] or null.
  void pack(const T* weight, const T* bias) {
    pack_linear(weight, n_, k_, packed_.data());
    bias_.assign(bias, bias == nullptr ? nullptr : bias + n_);
  }

  LinearArgs<T> args(const T* x, int64_t rows, T* out) const {
    return {x, packed_.data(), bias_.empty() ? nullptr : bias_.data(), rows, n_, k_, out};
  }

  void forward(Isa isa, StepThreads* threads, const T* x, int64_t rows, T* out) const {
    const LinearArgs<T> a = args(x, rows, out);
    for_each_part(threads, 1, rows, [&](const LinearPart& part) { linear_part(isa, a, part); });
  }

  // task(part) for every part of `layers` layers of this size.
  template <typename Task>
  void for_each_part(StepThreads* threads, int64_t layers, int64_t rows, const Task& task) const {
    deal_parts(threads, n_, rows, 2 * layers * std::min(rows, kTaskRows) * kPanel * k_ * num_panels(n_), task);
  }

 private:
  int64_t n_, k_;
  std::vector<T> packed_, bias_;
};

// out = silu(out) * scratch in the rows and columns of a part, [rows, n].
inline void multiply_part(Isa isa, const LinearPart& part, int64_t n, const float* scratch, float* out) {
  const int64_t first = part.first_panel * kPanel, last = std::min(part.last_panel * kPanel, n);
  for (int64_t r = part.begin; r < part.end; ++r) silu_mul(isa, out, scratch, out, r * n + first, r * n + last);
}

// out = silu(gate(x)) * up(x), [rows, n]: a thread takes the same columns of both and multiplies them while they are near.
// scratch [rows, n].
inline void gated_linear(Isa isa, StepThreads* threads, const PackedLinear<float>& gate, const PackedLinear<float>& up,
                         const float* x, int64_t rows, float* scratch, float* out) {
  const LinearArgs<float> left = gate.args(x, rows, out), right = up.args(x, rows, scratch);
  gate.for_each_part(threads, 2, rows, [&](const LinearPart& part) {
    linear_part(isa, left, part);
    linear_part(isa, right, part);
    multiply_part(isa, part, gate.n(), scratch, out);
  });
}

}  // namespace slipstream
