// SB_HD marks the algebra that every device shares, SB_INLINE_LAMBDA lambdas. Both are always inlined: headers that
// several instruction sets compile must not leave a function for the linker to merge.
#pragma once

#if defined(__CUDACC__)
#define SB_HD __host__ __device__ __forceinline__
#define SB_INLINE_LAMBDA
#else
#define SB_HD inline __attribute__((always_inline))
#define SB_INLINE_LAMBDA __attribute__((always_inline))
#endif
