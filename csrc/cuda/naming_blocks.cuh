// Reads transposed lists (transposed_lists.cuh).
#pragma once
#include "device.h"

namespace sb::cuda {

// The blocks that name the run of a level that a key is in.
struct NamingBlocks {
  const int32_t *blocks, *positions;  // and where their lists do, if the lists were made with that
  int64_t count;
  SB_DEVICE NamingBlocks(const BackwardParams& p, const TransposedLists& of, int64_t b, int64_t h, int64_t key,
                         int64_t level)
      : blocks(nullptr), positions(nullptr), count(0) {
    const int64_t entry = (of.first >> level) + (quotient(key, of.width) >> level);
    if (entry >= of.entries) return;
    const int64_t row = b * of.heads + quotient(h * of.heads, p.q_heads), at = (row * of.entries + entry) * of.parts;
    const int64_t begin = entry > 0 ? load(of.cursor + at - 1) : 0, last = load(of.cursor + at + of.parts - 1),
                  end = last > of.room ? of.room : last;
    blocks = of.blocks + row * of.room + begin, count = end > begin ? end - begin : 0;
    if (of.positions) positions = of.positions + row * of.room + begin;
  }
};

}  // namespace sb::cuda
