#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")
#endif
#define SB_ISA avx512_bf16
#define SB_VECTOR_BYTES 64
#define SB_BFLOAT16
#include "kernels/tables.h"

namespace sb {
extern const AttentionKernels kAvx512Bf16 = avx512_bf16::attention_table<Bfloat16>();
}  // namespace sb

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
