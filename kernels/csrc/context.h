// What the kernels of one engine share: the instruction set and the threads.
#pragma once
#include <chrono>
#include <stdexcept>
#include <string>

#include "simd.h"
#include "step_threads.h"
#include "tiles_amx.h"

namespace slipstream {

inline Isa isa_by_name(const std::string& name) {
  const Isa best = best_isa();
  const Isa wanted = name == "auto" ? best : name == "avx512" ? Isa::kAvx512 : name == "avx2" ? Isa::kAvx2 : Isa::kPlain;
  if (wanted == Isa::kPlain && name != "auto" && name != "plain")
    throw std::invalid_argument("isa is '" + name + "'; allowed: auto, plain, avx2, avx512");
  if (static_cast<int>(wanted) > static_cast<int>(best)) throw std::invalid_argument("this machine has no " + name);
  return wanted;
}

inline const char* isa_name(Isa isa) {
  return isa == Isa::kAvx512 ? "avx512" : isa == Isa::kAvx2 ? "avx2" : "plain";
}

// amx: whether tiles are computed with AMX where the machine has it; isa avx512 or auto.
struct Context {
  Context(size_t num_threads, int spin_us, const std::string& isa_wanted, bool amx)
      : isa(isa_by_name(isa_wanted)),
        units{isa, amx && isa == Isa::kAvx512 && has_amx() ? TileUnit::kAmx : TileUnit::kOrdinary},
        threads(num_threads - 1, std::chrono::microseconds(spin_us)) {}
  const Isa isa;
  const Units units;
  StepThreads threads;
};

}  // namespace slipstream
