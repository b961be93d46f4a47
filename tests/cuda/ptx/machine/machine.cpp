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
#include "warps.h"

namespace ptx {

class Machine : public Warps {
 public:
  using Warps::Warps;

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
};

template <size_t N>
int32_t code_of(const char* const (&names)[N], const char* name) {
  for (size_t k = 0; k < N; ++k)
    if (std::strcmp(names[k], name) == 0) return int32_t(k);
  return -1;
}

}  // namespace ptx

extern "C" {

// The number of a name among operations (0), types (1), spaces (2) or modes (3); -1 where there is none.
int32_t ptx_code(int32_t kind, const char* name) {
  switch (kind) {
    case 0: return ptx::code_of(ptx::kOperations, name);
    case 1: return ptx::code_of(ptx::kTypes, name);
    case 2: return ptx::code_of(ptx::kSpaces, name);
    default: return ptx::code_of(ptx::kModes, name);
  }
}
int64_t ptx_instruction_bytes() { return sizeof(ptx::Instruction); }
int64_t ptx_launch_bytes() { return sizeof(ptx::Launch); }

// Returns 0, or 1 with the fault in the launch.
int32_t ptx_run(ptx::Launch* launch) {
  ptx::Machine machine(*launch);
  launch->steps = 0;
  try {
    machine.run();
    return 0;
  } catch (const ptx::Fault& fault) {
    launch->fault_block = machine.block, launch->fault_thread = machine.warp_index * ptx::kWarp + fault.lane;
    launch->fault_instruction = machine.pc;
    std::snprintf(launch->fault, sizeof launch->fault, "%s", fault.name);
    std::snprintf(launch->detail, sizeof launch->detail, "%s", fault.detail.c_str());
    return 1;
  }
}
}
