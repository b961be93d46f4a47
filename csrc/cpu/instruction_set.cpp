#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace sb {
namespace {

bool supported(const InstructionSet& set) {
#if defined(__x86_64__)
  if (&set == &kAvx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (&set == &kAvx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
  return true;
}

const InstructionSet& choose() {
  const InstructionSet* const sets[] = {&kAvx512, &kAvx2, &kBaseline};
  // A name the processor does not have is not an error here: scatterbrain.ops checks the variable at import, where it
  // can say what to do.
  if (const char* wanted = std::getenv("SCATTERBRAIN_ISA"))
    for (const InstructionSet* set : sets)
      if (std::strcmp(set->name, wanted) == 0 && supported(*set)) return *set;
  for (const InstructionSet* set : sets)
    if (supported(*set)) return *set;
  return kBaseline;
}

}  // namespace

const InstructionSet& instruction_set() {
  static const InstructionSet& chosen = choose();
  return chosen;
}

}  // namespace sb
