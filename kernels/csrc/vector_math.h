// exp, maxima and sums over sixteen lanes. Every operation is an IEEE multiplication or addition in a fixed order, so
// each instruction set computes the same bits (-ffp-contract=off forbids the compiler to fuse them).
#pragma once
#include <cstdint>
#include <cstring>

#include "simd.h"

namespace slipstream {

#define SLIPSTREAM_ISA_FILE "vector_math_isa.inc"
#include "for_each_isa.h"

}  // namespace slipstream
