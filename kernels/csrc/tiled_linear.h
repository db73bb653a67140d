// Linear layers whose weights are packed for tiles (tiles.h), beside those of linear.h.
#pragma once
#include <cstdint>
#include <vector>

#include "tiles_amx.h"

namespace slipstream {

template <typename T>
void split_rows(const Units& units, const T* x, int64_t k, int64_t begin, int64_t end, SplitRows<T>& out) {
  out.resize(end - begin, k);
#ifdef SLIPSTREAM_AMX
  if (units.tiles == TileUnit::kAmx) return amx::split_rows(x, k, begin, end, out);
#endif
  split_rows_plainly(x, k, begin, end, out);
}

template <typename T>
void tile_part(const Units& units, const TileArgs<T>& a, const LinearPart& part, const SplitRows<T>& split) {
#ifdef SLIPSTREAM_AMX
  if (units.tiles == TileUnit::kAmx) return amx::tile_part(a, part, split);
#endif
#ifdef SLIPSTREAM_X86
  if (units.isa == Isa::kAvx512) return avx512::tile_part(a, part, split);
  if (units.isa == Isa::kAvx2) return avx2::tile_part(a, part, split);
#endif
  plain::tile_part(a, part, split);
}

// The weights of one layer, packed for tiles. T: float or Bf16.
template <typename T>
class TiledLinear {
 public:
  TiledLinear(int64_t n, int64_t k)
      : n_(n), k_(k), packed_(static_cast<size_t>(num_panels(n) * num_blocks(k) * kPlanes<T> * 2 * kTileHalves)) {}

  int64_t n() const { return n_; }
  int64_t k() const { return k_; }

  // weight [n, k], bias [n] or null.
  void pack(const T* weight, const T* bias) {
    pack_tiles(weight, n_, k_, packed_.data());
    bias_.assign(bias, bias == nullptr ? nullptr : bias + n_);
  }

  TileArgs<T> args(const T* x, int64_t rows, T* out) const {
    return {x, packed_.data(), bias_.empty() ? nullptr : bias_.data(), rows, n_, k_, out};
  }

  void forward(const Units& units, StepThreads* threads, const T* x, int64_t rows, T* out) const {
    const TileArgs<T> a = args(x, rows, out);
    for_each_part(threads, 1, rows, [&](const LinearPart& part) {
      thread_local SplitRows<T> split;
      split_rows(units, x, k_, part.begin, part.end, split);
      tile_part(units, a, part, split);
    });
  }

  // As PackedLinear deals its parts out.
  template <typename Task>
  void for_each_part(StepThreads* threads, int64_t layers, int64_t rows, const Task& task) const {
    const int64_t work = 2 * layers * std::min(rows, kTaskRows) * kPanel * k_ * num_panels(n_) / kTileGain;
    deal_parts(threads, n_, rows, work, task);
  }

 private:
  // How many operations of PackedLinear take as long as one here, on AMX: a task should take as long as there.
  static constexpr int64_t kTileGain = 3;

  int64_t n_, k_;
  Halves packed_;
  std::vector<T> bias_;
};

// As gated_linear of packed layers: x is split once for both.
inline void gated_linear(const Units& units, StepThreads* threads, const TiledLinear<float>& gate,
                         const TiledLinear<float>& up, const float* x, int64_t rows, float* scratch, float* out) {
  const TileArgs<float> left = gate.args(x, rows, out), right = up.args(x, rows, scratch);
  gate.for_each_part(threads, 2, rows, [&](const LinearPart& part) {
    thread_local SplitRows<float> split;
    split_rows(units, x, gate.k(), part.begin, part.end, split);
    tile_part(units, left, part, split);
    tile_part(units, right, part, split);
    multiply_part(units, part, gate.n(), scratch, out);
  });
}

}  // namespace slipstream
