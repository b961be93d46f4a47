#if defined(__x86_64__)
#include "kernels.h"

// Only what follows is compiled for these instructions: everything included above may be shared with other processors.
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#define SB_VECTOR_BYTES 64
namespace sb::avx512 {
#include "kernels/all.h"
}  // namespace sb::avx512

namespace sb {
extern const InstructionSet kAvx512 = avx512::instruction_set_named("avx512");
}  // namespace sb
#endif
