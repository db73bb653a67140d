// Tiles in AMX registers: the bits are defined in tiles.h.
#pragma once
#include "tiles.h"

#ifdef SLIPSTREAM_AMX
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace slipstream {

// Whether this process may use AMX: Linux saves tiles only for those that asked, once for all threads.
inline bool has_amx() {
#ifdef __linux__
  static const bool granted = [] {
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    unsigned a = 0, b = 0, c = 0, d = 0;
    __asm__("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(7), "c"(0));
    const bool tiles = (d >> 24 & 1) && (d >> 22 & 1);  // AMX-TILE, AMX-BF16
    __asm__("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(7), "c"(1));
    const bool converts = a >> 5 & 1;  // AVX512-BF16
    return tiles && converts && best_isa() == Isa::kAvx512 &&
           syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return granted;
#else
  return false;
#endif
}

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512bf16,avx2,fma,amx-tile,amx-bf16")
namespace amx {

struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// What was written to memory is there: the compiler does not know how much of it the instructions that load tiles read.
SLIPSTREAM_FORCE void settle(const void* written) { __asm__ volatile("" : : "r"(written) : "memory"); }

// Registers 0 to 3: sums; 4, 5: rows of x; 6, 7: weights. first, second: rows of the two tiles of x (second 0: both
// hold the same rows, high and low).
SLIPSTREAM_FORCE void configure(int64_t first, int64_t second) {
  alignas(64) TileConfig config;
  const auto low = static_cast<uint8_t>(first), high = static_cast<uint8_t>(second ? second : first);
  const uint8_t rows[8] = {low, low, high, high, low, high, 16, 16};
  for (int i = 0; i < 8; ++i) {
    config.rows[i] = rows[i];
    config.row_bytes[i] = 64;
  }
  settle(&config);
  _tile_loadconfig(&config);
}

SLIPSTREAM_FORCE void split_block(const float* from, uint16_t* high, uint16_t* low) {
  const __m512 first = _mm512_loadu_ps(from), second = _mm512_loadu_ps(from + 16);
  const __m512i above = (__m512i)_mm512_cvtne2ps_pbh(second, first);
  const __m512 first_high = _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(above)), 16));
  const __m512 second_high = _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(above, 1)), 16));
  _mm512_storeu_si512(high, above);
  const __m512bh below = _mm512_cvtne2ps_pbh(_mm512_sub_ps(second, second_high), _mm512_sub_ps(first, first_high));
  _mm512_storeu_si512(low, (__m512i)below);
}

static inline void split_rows(const float* x, int64_t k, int64_t begin, int64_t end, SplitRows<float>& out) {
  for (int64_t r = begin; r < end; ++r) {
    const float* from = x + r * k;
    uint16_t* to = out.at(r - begin, 0);
    int64_t left = k;
    for (; left >= kBlockK; left -= kBlockK, from += kBlockK, to += 2 * kTileRowHalves)
      split_block(from, to, to + kTileRowHalves);
    if (left == 0) continue;
    alignas(64) float rest[kBlockK] = {};
    std::memcpy(rest, from, static_cast<size_t>(left) * sizeof(float));
    split_block(rest, to, to + kTileRowHalves);
  }
}
// As they are: the instruction itself takes for zero what is below 2^-126.
static inline void split_rows(const Bf16* x, int64_t k, int64_t begin, int64_t end, SplitRows<Bf16>& out) {
  for (int64_t r = begin; r < end; ++r)
    for (int64_t d = 0; d < k; d += kBlockK) {
      const auto count = static_cast<unsigned>(std::min<int64_t>(kBlockK, k - d));
      const __mmask32 there = count == 32 ? ~__mmask32{0} : (__mmask32{1} << count) - 1;
      _mm512_storeu_si512(out.at(r - begin, d / kBlockK), _mm512_maskz_loadu_epi16(there, x + r * k + d));
    }
}

// The instructions name their registers, which no variable can.
template <int kTile>
SLIPSTREAM_FORCE void store_register(float* to, int64_t stride) {
  if constexpr (kTile == 0) _tile_stored(0, to, stride);
  if constexpr (kTile == 1) _tile_stored(1, to, stride);
  if constexpr (kTile == 2) _tile_stored(2, to, stride);
  if constexpr (kTile == 3) _tile_stored(3, to, stride);
}

SLIPSTREAM_FORCE __m512 load_some(const float* from, __mmask16 there) { return _mm512_maskz_loadu_ps(there, from); }
SLIPSTREAM_FORCE __m512 load_some(const Bf16* from, __mmask16 there) {
  const __m256i halves = _mm256_maskz_loadu_epi16(there, from);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
SLIPSTREAM_FORCE void store_some(float* to, __mmask16 there, __m512 value) { _mm512_mask_storeu_ps(to, there, value); }
// As from_float rounds; the instruction for it would take tiny values for zero.
SLIPSTREAM_FORCE void store_some(Bf16* to, __mmask16 there, __m512 value) {
  const __m512i bits = _mm512_castps_si512(value), upper = _mm512_srli_epi32(bits, 16);
  const __m512i odd = _mm512_and_si512(upper, _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd), 16);
  const __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  const __m512i kept = _mm512_mask_or_epi32(rounded, is_nan, upper, _mm512_set1_epi32(0x40));
  _mm256_mask_storeu_epi16(to, there, _mm512_cvtepi32_epi16(kept));
}

// A register of sums to its place; `rows` of them.
template <int kTile, typename T>
SLIPSTREAM_FORCE void store_tile(const TileArgs<T>& a, int64_t row, int64_t rows, int64_t column) {
  if (column >= a.n) return;
  if constexpr (sizeof(T) == 4) {
    if (a.bias == nullptr && column + kTileColumns <= a.n) {
      return store_register<kTile>(a.out + row * a.n + column, a.n * static_cast<int64_t>(sizeof(float)));
    }
  }
  alignas(64) float sums[kTileHeight * kTileColumns];
  store_register<kTile>(sums, 64);
  const auto count = static_cast<unsigned>(std::min<int64_t>(kTileColumns, a.n - column));
  const auto there = static_cast<__mmask16>((1u << count) - 1);
  const __m512 bias = a.bias == nullptr ? _mm512_setzero_ps() : load_some(a.bias + column, there);
  for (int64_t r = 0; r < rows; ++r)
    store_some(a.out + (row + r) * a.n + column, there, _mm512_add_ps(bias, _mm512_load_ps(sums + r * kTileColumns)));
}

// 17 to 32 rows from row `at` of the split ones by one panel.
template <typename T>
SLIPSTREAM_FORCE void two_high(const TileArgs<T>& a, const SplitRows<T>& split, const uint16_t* panel, int64_t at,
                               int64_t row, int64_t rows, int64_t column) {
  constexpr int64_t planes = kPlanes<T>;
  const int64_t blocks = num_blocks(a.k);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const uint16_t *upper = split.at(at, 0), *lower = split.at(at + kTileHeight, 0);
  for (int64_t b = 0; b < blocks; ++b, panel += planes * 2 * kTileHalves) {
    _tile_loadd(6, panel, 64);
    _tile_loadd(7, panel + kTileHalves, 64);
    for (int64_t plane = 0; plane < planes; ++plane, upper += kTileRowHalves, lower += kTileRowHalves) {
      _tile_loadd(4, upper, 64);
      _tile_loadd(5, lower, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    if (planes == 1) continue;
    _tile_loadd(6, panel + 2 * kTileHalves, 64);
    _tile_loadd(7, panel + 3 * kTileHalves, 64);
    _tile_loadd(4, upper - 2 * kTileRowHalves, 64);
    _tile_loadd(5, lower - 2 * kTileRowHalves, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  store_tile<0>(a, row, kTileHeight, column);
  store_tile<1>(a, row, kTileHeight, column + kTileColumns);
  store_tile<2>(a, row + kTileHeight, rows - kTileHeight, column);
  store_tile<3>(a, row + kTileHeight, rows - kTileHeight, column + kTileColumns);
}

// Up to 16 rows by one panel, or by two that follow each other.
template <typename T, int kPanels>
SLIPSTREAM_FORCE void one_high(const TileArgs<T>& a, const SplitRows<T>& split, const uint16_t* panel, int64_t at,
                               int64_t row, int64_t rows, int64_t column) {
  constexpr int64_t planes = kPlanes<T>;
  const int64_t blocks = num_blocks(a.k), next = a.panel_halves();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const uint16_t* x = split.at(at, 0);
  for (int64_t b = 0; b < blocks; ++b, panel += planes * 2 * kTileHalves, x += planes * kTileRowHalves) {
    _tile_loadd(4, x, 64);
    if (planes > 1) _tile_loadd(5, x + kTileRowHalves, 64);
    _tile_loadd(6, panel, 64);
    _tile_loadd(7, panel + kTileHalves, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (planes > 1) {
      _tile_dpbf16ps(0, 5, 6);
      _tile_dpbf16ps(1, 5, 7);
      _tile_loadd(6, panel + 2 * kTileHalves, 64);
      _tile_loadd(7, panel + 3 * kTileHalves, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (kPanels == 1) continue;
    _tile_loadd(6, panel + next, 64);
    _tile_loadd(7, panel + next + kTileHalves, 64);
    _tile_dpbf16ps(2, 4, 6);
    _tile_dpbf16ps(3, 4, 7);
    if (planes > 1) {
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
      _tile_loadd(6, panel + next + 2 * kTileHalves, 64);
      _tile_loadd(7, panel + next + 3 * kTileHalves, 64);
      _tile_dpbf16ps(2, 4, 6);
      _tile_dpbf16ps(3, 4, 7);
    }
  }
  store_tile<0>(a, row, rows, column);
  store_tile<1>(a, row, rows, column + kTileColumns);
  if (kPanels == 1) return;
  store_tile<2>(a, row, rows, column + kPanel);
  store_tile<3>(a, row, rows, column + kPanel + kTileColumns);
}

template <typename T>
static void tile_part(const TileArgs<T>& a, const LinearPart& part, const SplitRows<T>& split) {
  const int64_t rows = part.end - part.begin, size = a.panel_halves();
  settle(split.at(0, 0));
  for (int64_t at = 0; at < rows;) {
    // All whole pairs of tiles have one configuration, what is left another.
    const int64_t left = rows - at, high = std::min<int64_t>(left, 2 * kTileHeight);
    const int64_t until = high == 2 * kTileHeight ? at + left / high * high : rows;
    configure(std::min<int64_t>(high, kTileHeight), std::max<int64_t>(high - kTileHeight, 0));
    for (int64_t p = part.first_panel; p < part.last_panel; ++p) {
      const uint16_t* panel = a.packed + p * size;
      if (high > kTileHeight) {
        for (int64_t r = at; r < until; r += 2 * kTileHeight)
          two_high(a, split, panel, r, part.begin + r, high, p * kPanel);
      } else if (p + 1 < part.last_panel) {
        one_high<T, 2>(a, split, panel, at, part.begin + at, high, p++ * kPanel);
      } else {
        one_high<T, 1>(a, split, panel, at, part.begin + at, high, p * kPanel);
      }
    }
    at = until;
  }
  _tile_release();
}

}  // namespace amx
#pragma GCC pop_options
}  // namespace slipstream
#else
namespace slipstream {
inline bool has_amx() { return false; }
}  // namespace slipstream
#endif
