// Includes SLIPSTREAM_ISA_FILE once for each instruction set, in its namespace; no guard: one use per algorithm. What a
// file defines is compiled for the set because it stands between the pragmas; a function defined elsewhere would be
// lowered to the base instruction set before it is inlined.
namespace plain {
#include SLIPSTREAM_ISA_FILE
}
#ifdef SLIPSTREAM_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#include SLIPSTREAM_ISA_FILE
}
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx2,fma")
namespace avx512 {
#include SLIPSTREAM_ISA_FILE
}
#pragma GCC pop_options
#endif
#undef SLIPSTREAM_ISA_FILE
