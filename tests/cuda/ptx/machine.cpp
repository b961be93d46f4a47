// Executor B's machine: runs instructions of PTX, which ptx_program.py has decoded, for every thread of a grid. It
// shares no code with csrc. Threads of a warp run in groups that stand at the same instruction, the lowest one first;
// at instructions that name the lanes they need (bar.warp.sync, shfl, vote, match, redux) or need all (ldmatrix,
// movmatrix, mma) lanes wait until all of them have come, wherever the others are, as on devices since sm_70. Faults
// end the launch:
//   uninitialised register, uninitialised shared memory, uninitialised local memory
//   out of bounds      an access outside of the buffers, the shared or local memory or the parameters of the launch
//   misaligned         an address that is no multiple of the size of the access
//   write to an input  a write to a buffer that the launch may only read
//   race               two threads access a byte of shared or global memory, one writes, and nothing orders them; that
//                      several write the same to global memory is none
//   divergent warp, divergent barrier   lanes that others wait for have left or wait elsewhere
//   asynchronous copy  before the wait its target is read or written, its source changes, or its thread leaves
//   division by zero, trap, endless
#include <algorithm>
#include <cfenv>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

// -------------------- what ptx_program.py hands over

#define EACH_OPERATION(X)                                                                                              \
  X(add)                                                                                                               \
  X(sub)                                                                                                               \
  X(mul)                                                                                                               \
  X(mul_hi)                                                                                                            \
  X(mul_wide)                                                                                                          \
  X(mad)                                                                                                               \
  X(mad_hi) X(mad_wide) X(fma) X(div) X(rem) X(min) X(max) X(abs) X(neg) X(and_) X(or_) X(xor_) X(not_) X(cnot) X(shl) \
      X(shr) X(shf_l) X(shf_r) X(lop3) X(prmt) X(bfe) X(bfi) X(popc) X(clz) X(brev) X(bfind) X(rcp) X(sqrt) X(rsqrt)   \
          X(ex2) X(lg2) X(sin) X(cos) X(tanh) X(copysign) X(testp) X(rcp_high) X(setp) X(set) X(selp) X(mov) X(pack)   \
              X(unpack) X(cvt) X(cvt_pair) X(cvta) X(cvta_to) X(ld) X(st) X(bra) X(brx) X(ret) X(trap) X(nothing)      \
                  X(shfl) X(vote) X(match_any) X(redux) X(activemask) X(bar_warp) X(bar_block) X(ldmatrix)             \
                      X(movmatrix) X(mma) X(copy) X(commit) X(wait_group)
#define EACH_TYPE(X) X(pred) X(u8) X(u16) X(u32) X(u64) X(s8) X(s16) X(s32) X(s64) X(f16) X(bf16) X(f32) X(f64)
#define EACH_SPACE(X) X(generic) X(global) X(shared) X(local) X(param)
#define EACH_MODE(X)                                                                                                  \
  X(none)                                                                                                             \
  X(eq)                                                                                                               \
  X(ne)                                                                                                               \
  X(lt)                                                                                                               \
  X(le)                                                                                                               \
  X(gt)                                                                                                               \
  X(ge) X(num) X(nan) X(equ) X(neu) X(ltu) X(leu) X(gtu) X(geu) X(rn) X(rz) X(rm) X(rp) X(rni) X(rzi) X(rmi) X(rpi)   \
      X(up) X(down) X(bfly) X(idx) X(all) X(any) X(uni) X(ballot) X(add) X(min) X(max) X(and_) X(or_) X(xor_) X(wrap) \
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

// -------------------- numbers

struct F16 {
  uint16_t bits;
};
struct B16 {
  uint16_t bits;
};

template <class To, class From>
To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

double wide(F16 v) {
  const int sign = v.bits >> 15, exponent = v.bits >> 10 & 31, fraction = v.bits & 1023;
  double size;
  if (exponent == 31)
    size = fraction ? std::numeric_limits<double>::quiet_NaN() : std::numeric_limits<double>::infinity();
  else if (exponent == 0)
    size = fraction * 0x1p-24;
  else
    size = same_bits<double>(uint64_t(exponent - 15 + 1023) << 52 | uint64_t(fraction) << 42);
  return sign ? -size : size;
}
double wide(B16 v) { return double(same_bits<float>(uint32_t(v.bits) << 16)); }

// `v` rounded to a format of `digits` binary digits, with normal numbers from 2^lowest on and below 2^(top + 1).
double rounded(double v, int digits, int lowest, int top, int32_t mode) {
  if (!std::isfinite(v) || v == 0) return v;
  const int exponent = std::max(std::ilogb(v), lowest) - (digits - 1);
  const double scaled = std::ldexp(v, -exponent);
  double whole = std::trunc(scaled);
  const double rest = std::fabs(scaled - whole), away = v > 0 ? 1 : -1;
  const bool is_odd = std::fmod(whole, 2) != 0;
  if (mode == md::rn ? rest > 0.5 || (rest == 0.5 && is_odd)
                     : rest > 0 && ((mode == md::rp && v > 0) || (mode == md::rm && v < 0)))
    whole += away;
  const double result = std::ldexp(whole, exponent);
  if (result == 0) return std::copysign(0.0, v);
  if (std::ilogb(result) <= top) return result;
  const bool is_infinite = mode == md::rn || (mode == md::rp && v > 0) || (mode == md::rm && v < 0);
  const double largest = std::ldexp(2 - std::ldexp(1, 1 - digits), top);
  return std::copysign(is_infinite ? std::numeric_limits<double>::infinity() : largest, v);
}
F16 half_of(double v, int32_t mode) {
  if (std::isnan(v)) return {0x7fff};
  v = rounded(v, 11, -14, 15, mode);
  const uint16_t sign = std::signbit(v) ? 0x8000 : 0;
  v = std::fabs(v);
  if (std::isinf(v)) return {uint16_t(sign | 0x7c00)};
  if (v < std::ldexp(1, -14)) return {uint16_t(sign | int(std::ldexp(v, 24)))};
  const int exponent = std::ilogb(v);
  return {uint16_t(sign | (exponent + 15) << 10 | (int(std::ldexp(v, 10 - exponent)) - 1024))};
}
B16 bfloat_of(double v, int32_t mode) {
  if (std::isnan(v)) return {0x7fff};
  return {uint16_t(same_bits<uint32_t>(float(rounded(v, 8, -126, 127, mode))) >> 16)};
}
float float_of(double v, int32_t mode) {
  return std::isnan(v) ? same_bits<float>(0x7fffffffu) : float(rounded(v, 24, -126, 127, mode));
}
double whole_number(double v, int32_t mode) {
  switch (mode) {
    case md::rni: return std::nearbyint(v);
    case md::rzi: return std::trunc(v);
    case md::rmi: return std::floor(v);
    default: return std::ceil(v);
  }
}
float flushed(float v) { return std::fabs(v) < 0x1p-126f ? std::copysign(0.0f, v) : v; }

template <class T>
constexpr bool is_float = std::is_floating_point_v<T>;
template <class T>
using Unsigned = std::make_unsigned_t<T>;
template <class T, bool = is_float<T>>
struct Twice;
template <class T>
struct Twice<T, false> {
  using type = std::conditional_t<
      sizeof(T) == 8, std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>,
      std::conditional_t<
          std::is_signed_v<T>,
          std::conditional_t<sizeof(T) == 4, int64_t, std::conditional_t<sizeof(T) == 2, int32_t, int16_t>>,
          std::conditional_t<sizeof(T) == 4, uint64_t, std::conditional_t<sizeof(T) == 2, uint32_t, uint16_t>>>>;
};

// Calls visit with a zero of the type.
template <class Visit>
void with_integer(int32_t type, const Visit& visit) {
  switch (type) {
    case ty::u8: return visit(uint8_t());
    case ty::u16: return visit(uint16_t());
    case ty::u32: return visit(uint32_t());
    case ty::u64: return visit(uint64_t());
    case ty::s8: return visit(int8_t());
    case ty::s16: return visit(int16_t());
    case ty::s32: return visit(int32_t());
    case ty::s64: return visit(int64_t());
    default: throw Fault{"unknown instruction", "the machine has it for integers alone", 0};
  }
}
template <class Visit>
void with_float(int32_t type, const Visit& visit) {
  switch (type) {
    case ty::f32: return visit(float());
    case ty::f64: return visit(double());
    default: throw Fault{"unknown instruction", "the machine has it for f32 and f64 alone", 0};
  }
}
template <class Visit>
void with_number(int32_t type, const Visit& visit) {
  type == ty::f32 || type == ty::f64 ? with_float(type, visit) : with_integer(type, visit);
}
int size_of(int32_t type) {
  switch (type) {
    case ty::pred:
    case ty::u8:
    case ty::s8: return 1;
    case ty::u16:
    case ty::s16:
    case ty::f16:
    case ty::bf16: return 2;
    case ty::u32:
    case ty::s32:
    case ty::f32: return 4;
    default: return 8;
  }
}

template <class T>
bool compared(int32_t mode, T a, T b) {
  bool is_nan = false;
  if constexpr (is_float<T>) is_nan = std::isnan(a) || std::isnan(b);
  switch (mode) {
    case md::eq: return !is_nan && a == b;
    case md::ne: return !is_nan && a != b;
    case md::lt: return !is_nan && a < b;
    case md::le: return !is_nan && a <= b;
    case md::gt: return !is_nan && a > b;
    case md::ge: return !is_nan && a >= b;
    case md::equ: return is_nan || a == b;
    case md::neu: return is_nan || a != b;
    case md::ltu: return is_nan || a < b;
    case md::leu: return is_nan || a <= b;
    case md::gtu: return is_nan || a > b;
    case md::geu: return is_nan || a >= b;
    case md::num: return !is_nan;
    default: return is_nan;
  }
}

// -------------------- who accessed a byte last

struct Mark {
  int32_t block = -1, block_epoch = 0, warp_epoch = 0;
  int16_t thread = -1, crowd = 0;  // 0: one thread; 1: lanes of a warp; 2: warps of a block; 3: blocks
};
struct Byte {
  Mark write, read;
  int16_t copies = 0;  // of those that are under way, how many read it
};
struct Now {
  int32_t block, thread, block_epoch, warp_epoch;
};
// The bytes of a buffer, by pages that are made when a thread comes.
class Shadow {
 public:
  Byte& at(uint64_t x) {
    if (x / kPage >= pages.size()) pages.resize(x / kPage + 1);
    std::vector<Byte>& page = pages[x / kPage];
    if (page.empty()) page.resize(kPage);
    return page[x % kPage];
  }

 private:
  static constexpr uint64_t kPage = 512;
  std::vector<std::vector<Byte>> pages;
};

bool is_ordered(const Mark& mark, const Now& now) {
  if (mark.thread < 0) return true;
  if (mark.block != now.block || mark.crowd == 3) return false;
  if (mark.block_epoch != now.block_epoch) return true;
  if (mark.thread / kWarp != now.thread / kWarp || mark.crowd == 2) return false;
  return mark.warp_epoch != now.warp_epoch || (mark.thread == now.thread && mark.crowd == 0);
}
void note(Mark& mark, const Now& now) {
  int16_t crowd = 0;
  if (mark.thread >= 0) {
    if (mark.block != now.block || mark.crowd == 3)
      crowd = 3;
    else if (mark.block_epoch == now.block_epoch) {
      if (mark.thread / kWarp != now.thread / kWarp || mark.crowd == 2)
        crowd = 2;
      else if (mark.warp_epoch == now.warp_epoch && (mark.thread != now.thread || mark.crowd == 1))
        crowd = 1;
    }
  }
  mark = {now.block, now.block_epoch, now.warp_epoch, int16_t(now.thread), crowd};
}

// -------------------- the machine

enum class State : uint8_t { kReady, kAtWarp, kAtBlock, kDone };

struct Register {
  uint64_t value[kWarp];
};

// A copy from global to shared memory. Its bytes are taken when it starts and arrive when its thread has waited for its
// group: in between nobody may change the one place or touch the other.
struct Copy {
  uint64_t to, from;
  int bytes, read;  // what is not read is zero
  int32_t pc;
  unsigned char content[16];
};
struct Copies {
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> groups;
};

struct Warp {
  std::vector<Register> registers;
  std::vector<uint32_t> is_set;
  int32_t at[kWarp];
  State state[kWarp];
  uint32_t wanted[kWarp];  // lanes that a lane at a warp's instruction waits for
  int64_t barrier[kWarp];
  int32_t epoch = 0;
  std::vector<unsigned char> local, local_set;
  Copies copies[kWarp];
};

class Machine {
 public:
  explicit Machine(Launch& launch) : l(launch), shadows(size_t(launch.buffer_count)) {}

  void run() {
    warps.resize(size_t(l.threads / kWarp));
    for (block = 0; block < l.blocks; ++block) {
      shared.assign(size_t(l.shared_bytes), 0xa5), shared_set.assign(size_t(l.shared_bytes), 0);
      targeted.assign(size_t(l.shared_bytes), -1);
      shared_marks.assign(size_t(l.shared_bytes), Byte());
      block_epoch = 0;
      for (warp_index = 0; warp_index < int(warps.size()); ++warp_index) start();
      run_block();
    }
  }

  int64_t block = 0;
  int warp_index = 0;
  int32_t pc = 0;

 private:
  void start() {
    Warp& w = warps[size_t(warp_index)];
    w.registers.resize(size_t(l.register_count)), w.is_set.assign(size_t(l.register_count), 0);
    w.local.assign(size_t(l.local_bytes) * kWarp, 0xa5), w.local_set.assign(size_t(l.local_bytes) * kWarp, 0);
    w.epoch = 0;
    for (Copies& copies : w.copies) copies = {};
    for (int i = 0; i < kWarp; ++i) w.at[i] = 0, w.state[i] = State::kReady;
    for (int64_t c = 0; c < l.constant_count; ++c)
      give(w, l.constants[c].reg, [&](int) { return l.constants[c].value; });
    const Specials& s = l.specials;
    give(w, s.tid, [&](int lane) { return uint64_t(warp_index * kWarp + lane); });
    give(w, s.ntid, [&](int) { return uint64_t(l.threads); });
    give(w, s.ctaid, [&](int) { return uint64_t(block); });
    give(w, s.nctaid, [&](int) { return uint64_t(l.blocks); });
    give(w, s.laneid, [&](int lane) { return uint64_t(lane); });
    give(w, s.warpid, [&](int) { return uint64_t(warp_index); });
    give(w, s.zero, [&](int) { return uint64_t(0); });
    give(w, s.one, [&](int) { return uint64_t(1); });
  }
  template <class Value>
  static void give(Warp& w, int64_t reg, const Value& value) {
    if (reg < 0) return;
    for (int i = 0; i < kWarp; ++i) w.registers[size_t(reg)].value[i] = value(i);
    w.is_set[size_t(reg)] = 0xffffffffu;
  }

  void run_block() {
    while (true) {
      for (warp_index = 0; warp_index < int(warps.size()); ++warp_index) run_warp();
      int64_t waiting = 0, first = -1;
      for (int64_t t = 0; t < l.threads; ++t) {
        const Warp& w = warps[size_t(t / kWarp)];
        if (w.state[t % kWarp] != State::kAtBlock) continue;
        if (first < 0) first = t;
        ++waiting;
      }
      if (waiting == 0) return check_copies();
      Warp& one = warps[size_t(first / kWarp)];
      for (int64_t t = 0; t < l.threads; ++t) {
        Warp& w = warps[size_t(t / kWarp)];
        const int lane = int(t % kWarp);
        warp_index = int(t / kWarp);
        if (w.state[lane] != State::kAtBlock) {
          pc = one.at[first % kWarp];
          throw Fault{"divergent barrier", "this thread has left and others wait for it", lane};
        }
        pc = w.at[lane];
        if (w.barrier[lane] != one.barrier[first % kWarp])
          throw Fault{"divergent barrier", "threads wait at barriers of different numbers", lane};
      }
      ++block_epoch;
      for (Warp& w : warps)
        for (int i = 0; i < kWarp; ++i) w.state[i] = State::kReady, ++w.at[i];
    }
  }

  void check_copies() {
    for (warp_index = 0; warp_index < int(warps.size()); ++warp_index)
      for (int lane = 0; lane < kWarp; ++lane) {
        Copies& of_lane = warps[size_t(warp_index)].copies[lane];
        of_lane.groups.push_back(of_lane.open);
        for (const auto& group : of_lane.groups) {
          if (group.empty()) continue;
          pc = group.front().pc;
          throw Fault{"asynchronous copy", "the thread has left without a wait for it", lane};
        }
      }
    warp_index = 0;
  }

  // Runs a warp until all of its lanes have left or wait for the block.
  void run_warp() {
    warp = &warps[size_t(warp_index)];
    while (true) {
      int32_t lowest = std::numeric_limits<int32_t>::max(), next = lowest;
      mask = 0;
      bool any_at_warp = false;
      for (int i = 0; i < kWarp; ++i) {
        any_at_warp |= warp->state[i] == State::kAtWarp;
        if (warp->state[i] != State::kReady) continue;
        if (warp->at[i] < lowest)
          next = lowest, lowest = warp->at[i], mask = 1u << i;
        else if (warp->at[i] == lowest)
          mask |= 1u << i;
        else
          next = std::min(next, warp->at[i]);
      }
      if (mask == 0) {
        if (!any_at_warp) return;
        fail_waiting();
      }
      // As long as the group stays together and below the others.
      pc = lowest;
      do {
        if (++l.steps > l.step_limit) throw Fault{"endless", "it runs longer than a test should", first_lane(mask)};
      } while (step() && pc < next);
    }
  }
  [[noreturn]] void fail_waiting() {
    for (int i = 0; i < kWarp; ++i) {
      if (warp->state[i] != State::kAtWarp) continue;
      pc = warp->at[i];
      for (int other = 0; other < kWarp; ++other) {
        if (!(warp->wanted[i] >> other & 1)) continue;
        if (warp->state[other] == State::kAtWarp && warp->at[other] == pc) continue;
        const char* what = warp->state[other] == State::kDone      ? " has left"
                           : warp->state[other] == State::kAtBlock ? " waits for the block"
                                                                   : " waits at another instruction";
        throw Fault{"divergent warp", "the lane waits for lane " + std::to_string(other) + ", which" + what, i};
      }
      throw Fault{"divergent warp", "lanes that wait for each other name different lanes", i};
    }
    throw Fault{"divergent warp", "lanes wait", 0};
  }

  static int first_lane(uint32_t lanes) { return lanes ? __builtin_ctz(lanes) : 0; }
  template <class Body>
  static void each(uint32_t lanes, const Body& body) {
    if (lanes == 0xffffffffu) {
      for (int i = 0; i < kWarp; ++i) body(i);
    } else {
      for (; lanes; lanes &= lanes - 1) body(__builtin_ctz(lanes));
    }
  }

  template <class T>
  T get(int operand, int lane) const {
    T v;
    std::memcpy(&v, &warp->registers[size_t(i->at[i->results + operand])].value[lane], sizeof(T));
    return v;
  }
  // Values of a signed type fill a wider register with their sign.
  template <class T>
  void put(int result, int lane, T v) {
    const int32_t reg = i->at[result];
    if (reg < 0) return;
    uint64_t bits = 0;
    if constexpr (std::is_integral_v<T> && std::is_signed_v<T>) {
      bits = uint64_t(int64_t(v));
      if (i->bits < 64) bits &= (uint64_t(1) << i->bits) - 1;
    } else {
      std::memcpy(&bits, &v, sizeof(T));
    }
    warp->registers[size_t(reg)].value[lane] = bits;
  }
  bool flag(int32_t bit) const { return (i->flags & bit) != 0; }
  template <class T>
  T in(int operand, int lane) const {
    T v = get<T>(operand, lane);
    if constexpr (std::is_same_v<T, float>)
      if (flag(kFlush)) v = flushed(v);
    return v;
  }
  template <class T>
  void out(int lane, T v) {
    if constexpr (is_float<T>) {
      if (flag(kSaturate)) v = v >= 0 ? std::min(v, T(1)) : T(0);
      if constexpr (std::is_same_v<T, float>)
        if (flag(kFlush)) v = flushed(v);
    }
    put(0, lane, v);
  }

  void check_set(uint32_t lanes) {
    for (int k = 0; k < i->operands; ++k) {
      const uint32_t missing = lanes & ~warp->is_set[size_t(i->at[i->results + k])];
      if (missing)
        throw Fault{"uninitialised register", "operand " + std::to_string(k + 1) + " of those that are read",
                    first_lane(missing)};
    }
  }
  void set_results(uint32_t lanes) {
    for (int k = 0; k < i->results; ++k)
      if (i->at[k] >= 0) warp->is_set[size_t(i->at[k])] |= lanes;
  }

  // Executes the instruction at pc for the lanes of the group, and says whether they are still one.
  bool step() {
    i = l.instructions + pc;
    uint32_t lanes = mask;
    if (i->predicate >= 0) {
      const uint32_t missing = mask & ~warp->is_set[size_t(i->predicate)];
      if (missing) throw Fault{"uninitialised register", "the predicate", first_lane(missing)};
      const Register& predicate = warp->registers[size_t(i->predicate)];
      each(mask, [&](int lane) {
        if ((predicate.value[lane] != 0) == (i->is_negated != 0)) lanes &= ~(1u << lane);
      });
    }
    if (lanes) l.executed[pc] = 1, check_set(lanes);
    switch (i->operation) {
      case op::bra:
      case op::brx: return branch(lanes);
      case op::ret: each(lanes, [&](int lane) { warp->state[lane] = State::kDone; }); return advance(mask & ~lanes);
      case op::trap:
        if (lanes) throw Fault{"trap", "the kernel stops itself", first_lane(lanes)};
        return advance(mask);
      case op::bar_block:
        each(lanes, [&](int lane) {
          warp->barrier[lane] = int64_t(get<uint32_t>(0, lane)), warp->state[lane] = State::kAtBlock;
          warp->at[lane] = pc;
        });
        return advance(mask & ~lanes);
      case op::shfl:
      case op::vote:
      case op::match_any:
      case op::redux:
      case op::ldmatrix:
      case op::movmatrix:
      case op::mma:
      case op::bar_warp: return meet(lanes);
      default: break;
    }
    if (lanes) execute(lanes), set_results(lanes);
    return advance(mask);
  }
  // What is left of the group goes on behind the instruction.
  bool advance(uint32_t lanes) {
    ++pc;
    each(lanes, [&](int lane) { warp->at[lane] = pc; });
    return lanes == mask;
  }
  bool branch(uint32_t lanes) {
    each(mask & ~lanes, [&](int lane) { warp->at[lane] = pc + 1; });
    each(lanes, [&](int lane) {
      int32_t target = i->target;
      if (i->operation == op::brx) {
        const uint32_t choice = get<uint32_t>(0, lane);
        if (choice >= uint32_t(i->offset))
          throw Fault{"out of bounds", "branch " + std::to_string(choice) + " of " + std::to_string(i->offset), lane};
        target = l.branch_targets[i->target + int32_t(choice)];
      }
      warp->at[lane] = target;
    });
    return false;
  }

  // Lanes come to an instruction that needs several, which runs once all that they name are there.
  bool meet(uint32_t lanes) {
    const int named = i->operands - 1;
    each(lanes, [&](int lane) {
      warp->wanted[lane] = get<uint32_t>(named, lane);
      if (!(warp->wanted[lane] >> lane & 1))
        throw Fault{"divergent warp", "the lane is not among those that it names", lane};
      warp->state[lane] = State::kAtWarp, warp->at[lane] = pc;
    });
    const bool is_one = advance(mask & ~lanes) && lanes == 0;
    --pc;
    for (uint32_t rest = lanes; rest;) {
      const uint32_t wanted = warp->wanted[first_lane(rest)];
      bool all = true;
      each(wanted, [&](int lane) {
        all = all && warp->state[lane] == State::kAtWarp && warp->at[lane] == pc && warp->wanted[lane] == wanted;
      });
      if (all) {
        together(wanted), set_results(wanted);
        each(wanted, [&](int lane) { warp->state[lane] = State::kReady, warp->at[lane] = pc + 1; });
      }
      rest &= ~wanted;
    }
    if (is_one || (lanes == mask && warp->wanted[first_lane(lanes)] == mask)) {
      ++pc;
      return true;
    }
    return false;
  }
  void together(uint32_t lanes) {
    switch (i->operation) {
      case op::bar_warp: ++warp->epoch; return;
      case op::shfl: return shuffle(lanes);
      case op::vote: return vote(lanes);
      case op::ldmatrix: return load_matrices();
      case op::movmatrix: return transpose_matrix();
      case op::mma: return multiply_add();
      case op::match_any: {
        uint64_t values[kWarp];
        each(lanes, [&](int lane) { values[lane] = get<uint64_t>(0, lane); });
        each(lanes, [&](int lane) {
          uint32_t same = 0;
          each(lanes, [&](int other) { same |= uint32_t(values[other] == values[lane]) << other; });
          put(0, lane, same);
        });
        return;
      }
      default:
        return with_integer(i->type, [&](auto zero) {
          using T = decltype(zero);
          T total = get<T>(0, first_lane(lanes));
          each(lanes & (lanes - 1), [&](int lane) {
            const T v = get<T>(0, lane);
            switch (i->mode) {
              case md::add: total = T(Unsigned<T>(total) + Unsigned<T>(v)); break;
              case md::min: total = std::min(total, v); break;
              case md::max: total = std::max(total, v); break;
              case md::and_: total &= v; break;
              case md::or_: total |= v; break;
              default: total ^= v;
            }
          });
          each(lanes, [&](int lane) { put(0, lane, total); });
        });
    }
  }
  void shuffle(uint32_t lanes) {
    uint32_t given[kWarp];
    each(lanes, [&](int lane) { given[lane] = get<uint32_t>(0, lane); });
    each(lanes, [&](int lane) {
      const uint32_t b = get<uint32_t>(1, lane) & 31, c = get<uint32_t>(2, lane), segment = c >> 8 & 31, clamp = c & 31;
      const int highest = int((uint32_t(lane) & segment) | (clamp & ~segment)), lowest = int(uint32_t(lane) & segment);
      int from;
      bool is_inside;
      switch (i->mode) {
        case md::up: from = lane - int(b), is_inside = from >= highest; break;
        case md::down: from = lane + int(b), is_inside = from <= highest; break;
        case md::bfly: from = lane ^ int(b), is_inside = from <= highest; break;
        default: from = lowest | int(b & ~segment), is_inside = from <= highest;
      }
      if (!is_inside) from = lane;
      if (!(lanes >> from & 1))
        throw Fault{"divergent warp", "the shuffle reads lane " + std::to_string(from) + ", which takes no part", lane};
      put(0, lane, given[from]);
      if (i->results > 1) put(1, lane, uint8_t(is_inside));
    });
  }
  void vote(uint32_t lanes) {
    uint32_t yes = 0;
    each(lanes, [&](int lane) { yes |= uint32_t(get<uint8_t>(0, lane) != 0) << lane; });
    each(lanes, [&](int lane) {
      switch (i->mode) {
        case md::ballot: return put(0, lane, yes);
        case md::all: return put(0, lane, uint8_t(yes == lanes));
        case md::any: return put(0, lane, uint8_t(yes != 0));
        default: return put(0, lane, uint8_t(yes == lanes || yes == 0));
      }
    });
  }

  // -------------------- matrices

  // Of an 8 x 8 matrix of 16-bit numbers lane l holds the elements 2 (l % 4) and the next one of row l / 4.
  struct Matrix {
    uint16_t element[8][8];

    uint32_t pair(int lane, bool is_transposed) const {
      const int major = lane / 4, minor = lane % 4 * 2;
      const uint32_t low = is_transposed ? element[minor][major] : element[major][minor],
                     high = is_transposed ? element[minor + 1][major] : element[major][minor + 1];
      return low | high << 16;
    }
  };
  // ldmatrix.m8n8: lane l names row l % 8 of matrix l / 8; lanes beyond the last matrix name nothing.
  void load_matrices() {
    Matrix matrices[4];
    for (int lane = 0; lane < 8 * i->results; ++lane) {
      const uint64_t address = get<uint32_t>(0, lane) + uint64_t(i->offset);
      std::memcpy(matrices[lane / 8].element[lane % 8], memory(sp::shared, address, 16, nullptr, lane), 16);
    }
    for (int lane = 0; lane < kWarp; ++lane)
      for (int m = 0; m < i->results; ++m) put(m, lane, matrices[m].pair(lane, i->mode == md::trans));
  }
  void transpose_matrix() {
    Matrix matrix;
    for (int lane = 0; lane < kWarp; ++lane) {
      const auto pair = get<uint32_t>(0, lane);
      std::memcpy(&matrix.element[lane / 4][lane % 4 * 2], &pair, 4);
    }
    for (int lane = 0; lane < kWarp; ++lane) put(0, lane, matrix.pair(lane, true));
  }
  // mma.row.col with 16 rows, 8 columns and `depth` products for each, of pairs of 16-bit numbers or of TF32. Products
  // are exact, and what is added to the sum is rounded to float32, in the order of the products; devices do not say
  // theirs.
  void multiply_add() {
    const bool is_tf32 = i->type == ty::f32;
    const int depth = int(i->offset), lefts = is_tf32 ? 4 : depth / 4, rights = is_tf32 ? 2 : depth / 8,
              of_register = is_tf32 ? 1 : 2;  // numbers; a lane's neighbours are 4 registers on
    double left[16][16], right[16][8];
    float sums[16][8];
    const auto number = [&](int operand, int lane, int half) {
      const auto word = get<uint32_t>(operand, lane);
      if (is_tf32) {
        float upper;
        const uint32_t read = word & 0xffffe000u;
        std::memcpy(&upper, &read, sizeof upper);
        return double(upper);
      }
      const auto bits = uint16_t(word >> 16 * half);
      return i->type == ty::f16 ? wide(F16{bits}) : wide(B16{bits});
    };
    for (int lane = 0; lane < kWarp; ++lane) {
      const int row = lane / 4, first = lane % 4 * of_register, next = 4 * of_register, pair = lane % 4 * 2;
      for (int half = 0; half < of_register; ++half) {
        for (int k = 0; k < lefts; ++k) left[row + k % 2 * 8][first + half + k / 2 * next] = number(k, lane, half);
        for (int k = 0; k < rights; ++k) right[first + half + k * next][row] = number(lefts + k, lane, half);
      }
      for (int k = 0; k < 4; ++k) sums[row + k / 2 * 8][pair + k % 2] = get<float>(lefts + rights + k, lane);
    }
    for (int k = 0; k < depth; ++k)
      for (int row = 0; row < 16; ++row)
        for (int column = 0; column < 8; ++column)
          sums[row][column] = float(double(sums[row][column]) + left[row][k] * right[k][column]);
    for (int lane = 0; lane < kWarp; ++lane)
      for (int k = 0; k < 4; ++k) put(k, lane, sums[lane / 4 + k / 2 * 8][lane % 4 * 2 + k % 2]);
  }

  // -------------------- copies

  void start_copies(uint32_t lanes) {
    each(lanes, [&](int lane) {
      Copy copy{get<uint32_t>(0, lane) + uint64_t(i->target),
                get<uint64_t>(1, lane) + uint64_t(i->offset),
                i->bits,
                0,
                pc,
                {}};
      const uint32_t read = get<uint32_t>(2, lane);
      if (read > uint32_t(copy.bytes))
        throw Fault{"out of bounds",
                    "a copy of " + std::to_string(copy.bytes) + " bytes that reads " + std::to_string(read), lane};
      copy.read = int(read);
      aligned(copy.from, copy.bytes, lane);
      if (copy.read) {
        std::memcpy(copy.content, global_memory(copy.from, copy.read, nullptr, lane), read);
        each_source(copy, lane, [](Byte& byte) { ++byte.copies; });
      }
      memory(sp::shared, copy.to, copy.bytes, copy.content, lane);
      std::fill_n(&targeted[copy.to], copy.bytes, int16_t(warp_index * kWarp + lane));
      warp->copies[lane].open.push_back(copy);
    });
  }
  void commit_copies(uint32_t lanes) {
    each(lanes, [&](int lane) {
      Copies& of_lane = warp->copies[lane];
      of_lane.groups.push_back(std::move(of_lane.open));
      of_lane.open.clear();
    });
  }
  void wait_copies(uint32_t lanes) {
    each(lanes, [&](int lane) {
      auto& groups = warp->copies[lane].groups;
      while (int64_t(groups.size()) > i->offset) {
        for (const Copy& copy : groups.front()) {
          if (copy.read) {
            // Both accesses may happen as late as now.
            each_source(copy, lane, [](Byte& byte) { --byte.copies; });
            global_memory(copy.from, copy.read, nullptr, lane);
          }
          std::fill_n(&targeted[copy.to], copy.bytes, int16_t(-1));
          std::memcpy(memory(sp::shared, copy.to, copy.bytes, copy.content, lane), copy.content, size_t(copy.bytes));
        }
        groups.erase(groups.begin());
      }
    });
  }
  // Of the bytes that a copy reads, those that the launch may write.
  template <class Visit>
  void each_source(const Copy& copy, int lane, const Visit& visit) {
    const Buffer& b = buffer_of(copy.from, copy.read, false, lane);
    for (uint64_t x = copy.from - b.address; x < copy.from - b.address + uint64_t(copy.read); ++x)
      if (b.permissions[x] & 2) visit(shadows[size_t(last_buffer)].at(x));
  }

  // -------------------- memory

  Now now(int lane) const { return {int32_t(block), warp_index * kWarp + lane, block_epoch, warp->epoch}; }
  // `is_same`: the byte is written as it is, so that the order of the writes does not matter.
  void order(Byte& byte, bool is_write, bool is_same, int lane, const char* kind, uint64_t address) {
    const Now current = now(lane);
    const Mark* other = !is_same && !is_ordered(byte.write, current)  ? &byte.write
                        : is_write && !is_ordered(byte.read, current) ? &byte.read
                                                                      : nullptr;
    if (other) {
      char text[200];
      std::snprintf(text, sizeof text, "%s memory at 0x%llx was %s by thread %d of block %d, and nothing orders it",
                    kind, static_cast<unsigned long long>(address), other == &byte.write ? "written" : "read",
                    other->thread, other->block);
      throw Fault{"race", text, lane};
    }
    note(is_write ? byte.write : byte.read, current);
  }
  [[noreturn]] static void outside(const char* kind, uint64_t address, int bytes, bool is_write, int lane) {
    char text[200];
    std::snprintf(text, sizeof text, "a %s of %d bytes at 0x%llx of %s memory", is_write ? "write" : "read", bytes,
                  static_cast<unsigned long long>(address), kind);
    throw Fault{"out of bounds", text, lane};
  }

  static void aligned(uint64_t address, int bytes, int lane) {
    if (address % uint64_t(bytes) == 0) return;
    char text[100];
    std::snprintf(text, sizeof text, "%d bytes at 0x%llx", bytes, static_cast<unsigned long long>(address));
    throw Fault{"misaligned", text, lane};
  }

  // `written`: what a write puts there, null for a read.
  unsigned char* memory(int32_t space, uint64_t address, int bytes, const unsigned char* written, int lane) {
    const bool is_write = written != nullptr;
    if (space == sp::generic) {
      if (address >= kSharedWindow && address < kSharedWindow + kWindow)
        return memory(sp::shared, address - kSharedWindow, bytes, written, lane);
      if (address >= kLocalWindow && address < kLocalWindow + kWindow)
        return memory(sp::local, address - kLocalWindow, bytes, written, lane);
      space = sp::global;
    }
    aligned(address, bytes, lane);
    switch (space) {
      case sp::shared: {
        if (address > shared.size() || uint64_t(bytes) > shared.size() - address)
          outside("shared", address, bytes, is_write, lane);
        for (uint64_t x = address; x < address + uint64_t(bytes); ++x) {
          if (targeted[x] >= 0)
            throw Fault{"asynchronous copy",
                        "byte " + std::to_string(x) + " of shared memory, which thread " + std::to_string(targeted[x]) +
                            " fills and has not waited for",
                        lane};
          if (!is_write && !shared_set[x])
            throw Fault{"uninitialised shared memory", "byte " + std::to_string(x), lane};
          order(shared_marks[x], is_write, false, lane, "shared", x);
          shared_set[x] |= is_write;
        }
        return &shared[address];
      }
      case sp::local: {
        const uint64_t size = uint64_t(l.local_bytes), base = uint64_t(lane) * size;
        if (address > size || uint64_t(bytes) > size - address) outside("local", address, bytes, is_write, lane);
        for (uint64_t x = base + address; x < base + address + uint64_t(bytes); ++x) {
          if (!is_write && !warp->local_set[x])
            throw Fault{"uninitialised local memory", "byte " + std::to_string(x - base), lane};
          warp->local_set[x] |= is_write;
        }
        return &warp->local[base + address];
      }
      case sp::param:
        if (is_write || address > uint64_t(l.param_bytes) || uint64_t(bytes) > uint64_t(l.param_bytes) - address)
          outside("parameter", address, bytes, is_write, lane);
        return const_cast<unsigned char*>(l.params) + address;
      default: return global_memory(address, bytes, written, lane);
    }
  }
  const Buffer& buffer_of(uint64_t address, int bytes, bool is_write, int lane) {
    const auto holds = [&](const Buffer& b) {
      const uint64_t size = uint64_t(b.bytes), into = address - b.address;
      return b.address <= address && into <= size && uint64_t(bytes) <= size - into;
    };
    if (last_buffer >= l.buffer_count || !holds(l.buffers[last_buffer])) {
      last_buffer = 0;
      while (last_buffer < l.buffer_count && !holds(l.buffers[last_buffer])) ++last_buffer;
      if (last_buffer == l.buffer_count) outside("global", address, bytes, is_write, lane);
    }
    return l.buffers[last_buffer];
  }
  unsigned char* global_memory(uint64_t address, int bytes, const unsigned char* written, int lane) {
    const bool is_write = written != nullptr;
    const Buffer& b = buffer_of(address, bytes, is_write, lane);
    const uint64_t first = address - b.address;
    Shadow& shadow = shadows[size_t(last_buffer)];
    for (uint64_t x = first; x < first + uint64_t(bytes); ++x) {
      if (!(b.permissions[x] & 1)) outside("global", address, bytes, is_write, lane);
      if (!(b.permissions[x] & 2)) {
        if (is_write) throw Fault{"write to an input", "the launch may only read this buffer", lane};
        continue;
      }
      Byte& byte = shadow.at(x);
      const bool is_same = is_write && written[x - first] == b.memory[x];
      order(byte, is_write, is_same, lane, "global", b.address + x);
      if (is_write && !is_same && byte.copies)
        throw Fault{"asynchronous copy", "a write to the source of a copy that its thread has not waited for", lane};
    }
    return b.memory + first;
  }

  // The width of a vector is the number of its registers.
  void load(uint32_t lanes) {
    const int size = size_of(i->type), count = i->results;
    each(lanes, [&](int lane) {
      const uint64_t address = get<uint64_t>(0, lane) + uint64_t(i->offset);
      const unsigned char* from = memory(i->space, address, size * count, nullptr, lane);
      for (int k = 0; k < count; ++k) {
        if (i->type == ty::f32 || i->type == ty::f64 || i->type == ty::f16 || i->type == ty::bf16) {
          uint64_t bits = 0;
          std::memcpy(&bits, from + k * size, size_t(size));
          put(k, lane, bits);
        } else {
          with_integer(i->type, [&](auto v) {
            std::memcpy(&v, from + k * size, sizeof v);
            put(k, lane, v);
          });
        }
      }
    });
  }
  void store(uint32_t lanes) {
    const int size = size_of(i->type), count = i->operands - 1;
    each(lanes, [&](int lane) {
      const uint64_t address = get<uint64_t>(0, lane) + uint64_t(i->offset);
      unsigned char written[8 * kOperands];
      for (int k = 0; k < count; ++k) {
        const uint64_t bits = get<uint64_t>(1 + k, lane);
        std::memcpy(written + k * size, &bits, size_t(size));
      }
      std::memcpy(memory(i->space, address, size * count, written, lane), written, size_t(size * count));
    });
  }

  // -------------------- lanes for themselves

  template <class T, class F>
  void unary(uint32_t lanes, const F& f) {
    each(lanes, [&](int lane) { out<T>(lane, T(f(in<T>(0, lane)))); });
  }
  template <class T, class F>
  void binary(uint32_t lanes, const F& f) {
    each(lanes, [&](int lane) { out<T>(lane, T(f(in<T>(0, lane), in<T>(1, lane)))); });
  }
  template <class F>
  void integers(uint32_t lanes, const F& f) {
    with_integer(i->type, [&](auto zero) { binary<decltype(zero)>(lanes, f); });
  }
  template <class F>
  void floats(uint32_t lanes, const F& f) {
    with_float(i->type, [&](auto zero) { unary<decltype(zero)>(lanes, f); });
  }
  // Bits, or truth values.
  template <class F>
  void bits(uint32_t lanes, const F& f) {
    each(lanes, [&](int lane) {
      const uint64_t v = f(get<uint64_t>(0, lane), i->operands > 1 ? get<uint64_t>(1, lane) : 0);
      put(0, lane,
          i->type == ty::pred     ? v & 1
          : size_of(i->type) == 8 ? v
                                  : v & ((uint64_t(1) << 8 * size_of(i->type)) - 1));
    });
  }

  template <class T>
  T quotient(T a, T b, int lane, bool is_rest) {
    if constexpr (is_float<T>) {
      return is_rest ? std::fmod(a, b) : a / b;
    } else {
      if (b == 0) throw Fault{"division by zero", "of whole numbers", lane};
      if constexpr (std::is_signed_v<T>)
        if (b == -1) return is_rest ? T(0) : T(Unsigned<T>(0) - Unsigned<T>(a));
      return is_rest ? T(a % b) : T(a / b);
    }
  }

  template <class T>
  void arithmetic(uint32_t lanes) {
    using U = typename std::conditional_t<is_float<T>, std::type_identity<T>, std::make_unsigned<T>>::type;
    switch (i->operation) {
      case op::add: return binary<T>(lanes, [](T a, T b) { return T(U(a) + U(b)); });
      case op::sub: return binary<T>(lanes, [](T a, T b) { return T(U(a) - U(b)); });
      case op::mul:
        return binary<T>(lanes, [](T a, T b) {
          if constexpr (is_float<T>)
            return a * b;
          else
            return T(uint64_t(a) * uint64_t(b));
        });
      case op::div:
      case op::rem:
        return each(lanes, [&](int lane) {
          out<T>(lane, quotient<T>(in<T>(0, lane), in<T>(1, lane), lane, i->operation == op::rem));
        });
      case op::min:
      case op::max: {
        const bool is_max = i->operation == op::max;
        return binary<T>(lanes, [&](T a, T b) {
          if constexpr (is_float<T>) {
            if (std::isnan(a) || std::isnan(b)) {
              if (flag(kKeepNan) || (std::isnan(a) && std::isnan(b))) return std::numeric_limits<T>::quiet_NaN();
              return std::isnan(a) ? b : a;
            }
            if (a == b) return std::signbit(a) == is_max ? b : a;  // -0 < 0
          }
          return is_max ? std::max(a, b) : std::min(a, b);
        });
      }
      case op::abs:
        return unary<T>(lanes, [](T a) {
          if constexpr (is_float<T>)
            return std::fabs(a);
          else
            return a < 0 ? T(U(0) - U(a)) : a;
        });
      case op::neg:
        return unary<T>(lanes, [](T a) {
          if constexpr (is_float<T>)
            return -a;
          else
            return T(U(0) - U(a));
        });
      default: break;
    }
  }
  template <class T>
  void wide_arithmetic(uint32_t lanes) {
    using W = typename Twice<T>::type;
    each(lanes, [&](int lane) {
      const W product = W(W(get<T>(0, lane)) * W(get<T>(1, lane)));
      switch (i->operation) {
        case op::mul_hi: return put(0, lane, T(product >> (8 * sizeof(T))));
        case op::mad: return put(0, lane, T(uint64_t(product) + uint64_t(get<T>(2, lane))));
        case op::mad_hi: return put(0, lane, T(uint64_t(product >> (8 * sizeof(T))) + uint64_t(get<T>(2, lane))));
        default: break;
      }
      if constexpr (sizeof(T) < 8) {
        if (i->operation == op::mul_wide) return put(0, lane, product);
        return put(0, lane, W(Unsigned<W>(product) + Unsigned<W>(get<W>(2, lane))));
      }
    });
  }
  template <class T>
  void shift(uint32_t lanes) {
    each(lanes, [&](int lane) {
      const T v = get<T>(0, lane);
      const uint32_t by = get<uint32_t>(1, lane), width = 8 * sizeof(T);
      T result;
      if (i->operation == op::shl)
        result = by >= width ? T(0) : T(Unsigned<T>(v) << by);
      else
        result = T(v >> std::min(by, width - 1));
      if (i->operation == op::shr && by >= width && !std::is_signed_v<T>) result = 0;
      put(0, lane, result);
    });
  }
  template <class T>
  void bit_field(uint32_t lanes) {
    constexpr int width = 8 * sizeof(T);
    using U = Unsigned<T>;
    each(lanes, [&](int lane) {
      if (i->operation == op::bfe) {
        const U v = get<U>(0, lane);
        const int first = int(get<uint32_t>(1, lane) & 255), count = int(get<uint32_t>(2, lane) & 255);
        const int sign_at = std::min(first + count - 1, width - 1);
        const U fill = std::is_signed_v<T> && count > 0 && (v >> sign_at & 1) ? ~U(0) : U(0);
        U field = first >= width ? fill : U(v >> first);
        const int held = std::min(count, std::max(0, width - first));
        if (held < width) field = U((field & ((U(1) << held) - 1)) | U(fill << held));
        put(0, lane, field);
      } else {
        const U v = get<U>(0, lane), into = get<U>(1, lane);
        const int first = int(get<uint32_t>(2, lane) & 255), count = int(get<uint32_t>(3, lane) & 255);
        U result = into;
        for (int k = 0; k < count && first + k < width && k < width; ++k)
          result = U((result & ~(U(1) << (first + k))) | U((v >> k & 1) << (first + k)));
        put(0, lane, result);
      }
    });
  }

  template <class T>
  void convert_to(uint32_t lanes) {  // from T
    each(lanes, [&](int lane) {
      if constexpr (std::is_integral_v<T>) {
        convert_integer(lane, get<T>(0, lane));
      } else if constexpr (is_float<T>) {
        convert_float(lane, double(in<T>(0, lane)));
      } else {
        convert_float(lane, wide(get<T>(0, lane)));
      }
    });
  }
  template <class T>
  void convert_integer(int lane, T v) {
    switch (i->type) {
      case ty::f32:
      case ty::f64: {
        const int modes[] = {FE_TONEAREST, FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD};
        std::fesetround(modes[i->mode - md::rn]);
        volatile T given = v;  // what is known is converted by the compiler, to nearest
        if (i->type == ty::f32) {
          volatile float result = float(given);
          put(0, lane, float(result));
        } else {
          volatile double result = double(given);
          put(0, lane, double(result));
        }
        std::fesetround(FE_TONEAREST);
        return;
      }
      case ty::f16: return put(0, lane, half_of(double(v), i->mode).bits);
      case ty::bf16: return put(0, lane, bfloat_of(double(v), i->mode).bits);
      default: break;
    }
    with_integer(i->type, [&](auto zero) {
      using To = decltype(zero);
      if (flag(kSaturate)) {
        const __int128 value = v, low = std::numeric_limits<To>::min(), high = std::numeric_limits<To>::max();
        return put(0, lane, To(value < low ? low : value > high ? high : value));
      }
      put(0, lane, To(v));
    });
  }
  void convert_float(int lane, double v) {
    const bool is_whole = i->mode >= md::rni && i->mode <= md::rpi;
    switch (i->type) {
      case ty::f64: return out<double>(lane, is_whole ? whole_number(v, i->mode) : v);
      case ty::f32: {
        if (is_whole) return out<float>(lane, float(whole_number(v, i->mode)));
        return out<float>(lane, float_of(v, i->mode == md::none ? int32_t(md::rn) : i->mode));
      }
      case ty::f16: return put(0, lane, half_of(flag(kSaturate) ? saturated(v) : v, i->mode).bits);
      case ty::bf16: return put(0, lane, bfloat_of(flag(kSaturate) ? saturated(v) : v, i->mode).bits);
      default: break;
    }
    with_integer(i->type, [&](auto zero) {
      using To = decltype(zero);
      const double whole = whole_number(v, i->mode), low = double(std::numeric_limits<To>::min()),
                   above = std::ldexp(1, 8 * int(sizeof(To)) - int(std::is_signed_v<To>));
      if (std::isnan(v)) return put(0, lane, sizeof(To) == 8 ? To(Unsigned<To>(1) << 63) : To(0));
      put(0, lane,
          whole < low      ? std::numeric_limits<To>::min()
          : whole >= above ? std::numeric_limits<To>::max()
                           : To(whole));
    });
  }
  static double saturated(double v) { return v >= 0 ? std::min(v, 1.0) : 0.0; }

  void execute(uint32_t lanes) {
    switch (i->operation) {
      case op::nothing: return;
      case op::add:
      case op::sub:
      case op::mul:
      case op::div:
      case op::rem:
      case op::min:
      case op::max:
      case op::abs:
      case op::neg: return with_number(i->type, [&](auto zero) { arithmetic<decltype(zero)>(lanes); });
      case op::mul_hi:
      case op::mul_wide:
      case op::mad:
      case op::mad_hi:
      case op::mad_wide: return with_integer(i->type, [&](auto zero) { wide_arithmetic<decltype(zero)>(lanes); });
      case op::fma:
        return with_float(i->type, [&](auto zero) {
          using T = decltype(zero);
          each(lanes, [&](int lane) { out<T>(lane, std::fma(in<T>(0, lane), in<T>(1, lane), in<T>(2, lane))); });
        });
      case op::and_: return bits(lanes, [](uint64_t a, uint64_t b) { return a & b; });
      case op::or_: return bits(lanes, [](uint64_t a, uint64_t b) { return a | b; });
      case op::xor_: return bits(lanes, [](uint64_t a, uint64_t b) { return a ^ b; });
      case op::not_: return bits(lanes, [](uint64_t a, uint64_t) { return ~a; });
      case op::cnot: return bits(lanes, [](uint64_t a, uint64_t) { return uint64_t(a == 0); });
      case op::shl:
      case op::shr: return with_integer(i->type, [&](auto zero) { shift<decltype(zero)>(lanes); });
      case op::shf_l:
      case op::shf_r:
        return each(lanes, [&](int lane) {
          const uint64_t both = uint64_t(get<uint32_t>(1, lane)) << 32 | get<uint32_t>(0, lane);
          uint32_t by = get<uint32_t>(2, lane);
          by = i->mode == md::wrap ? by & 31 : std::min(by, 32u);
          put(0, lane, i->operation == op::shf_l ? uint32_t(both << by >> 32) : uint32_t(both >> by));
        });
      case op::lop3:
        return each(lanes, [&](int lane) {
          const uint32_t a = get<uint32_t>(0, lane), b = get<uint32_t>(1, lane), c = get<uint32_t>(2, lane);
          uint32_t result = 0;
          for (int k = 0; k < 8; ++k)
            if (i->offset >> k & 1) result |= (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c);
          put(0, lane, result);
        });
      case op::prmt:
        return each(lanes, [&](int lane) {
          const uint64_t both = uint64_t(get<uint32_t>(1, lane)) << 32 | get<uint32_t>(0, lane);
          const uint32_t choice = get<uint32_t>(2, lane);
          uint32_t result = 0;
          for (int k = 0; k < 4; ++k) {
            const uint32_t byte = uint32_t(both >> 8 * (choice >> 4 * k & 7)) & 255;
            result |= (choice >> 4 * k & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * k;
          }
          put(0, lane, result);
        });
      case op::bfe:
      case op::bfi: return with_integer(i->type, [&](auto zero) { bit_field<decltype(zero)>(lanes); });
      case op::popc:
        return each(lanes, [&](int lane) { put(0, lane, uint32_t(__builtin_popcountll(get<uint64_t>(0, lane)))); });
      case op::clz:
        return each(lanes, [&](int lane) {
          const uint64_t v = get<uint64_t>(0, lane);
          const int width = 8 * size_of(i->type);
          put(0, lane, uint32_t(v ? __builtin_clzll(v) - (64 - width) : width));
        });
      case op::brev:
        return each(lanes, [&](int lane) {
          const uint64_t v = get<uint64_t>(0, lane);
          const int width = 8 * size_of(i->type);
          uint64_t result = 0;
          for (int k = 0; k < width; ++k) result |= (v >> k & 1) << (width - 1 - k);
          put(0, lane, result);
        });
      case op::bfind:
        return with_integer(i->type, [&](auto zero) {
          using T = decltype(zero);
          each(lanes, [&](int lane) {
            T v = get<T>(0, lane);
            if (v < 0) v = T(~v);
            put(0, lane, v ? uint32_t(63 - __builtin_clzll(uint64_t(v))) : 0xffffffffu);
          });
        });
      case op::rcp: return floats(lanes, [](auto a) { return 1 / a; });
      case op::rcp_high:  // the low word of the result is zero
        return each(lanes, [&](int lane) {
          const double v = get<double>(0, lane);
          const double one = std::fabs(v) < std::numeric_limits<double>::min() ? std::copysign(0.0, v) : v;
          double result = 1 / one;
          if (std::fabs(result) < std::numeric_limits<double>::min()) result = std::copysign(0.0, result);
          put(0, lane, same_bits<uint64_t>(result) & 0xffffffff00000000u);
        });
      case op::sqrt: return floats(lanes, [](auto a) { return std::sqrt(a); });
      case op::rsqrt: return floats(lanes, [](auto a) { return decltype(a)(1 / std::sqrt(double(a))); });
      case op::ex2: return floats(lanes, [](auto a) { return decltype(a)(std::exp2(double(a))); });
      case op::lg2: return floats(lanes, [](auto a) { return decltype(a)(std::log2(double(a))); });
      case op::sin: return floats(lanes, [](auto a) { return decltype(a)(std::sin(double(a))); });
      case op::cos: return floats(lanes, [](auto a) { return decltype(a)(std::cos(double(a))); });
      case op::tanh: return floats(lanes, [](auto a) { return decltype(a)(std::tanh(double(a))); });
      case op::copysign:  // copysign.f32 d, a, b: the sign of a, the size of b
        return with_float(i->type, [&](auto zero) {
          using T = decltype(zero);
          each(lanes, [&](int lane) { put(0, lane, std::copysign(get<T>(1, lane), get<T>(0, lane))); });
        });
      case op::testp:
        return with_float(i->type, [&](auto zero) {
          using T = decltype(zero);
          each(lanes, [&](int lane) {
            const T v = get<T>(0, lane);
            const bool result = i->mode == md::finite       ? std::isfinite(v)
                                : i->mode == md::infinite   ? std::isinf(v)
                                : i->mode == md::number     ? !std::isnan(v)
                                : i->mode == md::notanumber ? std::isnan(v)
                                : i->mode == md::normal     ? std::isnormal(v)
                                                            : std::fpclassify(v) == FP_SUBNORMAL;
            put(0, lane, uint8_t(result));
          });
        });
      case op::setp:
        return with_number(i->from, [&](auto zero) {
          using T = decltype(zero);
          each(lanes, [&](int lane) {
            bool yes = compared<T>(i->mode, in<T>(0, lane), in<T>(1, lane)), no = !yes;
            if (i->operands > 2) {
              const bool c = get<uint8_t>(2, lane) != 0;
              const auto with = [&](bool v) { return i->offset == 0 ? v && c : i->offset == 1 ? v || c : v != c; };
              yes = with(yes), no = with(no);
            }
            put(0, lane, uint8_t(yes));
            if (i->results > 1) put(1, lane, uint8_t(no));
          });
        });
      case op::set:
        return with_number(i->from, [&](auto zero) {
          using T = decltype(zero);
          each(lanes, [&](int lane) {
            const bool yes = compared<T>(i->mode, in<T>(0, lane), in<T>(1, lane));
            i->type == ty::f32 ? put(0, lane, yes ? 1.0f : 0.0f) : put(0, lane, yes ? 0xffffffffu : 0u);
          });
        });
      case op::selp:
        return each(lanes, [&](int lane) {
          put(0, lane, get<uint8_t>(2, lane) ? get<uint64_t>(0, lane) : get<uint64_t>(1, lane));
        });
      case op::mov: return each(lanes, [&](int lane) { put(0, lane, get<uint64_t>(0, lane)); });
      case op::pack:
        return each(lanes, [&](int lane) {
          const int width = i->bits / i->operands;
          uint64_t result = 0;
          for (int k = 0; k < i->operands; ++k) result |= get<uint64_t>(k, lane) << k * width;
          put(0, lane, result);
        });
      case op::unpack:
        return each(lanes, [&](int lane) {
          const int width = i->bits / i->results;
          for (int k = 0; k < i->results; ++k)
            put(k, lane, get<uint64_t>(0, lane) >> k * width & ((uint64_t(1) << width) - 1));
        });
      case op::cvt:
        switch (i->from) {
          case ty::f16: return convert_to<F16>(lanes);
          case ty::bf16: return convert_to<B16>(lanes);
          default: return with_number(i->from, [&](auto zero) { convert_to<decltype(zero)>(lanes); });
        }
      case op::cvt_pair:
        return each(lanes, [&](int lane) {
          const double high = in<float>(0, lane), low = in<float>(1, lane);
          put(0, lane,
              i->type == ty::f16 ? uint32_t(half_of(high, i->mode).bits) << 16 | half_of(low, i->mode).bits
                                 : uint32_t(bfloat_of(high, i->mode).bits) << 16 | bfloat_of(low, i->mode).bits);
        });
      case op::cvta:
      case op::cvta_to: {
        const uint64_t base = i->space == sp::shared ? kSharedWindow : i->space == sp::local ? kLocalWindow : 0;
        return each(lanes, [&](int lane) {
          const uint64_t v = get<uint64_t>(0, lane);
          if (i->operation == op::cvta) return put(0, lane, v + base);
          if (base && (v < base || v >= base + kWindow))
            throw Fault{"out of bounds", "cvta.to of an address that lies in another space", lane};
          put(0, lane, v - base);
        });
      }
      case op::ld: return load(lanes);
      case op::st: return store(lanes);
      case op::copy: return start_copies(lanes);
      case op::commit: return commit_copies(lanes);
      case op::wait_group: return wait_copies(lanes);
      case op::activemask: return each(lanes, [&](int lane) { put(0, lane, mask); });
      default: throw Fault{"unknown instruction", "the machine does not execute it", first_lane(lanes)};
    }
  }

  Launch& l;
  std::vector<Warp> warps;
  std::vector<unsigned char> shared, shared_set;
  std::vector<int16_t> targeted;  // by byte of shared memory: the thread whose copy is under way, or -1
  std::vector<Byte> shared_marks;
  std::vector<Shadow> shadows;
  int64_t last_buffer = 0;
  int32_t block_epoch = 0;
  Warp* warp = nullptr;
  const Instruction* i = nullptr;
  uint32_t mask = 0;
};

template <size_t N>
int32_t code_of(const char* const (&names)[N], const char* name) {
  for (size_t k = 0; k < N; ++k)
    if (std::strcmp(names[k], name) == 0) return int32_t(k);
  return -1;
}

}  // namespace

extern "C" {

// The number of a name among operations (0), types (1), spaces (2) or modes (3); -1 where there is none.
int32_t ptx_code(int32_t kind, const char* name) {
  switch (kind) {
    case 0: return code_of(kOperations, name);
    case 1: return code_of(kTypes, name);
    case 2: return code_of(kSpaces, name);
    default: return code_of(kModes, name);
  }
}
int64_t ptx_instruction_bytes() { return sizeof(Instruction); }
int64_t ptx_launch_bytes() { return sizeof(Launch); }

// Returns 0, or 1 with the fault in the launch.
int32_t ptx_run(Launch* launch) {
  Machine machine(*launch);
  launch->steps = 0;
  try {
    machine.run();
    return 0;
  } catch (const Fault& fault) {
    launch->fault_block = machine.block, launch->fault_thread = machine.warp_index * kWarp + fault.lane;
    launch->fault_instruction = machine.pc;
    std::snprintf(launch->fault, sizeof launch->fault, "%s", fault.name);
    std::snprintf(launch->detail, sizeof launch->detail, "%s", fault.detail.c_str());
    return 1;
  }
}
}
