// The instruction set that kernels are compiled for: SB_ISA names their namespace, SB_VECTOR_BYTES is the width of a
// register, SB_BFLOAT16 says whether there are dot instructions on bfloat16.
//
// kernels_<set>.cpp includes the system's headers and kernels.h, then sets these and the target pragma, then includes
// the kernels. So nothing but the kernels is compiled for the set: an inline function of a header that other files
// include too would be merged by the linker into code for processors without it. For the same reason kernels call
// nothing of std::. A header compiled on its own gets the baseline.
#pragma once
#include "../kernels.h"

#if !defined(SB_ISA)
#define SB_ISA baseline
#define SB_VECTOR_BYTES 16
#endif

#define SB_INLINE inline __attribute__((always_inline))
#define SB_PRAGMA(text) _Pragma(#text)
#define SB_UNROLL SB_PRAGMA(GCC unroll 16)
// A loop whose count is known when compiling, unrolled: arrays of vectors indexed by it stay in registers.
#define SB_EACH(i, count) \
  SB_UNROLL               \
  for (int i = 0; i < (count); ++i)
