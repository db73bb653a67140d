// exp, maxima and sums over sixteen lanes. Every operation is an IEEE one in a fixed order, and what is fused is written
// so (-ffp-contract=off forbids the compiler to choose), so each instruction set computes the same bits.
#pragma once
#include <cstdint>
#include <cstring>

#include "simd.h"

namespace slipstream {

#define SLIPSTREAM_ISA_FILE "vector_math_isa.inc"
#include "for_each_isa.h"

}  // namespace slipstream
