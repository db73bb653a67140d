// Philox4x32-10 and the Gumbel noise of law 1. Twin: kernels/reference.py (philox4x32, gumbel).
#pragma once
#include <array>
#include <cmath>
#include <cstdint>

namespace slipstream {

using Word4 = std::array<uint32_t, 4>;

inline Word4 philox4x32(Word4 c, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c[0];
    const uint64_t p1 = uint64_t{0xCD9E8D57u} * c[2];
    c = {static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k0, static_cast<uint32_t>(p1),
         static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k1, static_cast<uint32_t>(p0)};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

// u = (bits + 1/2) / 2^32 in double, rounded to float once at the end.
inline float gumbel_from_bits(uint32_t bits) {
  const double uniform = (static_cast<double>(bits) + 0.5) * 0x1p-32;
  return static_cast<float>(-std::log(-std::log(uniform)));
}

}  // namespace slipstream
