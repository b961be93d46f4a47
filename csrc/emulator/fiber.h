// Stacks that a thread switches between by itself. Systems that are not x86-64 use ucontext, which is slower.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace sb::emulator {

struct Fiber {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  std::unique_ptr<char[]> stack;
};

// Leaves `from`, which runs, and goes on where `to` left.
void switch_fiber(Fiber& from, Fiber& to);
// Makes the next switch to `fiber` call `enter`, which must not return.
void start_fiber(Fiber& fiber, size_t bytes, void (*enter)());

}  // namespace sb::emulator
