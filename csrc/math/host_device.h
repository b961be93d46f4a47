// SB_HD marks the algebra that every device shares. It is always inlined: a header that several instruction sets
// compile must not leave a function for the linker to merge.
#pragma once

#if defined(__CUDACC__)
#define SB_HD __host__ __device__ __forceinline__
#else
#define SB_HD inline __attribute__((always_inline))
#endif
