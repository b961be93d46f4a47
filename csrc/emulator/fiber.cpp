#include "fiber.h"

#if defined(__x86_64__)
// Registers that a call must keep go to the stack that is left and come from the one that is entered.
extern "C" void sb_emulator_switch(void** from, void* to);
asm(R"(
  .text
  .type sb_emulator_switch, @function
sb_emulator_switch:
  push %rbx
  push %rbp
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbp
  pop %rbx
  ret
  .size sb_emulator_switch, . - sb_emulator_switch
)");
#endif

namespace sb::emulator {

#if defined(__x86_64__)

void switch_fiber(Fiber& from, Fiber& to) { sb_emulator_switch(&from.stack_pointer, to.stack_pointer); }

void start_fiber(Fiber& fiber, size_t bytes, void (*enter)()) {
  if (!fiber.stack) fiber.stack.reset(new char[bytes]);
  // As a call of `enter` leaves the stack: aligned to 16 bytes before its return address, of which there is none.
  auto top = reinterpret_cast<uintptr_t>(fiber.stack.get() + bytes) & ~uintptr_t(15);
  auto* slot = reinterpret_cast<void**>(top);
  *--slot = nullptr;
  *--slot = reinterpret_cast<void*>(enter);
  for (int i = 0; i < 6; ++i) *--slot = nullptr;
  fiber.stack_pointer = slot;
}

#else

void switch_fiber(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }

void start_fiber(Fiber& fiber, size_t bytes, void (*enter)()) {
  if (!fiber.stack) fiber.stack.reset(new char[bytes]);
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get(), fiber.context.uc_stack.ss_size = bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, enter, 0);
}

#endif

}  // namespace sb::emulator
