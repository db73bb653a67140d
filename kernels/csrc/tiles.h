// Linear layers in bfloat16 tiles: out[t, n] = bias[n] + sum_k x[t, k] * weight[n, k], float32 factors as sums of two
// bfloat16 each (high + low; low * low is left out: a relative error of 2^-17 a product), bfloat16 factors as they are.
//
// Invariants
// - The bits are those of Intel's TDPBF16PS, which is defined down to the rounding: of every 32 values of k, and of each
//   pair of planes in the order high * high, low * high, high * low (x first), the even and the odd products are two
//   chains of fused multiply-adds from zero; their sum is added to the output's. Numbers below 2^-126 count as zero.
// - So they do not depend on the batch, the draft width or the number of threads, nor on whether the machine has AMX:
//   others compute the same with ordinary multiply-adds, but for products below 2^-126, which AMX drops.
// - Tiles are configured and released within one part: no thread holds tile state between two calls.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#include "linear.h"

namespace slipstream {

constexpr int64_t kBlockK = 32;      // values of k in a tile
constexpr int64_t kTileColumns = 16;
constexpr int64_t kTilePairs = 16;   // pairs of k in a tile of weights
constexpr int64_t kTileHalves = kTilePairs * kTileColumns * 2;
constexpr int64_t kTileHeight = 16;  // rows of x in a tile
constexpr int64_t kTileRowHalves = kTileHeight * kBlockK;

// Memory of tiles begins at a cache line: a row of a tile then is one line, else two.
template <typename T>
struct LineAllocator {
  using value_type = T;
  LineAllocator() = default;
  template <typename U>
  LineAllocator(const LineAllocator<U>&) {}
  T* allocate(size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t{64})); }
  void deallocate(T* at, size_t) { ::operator delete(at, std::align_val_t{64}); }
  bool operator==(const LineAllocator&) const { return true; }
  bool operator!=(const LineAllocator&) const { return false; }
};
using Halves = std::vector<uint16_t, LineAllocator<uint16_t>>;

template <typename T>
constexpr int64_t kPlanes = sizeof(T) == 4 ? 2 : 1;

inline int64_t num_blocks(int64_t k) { return (k + kBlockK - 1) / kBlockK; }

// Instructions that tiles are computed with.
enum class TileUnit { kAmx, kOrdinary };

struct Units {
  Isa isa;
  TileUnit tiles;
  operator Isa() const { return isa; }
};

// The high and the low part of a factor: as VCVTNEPS2BF16 rounds, with what is below 2^-126 taken for zero.
inline uint16_t tile_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if ((bits & 0x7F800000u) == 0) return static_cast<uint16_t>(bits >> 16 & 0x8000u);
  Bf16 out;
  from_float(value, out);
  return out.bits;
}
inline void split_factor(float value, uint16_t* planes, int64_t stride) {
  const Bf16 high{tile_half(value)};
  planes[0] = high.bits;
  planes[stride] = tile_half(value - to_float(high));
}
inline void split_factor(Bf16 value, uint16_t* planes, int64_t) { planes[0] = tile_half(to_float(value)); }

// [n, k] row by row to [panels, blocks of k, planes, 2 tiles, 16 pairs of k, 16 columns, 2]; zero beyond n and k.
template <typename T>
void pack_tiles(const T* weight, int64_t n, int64_t k, uint16_t* packed) {
  for (int64_t panel = 0; panel < num_panels(n); ++panel)
    for (int64_t block = 0; block < num_blocks(k); ++block, packed += kPlanes<T> * 2 * kTileHalves)
      for (int64_t c = 0; c < kPanel; ++c)
        for (int64_t d = 0; d < kBlockK; ++d) {
          const int64_t column = panel * kPanel + c, depth = block * kBlockK + d;
          const T value = column < n && depth < k ? weight[column * k + depth] : T{};
          const int64_t tile = c / kTileColumns, at = (d / 2 * kTileColumns + c % kTileColumns) * 2 + d % 2;
          split_factor(value, packed + tile * kTileHalves + at, 2 * kTileHalves);
        }
}

// x [rows, k], packed as above, bias [n] or null, out [rows, n]; float or Bf16.
template <typename T>
struct TileArgs {
  const T* x;
  const uint16_t* packed;
  const T* bias;
  int64_t rows, n, k;
  T* out;

  int64_t panel_halves() const { return num_blocks(k) * kPlanes<T> * 2 * kTileHalves; }
};

// Rows of x split into planes, [tiles of 16 rows, blocks of k, planes, 16 rows, 32]: what one register holds lies in one
// piece, and what follows it next is loaded next.
template <typename T>
class SplitRows {
 public:
  void resize(int64_t rows, int64_t k) {
    blocks_ = num_blocks(k);
    halves_.resize(static_cast<size_t>((rows + kTileHeight - 1) / kTileHeight * blocks_ * kPlanes<T> * kTileRowHalves));
  }
  // The 32 halves of a row; its other plane is kTileRowHalves further.
  uint16_t* at(int64_t row, int64_t block) {
    return halves_.data() + (row / kTileHeight * blocks_ + block) * kPlanes<T> * kTileRowHalves + row % kTileHeight * kBlockK;
  }
  const uint16_t* at(int64_t row, int64_t block) const { return const_cast<SplitRows*>(this)->at(row, block); }

 private:
  int64_t blocks_ = 0;
  Halves halves_;
};

template <typename T>
void split_rows_plainly(const T* x, int64_t k, int64_t begin, int64_t end, SplitRows<T>& out) {
  for (int64_t r = begin; r < end; ++r)
    for (int64_t d = 0; d < num_blocks(k) * kBlockK; ++d)
      split_factor(d < k ? x[r * k + d] : T{}, out.at(r - begin, d / kBlockK) + d % kBlockK, kTileRowHalves);
}

// sums [rows, 16] of the columns from `column` on to where they belong, the bias added.
template <typename T>
SLIPSTREAM_FORCE void finish_tile(const TileArgs<T>& a, const float* sums, int64_t row, int64_t rows, int64_t column) {
  const int64_t columns = std::min(kTileColumns, a.n - column);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) {
      const float bias = a.bias == nullptr ? 0.0f : to_float(a.bias[column + c]);
      from_float(bias + sums[r * kTileColumns + c], a.out[(row + r) * a.n + column + c]);
    }
}

#define SLIPSTREAM_ISA_FILE "tiles_isa.inc"
#include "for_each_isa.h"

}  // namespace slipstream
