// RMS norm and gated SiLU in one pass over their inputs, float32. Twins: kernels/layers.py.
// Invariant: a row's bits depend on the row alone.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "simd.h"
#include "step_threads.h"
#include "vector_math.h"

namespace slipstream {

struct NormArgs {
  const float *x, *weight;  // [rows, dim], [dim]
  int64_t rows, dim;
  float epsilon;
  float* out;
};

#define SLIPSTREAM_ISA_FILE "layers_isa.inc"
#include "for_each_isa.h"

constexpr int64_t kTaskFloats = 1 << 15;  // floats that one thread takes at a time, about 10 us

inline void rms_norm(Isa isa, StepThreads* threads, const NormArgs& a) {
  const int64_t at_once = std::max<int64_t>(1, kTaskFloats / std::max<int64_t>(a.dim, 1));
  for_each_task(threads, (a.rows + at_once - 1) / at_once, [&](int64_t task) {
    const int64_t begin = task * at_once, end = std::min(a.rows, begin + at_once);
#ifdef SLIPSTREAM_X86
    if (isa == Isa::kAvx512) return avx512::norm_rows(a, begin, end);
    if (isa == Isa::kAvx2) return avx2::norm_rows(a, begin, end);
#endif
    plain::norm_rows(a, begin, end);
  });
}

// Elements begin .. end - 1.
inline void silu_mul(Isa isa, const float* gate, const float* up, float* out, int64_t begin, int64_t end) {
#ifdef SLIPSTREAM_X86
  if (isa == Isa::kAvx512) return avx512::silu_mul(gate, up, out, begin, end);
  if (isa == Isa::kAvx2) return avx2::silu_mul(gate, up, out, begin, end);
#endif
  plain::silu_mul(gate, up, out, begin, end);
}

inline void silu_mul(Isa isa, StepThreads* threads, const float* gate, const float* up, float* out, int64_t size) {
  for_each_task(threads, (size + kTaskFloats - 1) / kTaskFloats, [&](int64_t task) {
    silu_mul(isa, gate, up, out, task * kTaskFloats, std::min(size, (task + 1) * kTaskFloats));
  });
}

}  // namespace slipstream
