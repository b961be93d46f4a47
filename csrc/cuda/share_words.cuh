// A share as it lies in memory: what a tile of query slots adds to the gradients of a key. Its dk and dv are whole
// numbers of 16 bits times a factor of their own: half of the bytes of float32, and rounded far below what results of
// 16 bits are. Gradients of maps, few numbers, are float32, and so is all of a share of float32 tokens.
#pragma once
#include "device.h"
#include "params.h"

namespace sb::cuda {

// A pair of whole numbers of 16 bits, which are `low` and `high` times a factor that brings them below 2^15.
SB_DEVICE uint32_t fixed_pair(float low, float high, float factor) {
  constexpr float kUnit = 0x1.8p23f;  // a float there ends at the units
  return (same_bits<uint32_t>(low * factor + kUnit) & 0xffff) | same_bits<uint32_t>(high * factor + kUnit) << 16;
}
SB_DEVICE float from_fixed(uint32_t number) {  // of the lower 16 bits, others are 0
  return same_bits<float>(number ^ 0x4b008000u) - 0x1.01p23f;
}

// The columns of a word of a share, of dk or of dv: two, or of float32 one.
template <bool kIsWide>
struct ShareColumn {
  bool is_there, is_value;
  int32_t first;
  SB_DEVICE ShareColumn(const BackwardSharesParams& p, int word) {
    const auto of_keys = int(p.words_of_keys());
    is_value = word >= of_keys;
    word -= is_value ? of_keys : 0;
    first = kIsWide ? word : (word / 16 * 4 + word % 4) * 8 + word % 16 / 4 * 2;
    is_there = first < (is_value ? p.value_pad : p.head_dim);
  }
};

}  // namespace sb::cuda
