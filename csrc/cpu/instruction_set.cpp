#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <cstdlib>
#include <cstring>
#include <vector>

#include "kernels.h"

namespace sb {
namespace {

#if defined(__x86_64__) && !defined(SB_WITHOUT_AVX2)
// Of a processor that has AVX2. Clang 14 does not take "f16c" in __builtin_cpu_supports.
bool has_f16c() {
  unsigned a, b, c = 0, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

// Every set this processor runs, best first.
std::vector<InstructionSet> supported_sets() {
  std::vector<InstructionSet> sets;
#if defined(__x86_64__)
#if !defined(SB_WITHOUT_AVX512)
  const auto has_avx512 = [] {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  };
  if (has_avx512() && __builtin_cpu_supports("avx512bf16")) {
    InstructionSet set = kAvx512;
    set.name = "avx512_bf16", set.bf16 = &kAvx512Bf16;
    sets.push_back(set);
  }
  if (has_avx512()) sets.push_back(kAvx512);
#endif
#if !defined(SB_WITHOUT_AVX2)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()) sets.push_back(kAvx2);
#endif
#endif
  sets.push_back(kBaseline);
  return sets;
}

InstructionSet choose() {
  const std::vector<InstructionSet> sets = supported_sets();
  // A name the processor does not have is not an error here: scatterbrain.ops checks the variable at import, where it
  // can say what to do.
  if (const char* wanted = std::getenv("SCATTERBRAIN_ISA"))
    for (const InstructionSet& set : sets)
      if (std::strcmp(set.name, wanted) == 0) return set;
  return sets.front();
}

}  // namespace

const InstructionSet& instruction_set() {
  static const InstructionSet chosen = choose();
  return chosen;
}

}  // namespace sb
