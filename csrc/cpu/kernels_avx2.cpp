#if defined(__x86_64__)
#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define SB_ISA avx2
#define SB_VECTOR_BYTES 32
#include "kernels/tables.h"

namespace sb {
extern const InstructionSet kAvx2 = avx2::instruction_set_named("avx2");
}  // namespace sb

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
