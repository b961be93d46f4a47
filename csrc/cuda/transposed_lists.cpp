#include "transposed_lists.h"

#include <algorithm>

namespace sb::cuda {

TransposedLists with_room(TransposedLists t, const AttentionParams& p, int64_t capacity, bool has_positions,
                          Call& call) {
  t.room = p.blocks * capacity;
  if (t.entries == 0) return t;
  const auto integers = [&](std::initializer_list<int64_t> sizes) {
    return static_cast<int32_t*>(call.write(call.empty(sizes, ScalarType::Int)));
  };
  t.part = ceil_div(std::max<int64_t>(p.blocks, 1), std::clamp<int64_t>(t.room / t.entries, 1, 32));
  t.parts = std::max<int64_t>(1, ceil_div(p.blocks, t.part));
  t.cursor = integers({p.batch, t.heads, t.entries, t.parts});
  t.blocks = integers({p.batch, t.heads, t.room});
  if (has_positions) t.positions = integers({p.batch, t.heads, t.room});
  return t;
}

}  // namespace sb::cuda
