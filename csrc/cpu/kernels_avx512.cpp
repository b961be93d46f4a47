#if defined(__x86_64__)
#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif
#define SB_ISA avx512
#define SB_VECTOR_BYTES 64
#include "kernels/tables.h"

namespace sb {
extern const InstructionSet kAvx512 = avx512::instruction_set_named("avx512");
}  // namespace sb

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
