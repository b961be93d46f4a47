// Lanes of a warp that go their own ways, and meet where an instruction needs several of them.
#pragma once
#include "matrices.h"

namespace ptx {

class Warps : public Matrices {
 public:
  using Matrices::Matrices;

 protected:
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
};

}  // namespace ptx
