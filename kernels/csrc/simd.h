// What differs between instruction sets: sixteen floats with a fused multiply-add. An algorithm file is included once
// for each set, inside SLIPSTREAM_ISA (see for_each_isa.h), and uses `Wide` of the namespace around it.
// Invariant: every set does the same IEEE operations in the same order, so every machine computes the same bits.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#define SLIPSTREAM_X86 1
#if __GNUC__ >= 11
#define SLIPSTREAM_AMX 1  // older compilers do not know the instructions
#endif
#endif

#define SLIPSTREAM_FORCE inline __attribute__((always_inline))

namespace slipstream {

constexpr int kWide = 16;

// bfloat16 as stored: the upper half of a float.
struct Bf16 {
  uint16_t bits;
};

SLIPSTREAM_FORCE float to_float(float value) { return value; }
SLIPSTREAM_FORCE float to_float(Bf16 value) {
  const uint32_t wide = uint32_t{value.bits} << 16;
  float out;
  std::memcpy(&out, &wide, sizeof(out));
  return out;
}

// To the nearest, ties to even; NaN stays NaN.
SLIPSTREAM_FORCE void from_float(float value, float& out) { out = value; }
SLIPSTREAM_FORCE void from_float(float value, Bf16& out) {
  uint32_t wide;
  std::memcpy(&wide, &value, sizeof(wide));
  const uint32_t rounded = (wide + 0x7FFF + ((wide >> 16) & 1)) >> 16;
  out.bits = static_cast<uint16_t>(value != value ? (wide >> 16) | 0x40 : rounded);
}

enum class Isa { kPlain, kAvx2, kAvx512 };

inline Isa best_isa() {
#ifdef SLIPSTREAM_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
    return Isa::kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::kAvx2;
#endif
  return Isa::kPlain;
}

namespace plain {

struct Wide {
  float lane[kWide];
  static SLIPSTREAM_FORCE Wide all(float value) {
    Wide out;
    for (int i = 0; i < kWide; ++i) out.lane[i] = value;
    return out;
  }
  static SLIPSTREAM_FORCE Wide load(const float* from) {
    Wide out;
    std::memcpy(out.lane, from, sizeof(out.lane));
    return out;
  }
  static SLIPSTREAM_FORCE Wide load(const Bf16* from) {
    Wide out;
    for (int i = 0; i < kWide; ++i) out.lane[i] = to_float(from[i]);
    return out;
  }
  SLIPSTREAM_FORCE void store(float* to) const { std::memcpy(to, lane, sizeof(lane)); }
  SLIPSTREAM_FORCE void store(Bf16* to) const {
    for (int i = 0; i < kWide; ++i) from_float(lane[i], to[i]);
  }
  // this += a * b, rounded once.
  SLIPSTREAM_FORCE void add_product(const Wide& a, float b) {
    for (int i = 0; i < kWide; ++i) lane[i] = std::fma(a.lane[i], b, lane[i]);
  }
  SLIPSTREAM_FORCE Wide times(float b) const {
    Wide out;
    for (int i = 0; i < kWide; ++i) out.lane[i] = lane[i] * b;
    return out;
  }
  SLIPSTREAM_FORCE Wide over(float b) const {
    Wide out;
    for (int i = 0; i < kWide; ++i) out.lane[i] = lane[i] / b;
    return out;
  }
  SLIPSTREAM_FORCE Wide plus(const Wide& b) const {
    Wide out;
    for (int i = 0; i < kWide; ++i) out.lane[i] = lane[i] + b.lane[i];
    return out;
  }
};
// Floats of a register; rows of a linear layer, queries of attention, and its sums of sixteen, that are worked on together.
constexpr int kChunk = 4, kTileRows = 4, kTileQueries = 1, kTileSums = 4;

// sum += a * b lane by lane, rounded once; products of the lower halves of 64-bit lanes with b; and whether a lane of a
// comparison is set.
template <typename Floats>
SLIPSTREAM_FORCE void add_products(const Floats& a, const Floats& b, Floats& sum) {
  for (size_t i = 0; i < sizeof(Floats) / 4; ++i) sum[i] = std::fma(a[i], b[i], sum[i]);
}
template <typename Words>
SLIPSTREAM_FORCE void multiply_words(const Words& a, uint32_t b, Words& out) {
  for (size_t i = 0; i < sizeof(Words) / 8; ++i) out[i] = uint64_t{static_cast<uint32_t>(a[i])} * b;
}
template <typename Mask>
SLIPSTREAM_FORCE bool any_lane(const Mask& mask) {
  int32_t any = 0;
  for (size_t i = 0; i < sizeof(Mask) / 4; ++i) any |= mask[i];
  return any != 0;
}
// Eight 64-bit words: 64 bytes.
struct Line {
  uint64_t word[8];
  static SLIPSTREAM_FORCE Line zero() { return {}; }
  static SLIPSTREAM_FORCE Line load(const void* from) {
    Line out;
    std::memcpy(out.word, from, sizeof(out.word));
    return out;
  }
  // Past the caches where the set can, to an address that 64 divides; `settle` orders such bytes before later stores.
  SLIPSTREAM_FORCE void stream(uint8_t* to) const { std::memcpy(to, word, sizeof(word)); }
  static SLIPSTREAM_FORCE void settle() {}
  // this += a + low half * high half of a + b, halves added apart, modulo 2^32.
  SLIPSTREAM_FORCE void add_keyed(const Line& a, const Line& b) {
    for (int i = 0; i < 8; ++i) {
      const uint32_t low = static_cast<uint32_t>(a.word[i]) + static_cast<uint32_t>(b.word[i]);
      const uint32_t high = static_cast<uint32_t>(a.word[i] >> 32) + static_cast<uint32_t>(b.word[i] >> 32);
      word[i] += a.word[i] + uint64_t{low} * high;
    }
  }
  SLIPSTREAM_FORCE uint64_t total() const {
    uint64_t out = 0;
    for (int i = 0; i < 8; ++i) out += word[i];
    return out;
  }
};

}  // namespace plain

#ifdef SLIPSTREAM_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {

SLIPSTREAM_FORCE __m256 widen(__m128i half) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

struct Wide {
  __m256 low, high;
  static SLIPSTREAM_FORCE Wide all(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
  static SLIPSTREAM_FORCE Wide load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
  static SLIPSTREAM_FORCE Wide load(const Bf16* from) {
    const __m128i* halves = reinterpret_cast<const __m128i*>(from);
    return {widen(_mm_loadu_si128(halves)), widen(_mm_loadu_si128(halves + 1))};
  }
  SLIPSTREAM_FORCE void store(float* to) const {
    _mm256_storeu_ps(to, low);
    _mm256_storeu_ps(to + 8, high);
  }
  SLIPSTREAM_FORCE void store(Bf16* to) const {
    float lane[kWide];
    store(lane);
    for (int i = 0; i < kWide; ++i) from_float(lane[i], to[i]);
  }
  SLIPSTREAM_FORCE void add_product(const Wide& a, float b) {
    const __m256 factor = _mm256_set1_ps(b);
    low = _mm256_fmadd_ps(a.low, factor, low);
    high = _mm256_fmadd_ps(a.high, factor, high);
  }
  SLIPSTREAM_FORCE Wide times(float b) const {
    const __m256 factor = _mm256_set1_ps(b);
    return {_mm256_mul_ps(low, factor), _mm256_mul_ps(high, factor)};
  }
  SLIPSTREAM_FORCE Wide over(float b) const {
    const __m256 divisor = _mm256_set1_ps(b);
    return {_mm256_div_ps(low, divisor), _mm256_div_ps(high, divisor)};
  }
  SLIPSTREAM_FORCE Wide plus(const Wide& b) const {
    return {_mm256_add_ps(low, b.low), _mm256_add_ps(high, b.high)};
  }
};
constexpr int kChunk = 8, kTileRows = 3, kTileQueries = 2, kTileSums = 4;

template <typename Floats>
SLIPSTREAM_FORCE void add_products(const Floats& a, const Floats& b, Floats& sum) {
  sum = (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
}
template <typename Words>
SLIPSTREAM_FORCE void multiply_words(const Words& a, uint32_t b, Words& out) {
  out = (Words)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
}
template <typename Mask>
SLIPSTREAM_FORCE bool any_lane(const Mask& mask) {
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
}

struct Line {
  __m256i low, high;
  static SLIPSTREAM_FORCE Line zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  static SLIPSTREAM_FORCE Line load(const void* from) {
    const __m256i* source = static_cast<const __m256i*>(from);
    return {_mm256_loadu_si256(source), _mm256_loadu_si256(source + 1)};
  }
  SLIPSTREAM_FORCE void stream(uint8_t* to) const {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), low);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to) + 1, high);
  }
  static SLIPSTREAM_FORCE void settle() { _mm_sfence(); }
  static SLIPSTREAM_FORCE __m256i keyed(__m256i sum, __m256i a, __m256i b) {
    const __m256i both = _mm256_add_epi32(a, b);
    return _mm256_add_epi64(sum, _mm256_add_epi64(a, _mm256_mul_epu32(both, _mm256_srli_epi64(both, 32))));
  }
  SLIPSTREAM_FORCE void add_keyed(const Line& a, const Line& b) {
    low = keyed(low, a.low, b.low);
    high = keyed(high, a.high, b.high);
  }
  SLIPSTREAM_FORCE uint64_t total() const {
    uint64_t word[4];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(word), _mm256_add_epi64(low, high));
    return word[0] + word[1] + word[2] + word[3];
  }
};

}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx2,fma")
namespace avx512 {

struct Wide {
  __m512 lanes;
  static SLIPSTREAM_FORCE Wide all(float value) { return {_mm512_set1_ps(value)}; }
  static SLIPSTREAM_FORCE Wide load(const float* from) { return {_mm512_loadu_ps(from)}; }
  static SLIPSTREAM_FORCE Wide load(const Bf16* from) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
  }
  SLIPSTREAM_FORCE void store(float* to) const { _mm512_storeu_ps(to, lanes); }
  SLIPSTREAM_FORCE void store(Bf16* to) const {
    float lane[kWide];
    store(lane);
    for (int i = 0; i < kWide; ++i) from_float(lane[i], to[i]);
  }
  SLIPSTREAM_FORCE void add_product(const Wide& a, float b) {
    lanes = _mm512_fmadd_ps(a.lanes, _mm512_set1_ps(b), lanes);
  }
  SLIPSTREAM_FORCE Wide times(float b) const { return {_mm512_mul_ps(lanes, _mm512_set1_ps(b))}; }
  SLIPSTREAM_FORCE Wide over(float b) const { return {_mm512_div_ps(lanes, _mm512_set1_ps(b))}; }
  SLIPSTREAM_FORCE Wide plus(const Wide& b) const { return {_mm512_add_ps(lanes, b.lanes)}; }
};
constexpr int kChunk = 16, kTileRows = 12, kTileQueries = 8, kTileSums = 16;

template <typename Floats>
SLIPSTREAM_FORCE void add_products(const Floats& a, const Floats& b, Floats& sum) {
  sum = (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
}
template <typename Words>
SLIPSTREAM_FORCE void multiply_words(const Words& a, uint32_t b, Words& out) {
  out = (Words)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
}
template <typename Mask>
SLIPSTREAM_FORCE bool any_lane(const Mask& mask) {
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
}

struct Line {
  __m512i words;
  static SLIPSTREAM_FORCE Line zero() { return {_mm512_setzero_si512()}; }
  static SLIPSTREAM_FORCE Line load(const void* from) { return {_mm512_loadu_si512(from)}; }
  SLIPSTREAM_FORCE void stream(uint8_t* to) const { _mm512_stream_si512(reinterpret_cast<__m512i*>(to), words); }
  static SLIPSTREAM_FORCE void settle() { _mm_sfence(); }
  SLIPSTREAM_FORCE void add_keyed(const Line& a, const Line& b) {
    const __m512i both = _mm512_add_epi32(a.words, b.words);
    const __m512i product = _mm512_mul_epu32(both, _mm512_srli_epi64(both, 32));
    words = _mm512_add_epi64(words, _mm512_add_epi64(a.words, product));
  }
  SLIPSTREAM_FORCE uint64_t total() const {
    uint64_t word[8], out = 0;
    _mm512_storeu_si512(word, words);
    for (uint64_t one : word) out += one;
    return out;
  }
};

}  // namespace avx512
#pragma GCC pop_options
#endif

}  // namespace slipstream
