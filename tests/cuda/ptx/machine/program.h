// What ptx_program.py hands over: instructions, buffers and a launch; and the fault that a launch ends with.
#pragma once
#include <cstdint>
#include <string>

namespace ptx {

#define EACH_OPERATION(X)                                                                                            \
  X(add)                                                                                                             \
  X(sub)                                                                                                             \
  X(mul)                                                                                                             \
  X(mul_hi)                                                                                                          \
  X(mul_wide)                                                                                                        \
  X(mad)                                                                                                             \
  X(mad_hi)                                                                                                          \
  X(mad_wide) X(fma) X(div) X(rem) X(min) X(max) X(abs) X(neg) X(and_) X(or_) X(xor_) X(not_) X(cnot) X(shl) X(shr)  \
      X(shf_l) X(shf_r) X(lop3) X(prmt) X(bfe) X(bfi) X(popc) X(clz) X(brev) X(bfind) X(rcp) X(sqrt) X(rsqrt) X(ex2) \
          X(lg2) X(sin) X(cos) X(tanh) X(copysign) X(testp) X(rcp_high) X(setp) X(set) X(selp) X(mov) X(pack)        \
              X(unpack) X(cvt) X(cvt_pair) X(cvta) X(cvta_to) X(ld) X(st) X(bra) X(brx) X(ret) X(trap) X(nothing)    \
                  X(shfl) X(vote) X(match_any) X(redux) X(activemask) X(bar_warp) X(bar_block) X(ldmatrix)           \
                      X(movmatrix) X(mma) X(copy) X(commit) X(wait_group)
#define EACH_TYPE(X) X(pred) X(u8) X(u16) X(u32) X(u64) X(s8) X(s16) X(s32) X(s64) X(f16) X(bf16) X(f32) X(f64)
#define EACH_SPACE(X) X(generic) X(global) X(shared) X(local) X(param)
#define EACH_MODE(X)                                                                                                \
  X(none)                                                                                                           \
  X(eq)                                                                                                             \
  X(ne)                                                                                                             \
  X(lt)                                                                                                             \
  X(le)                                                                                                             \
  X(gt)                                                                                                             \
  X(ge)                                                                                                             \
  X(num) X(nan) X(equ) X(neu) X(ltu) X(leu) X(gtu) X(geu) X(rn) X(rz) X(rm) X(rp) X(rni) X(rzi) X(rmi) X(rpi) X(up) \
      X(down) X(bfly) X(idx) X(all) X(any) X(uni) X(ballot) X(add) X(min) X(max) X(and_) X(or_) X(xor_) X(wrap)     \
          X(clamp) X(finite) X(infinite) X(number) X(notanumber) X(normal) X(subnormal) X(trans)

#define NAME(x) x,
#define TEXT(x) #x,
namespace op {
enum Operation : int32_t { EACH_OPERATION(NAME) };
}
namespace ty {
enum Type : int32_t { EACH_TYPE(NAME) };
}
namespace sp {
enum Space : int32_t { EACH_SPACE(NAME) };
}
namespace md {
enum Mode : int32_t { EACH_MODE(NAME) };
}
const char* const kOperations[] = {EACH_OPERATION(TEXT)};
const char* const kTypes[] = {EACH_TYPE(TEXT)};
const char* const kSpaces[] = {EACH_SPACE(TEXT)};
const char* const kModes[] = {EACH_MODE(TEXT)};

enum Flags : int32_t { kFlush = 1, kSaturate = 2, kKeepNan = 4 };
constexpr int kWarp = 32, kOperands = 16;
// Generic addresses of shared and local memory; buffers lie where the process has them, far below.
constexpr uint64_t kSharedWindow = uint64_t(0x71) << 56, kLocalWindow = uint64_t(0x72) << 56,
                   kWindow = uint64_t(1) << 32;

struct Instruction {
  int32_t operation, type, from;  // `from`: the type that a conversion reads
  int32_t mode, space, flags;
  int32_t bits;                   // of the register that takes the result
  int32_t predicate, is_negated;  // a register, or -1
  int32_t results, operands;      // both lie in `at`, results first; a result -1 is thrown away
  int32_t target;
  int64_t offset;
  int32_t at[kOperands];
};
struct Constant {
  int64_t reg;
  uint64_t value;
};
struct Buffer {
  uint64_t address;
  int64_t bytes;
  unsigned char* memory;
  const unsigned char* permissions;  // of every byte: 1 to read, 2 to write
};
// Registers of the values that the machine gives, or -1.
struct Specials {
  int64_t tid, ntid, ctaid, nctaid, laneid, warpid, zero, one;
};
struct Launch {
  const Instruction* instructions;
  int64_t instruction_count, register_count;
  const Constant* constants;
  int64_t constant_count;
  Specials specials;
  int64_t blocks, threads, shared_bytes, local_bytes;
  const unsigned char* params;
  int64_t param_bytes;
  const Buffer* buffers;
  int64_t buffer_count;
  const int32_t* branch_targets;  // of brx
  int64_t branch_target_count;
  int64_t step_limit;       // of instructions of warps
  unsigned char* executed;  // per instruction
  // Results.
  int64_t steps, fault_block, fault_thread, fault_instruction;
  char fault[32], detail[256];
};

struct Fault {
  const char* name;
  std::string detail;
  int lane;
};

}  // namespace ptx
