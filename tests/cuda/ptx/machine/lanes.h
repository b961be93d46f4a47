// The state of a block, and the registers of the lanes that execute an instruction.
#pragma once
#include <algorithm>
#include <vector>

#include "marks.h"
#include "numbers.h"

namespace ptx {

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

class Lanes {
 public:
  explicit Lanes(Launch& launch) : l(launch), shadows(size_t(launch.buffer_count)) {}

  int64_t block = 0;
  int warp_index = 0;
  int32_t pc = 0;

 protected:
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

}  // namespace ptx
