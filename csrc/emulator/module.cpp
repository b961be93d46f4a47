// A library that tests load beside the operators': it puts the CUDA launchers, which then start kernels in the
// emulator, into the CPU's table, so that the registered operators run them on CPU tensors.
#include <dlfcn.h>

#include "../cuda/launchers.h"
#include "emulator.h"

namespace {

sb::Launchers* replaced = nullptr;
sb::Launchers before;

}  // namespace

#define SB_EXPORT __attribute__((visibility("default")))

extern "C" {

// Of the table that sb_emulator_install fills: the operators' library must have the same.
SB_EXPORT int64_t sb_emulator_launchers_bytes() { return sizeof(sb::Launchers); }

// `table`: scatterbrain.launchers_address of the CPU.
SB_EXPORT void sb_emulator_install(int64_t table) {
  replaced = reinterpret_cast<sb::Launchers*>(table);
  before = *replaced;
  sb::cuda::fill(*replaced);
}

SB_EXPORT void sb_emulator_remove() {
  if (replaced) *replaced = before;
  replaced = nullptr;
}

// Counts since the library was loaded, in the order of sb::emulator::Statistics.
SB_EXPORT void sb_emulator_statistics(int64_t* counts) {
  const sb::emulator::Statistics& s = sb::emulator::statistics();
  const int64_t values[] = {s.launches,        s.blocks,         s.barriers,    s.shuffles,
                            s.shared_accesses, s.bank_conflicts, s.copied_bytes};
  for (const int64_t value : values) *counts++ = value;
}

// Calls the observer (sb::emulator::Observer) around every launch from here on; null: nobody.
SB_EXPORT void sb_emulator_observe(sb::emulator::Observer observer) { sb::emulator::observe(observer); }

// Launches have at most so many blocks from here on.
SB_EXPORT void sb_emulator_limit_grid(int64_t blocks) { sb::emulator::limit_grid(blocks); }

// Where a function lies in this library: the value of its symbol.
SB_EXPORT int64_t sb_emulator_symbol_value(const void* function) {
  Dl_info library;
  if (!dladdr(function, &library)) return -1;
  return static_cast<const char*>(function) - static_cast<const char*>(library.dli_fbase);
}
}
