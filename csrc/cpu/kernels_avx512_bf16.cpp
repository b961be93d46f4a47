#if defined(__x86_64__)
#include "kernels.h"

#include <immintrin.h>

// Only what follows is compiled for these instructions: everything included above may be shared with other processors.
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")
#define SB_VECTOR_BYTES 64
#define SB_BFLOAT16
namespace sb::avx512_bf16 {
#include "kernels/all.h"
}  // namespace sb::avx512_bf16

namespace sb {
extern const AttentionKernels kAvx512Bf16 = avx512_bf16::attention_table<Bfloat16>();
}  // namespace sb
#endif
