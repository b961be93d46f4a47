// A bump allocator over one block of scratch memory; with a null base it only counts the bytes.
#pragma once
#include "isa.h"

namespace sb::SB_ISA {

struct Arena {
  char* base;
  int64_t used;
  template <class U>
  SB_INLINE U* take(int64_t count) {
    const int64_t at = used;
    used += pad_to(count * int64_t(sizeof(U)) + 64, 64);
    return base ? reinterpret_cast<U*>(base + at) : nullptr;
  }
};

}  // namespace sb::SB_ISA
