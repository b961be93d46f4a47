#include "transposed_lists.h"

#include <algorithm>

namespace sb::cuda {
namespace {

// Parts go on at once, and each has a cursor for every entry. There are as many as keep a device busy, or cursors as
// few as lists, but cursors stay in proportion to the lists, so that memory is linear.
constexpr int64_t kMostParts = 64, kCursorsByRoom = 8, kWarps = 1024;

int64_t parts_of(const TransposedLists& t, int64_t rows) {
  const int64_t fewest = std::min<int64_t>(t.room / t.entries, kMostParts / 2),
                most = std::min(kCursorsByRoom * t.room / t.entries, kMostParts);
  return std::max<int64_t>(1, std::clamp(ceil_div(kWarps, std::max<int64_t>(rows, 1)), fewest, most));
}

}  // namespace

TransposedLists with_room(TransposedLists t, const AttentionParams& p, int64_t capacity, bool has_positions,
                          Call& call) {
  t.room = p.blocks * capacity;
  if (t.entries == 0) return t;
  const auto integers = [&](std::initializer_list<int64_t> sizes) {
    return static_cast<int32_t*>(call.write(call.empty(sizes, ScalarType::Int)));
  };
  t.part = ceil_div(std::max<int64_t>(p.blocks, 1), parts_of(t, p.batch * t.heads));
  t.parts = std::max<int64_t>(1, ceil_div(p.blocks, t.part));
  t.cursor = integers({p.batch, t.heads, t.entries, t.parts});
  t.blocks = integers({p.batch, t.heads, t.room});
  if (has_positions) t.positions = integers({p.batch, t.heads, t.room});
  return t;
}

}  // namespace sb::cuda
