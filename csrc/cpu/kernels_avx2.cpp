#if defined(__x86_64__)
#include "kernels.h"

#pragma GCC target("avx2,fma,f16c")
#define SB_ISA avx2
#define SB_VECTOR_BYTES 32
#include "kernels/tables.h"

namespace sb {
extern const InstructionSet kAvx2 = avx2::instruction_set_named("avx2");
}  // namespace sb
#endif
