// exp for loops that the compiler vectorises: no branch, no errno, the same result for every vector width.
#pragma once
#include <cstdint>
#include <cstring>

// One clone per instruction set, chosen when the module loads; every clone computes the same bits, because no loop
// below reassociates a sum and -ffp-contract=off forbids fused multiply-adds.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SLIPSTREAM_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define SLIPSTREAM_CLONES
#endif

namespace slipstream {

// exp(x) for x <= 0 to about 2 ulp; below -87 it is 0 (range reduction to [-ln2/2, ln2/2], degree-6 polynomial).
static inline __attribute__((always_inline)) float exp_nonpositive(float x) {
  const float clamped = x < -87.0f ? -87.0f : x;
  const float shifted = clamped * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23 rounds to the nearest integer
  const float n = shifted - 12582912.0f;
  const float r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float value = (p * r * r + r) + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  return x < -87.0f ? 0.0f : value * power;
}

}  // namespace slipstream
