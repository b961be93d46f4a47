// The keys of a call that are held out of the states (docs/algorithm.md, section 5). Keys that outweigh all others
// would drown the others' part of a state in rounding wherever a list takes them back; a list that names a held key
// subtracts nothing, and one that does not adds the key's L by itself.
#pragma once
#include "../launchers.h"
#include "kernels.h"

namespace sb::cpu {

// Holds what the parameters point at.
struct HeldKeys {
  void set(AttentionParams& p, const AttentionKernels& kernel, const void* zero_row);
  int64_t most = 0;  // held in any state
 private:
  std::vector<int32_t> held, enters, late;
  std::vector<int64_t> held_begin, late_begin;
};

}  // namespace sb::cpu
