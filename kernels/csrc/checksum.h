// Checksums of blocks of bytes at the speed of memory. Twin: kernels/checksum.py, which tells the formula.
// Invariant: every instruction set gives the same numbers: they are sums modulo 2^64.
#pragma once
#include <cstdint>
#include <cstring>

#include "simd.h"

namespace slipstream {

constexpr int64_t kChecksumWords = 128;  // of 8 bytes: a chunk
constexpr int64_t kChecksumBytes = 8 * kChecksumWords;
constexpr uint64_t kGolden = 0x9E3779B97F4A7C15;

// The finaliser of splitmix64 (Steele, Lea and Flood, 2014): a bijection in which every bit moves half of the others.
SLIPSTREAM_FORCE uint64_t mix_bits(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
  return x ^ (x >> 31);
}

struct ChecksumKeys {
  uint64_t word[kChecksumWords];
  ChecksumKeys() {
    for (int64_t i = 0; i < kChecksumWords; ++i) word[i] = mix_bits(static_cast<uint64_t>(i + 1) * kGolden);
  }
};

inline const ChecksumKeys& checksum_keys() {
  static const ChecksumKeys keys;
  return keys;
}

#define SLIPSTREAM_ISA_FILE "checksum_isa.inc"
#include "for_each_isa.h"

#ifdef SLIPSTREAM_X86
#define SLIPSTREAM_FOR_ISA(call) (isa == Isa::kAvx512 ? avx512::call : isa == Isa::kAvx2 ? avx2::call : plain::call)
#else
#define SLIPSTREAM_FOR_ISA(call) plain::call
#endif

inline uint64_t block_checksum(Isa isa, const uint8_t* data, int64_t size) {
  return SLIPSTREAM_FOR_ISA(block_sum<false>(data, nullptr, size, checksum_keys().word));
}

// As block_checksum, while the bytes are copied past the caches; 64 divides the address `to`.
inline uint64_t copy_block(Isa isa, const uint8_t* from, uint8_t* to, int64_t size) {
  return SLIPSTREAM_FOR_ISA(block_sum<true>(from, to, size, checksum_keys().word));
}

#undef SLIPSTREAM_FOR_ISA

}  // namespace slipstream
