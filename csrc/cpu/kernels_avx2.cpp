#if defined(__x86_64__)
#include "kernels.h"

// Only what follows is compiled for these instructions: everything included above may be shared with other processors.
#pragma GCC target("avx2,fma,f16c")
#define SB_VECTOR_BYTES 32
namespace sb::avx2 {
#include "kernels/all.h"
}  // namespace sb::avx2

namespace sb {
extern const InstructionSet kAvx2 = avx2::instruction_set_named("avx2");
}  // namespace sb
#endif
