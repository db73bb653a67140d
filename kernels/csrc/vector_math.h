// Sixteen-lane vectors and an exp that works on them and on single floats. The compiler lowers the lanes to whatever
// the machine has; every operation is an IEEE multiplication or addition in a fixed order, so each instruction set
// computes the same bits (-ffp-contract=off forbids fused multiply-adds).
#pragma once
#include <cstdint>
#include <cstring>

// One clone per instruction set, chosen when the module loads.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SLIPSTREAM_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define SLIPSTREAM_CLONES
#endif
#define SLIPSTREAM_INLINE static inline __attribute__((always_inline))

namespace slipstream {

constexpr int kLanes = 16;
typedef float Lanes __attribute__((vector_size(64)));
typedef int32_t LanesInt __attribute__((vector_size(64)));

// Values travel by reference: passing 64-byte vectors by value has another calling convention in every clone.
SLIPSTREAM_INLINE void load(Lanes& out, const float* from) { std::memcpy(&out, from, sizeof(Lanes)); }
SLIPSTREAM_INLINE void store(float* to, const Lanes& value) { std::memcpy(to, &value, sizeof(Lanes)); }

// exp(x) for x <= 0 to about 2 ulp, 0 below -87: range reduction to [-ln2/2, ln2/2] and a degree-6 polynomial.
SLIPSTREAM_INLINE void exp_nonpositive(Lanes& x) {
  const Lanes zero = {};
  const Lanes floor = zero - 87.0f;
  const LanesInt tiny = x < floor;
  const Lanes clamped = tiny ? floor : x;
  const Lanes shifted = clamped * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23 rounds to the nearest integer
  const Lanes n = shifted - 12582912.0f;
  const Lanes r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  Lanes p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const Lanes value = (p * r * r + r) + 1.0f;
  const LanesInt bits = (__builtin_convertvector(n, LanesInt) + 127) << 23;
  Lanes power;
  std::memcpy(&power, &bits, sizeof(power));
  x = tiny ? zero : value * power;
}

// Sum and maximum over the lanes in a fixed order.
SLIPSTREAM_INLINE float lane_sum(const Lanes& v) {
  float half[8];
  for (int i = 0; i < 8; ++i) half[i] = v[i] + v[i + 8];
  for (int width = 4; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) half[i] += half[i + width];
  return half[0];
}

SLIPSTREAM_INLINE float lane_max(const Lanes& v) {
  float best = v[0];
  for (int i = 1; i < kLanes; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

}  // namespace slipstream
