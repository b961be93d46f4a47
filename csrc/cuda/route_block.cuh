// What the threads of a block do together when they choose: reductions, and the largest of some scores.
#pragma once
#include "device.h"

namespace sb::cuda {

inline constexpr int kRouteThreads = 128;
inline constexpr int kRouteWarps = kRouteThreads / kWarp;
inline constexpr int32_t kNever = int32_t(0x807fffff);  // the sortable form of -inf
inline constexpr int32_t kNoNumber = 0x7fc00000;        // of NaN, whose sign differs between machines

// Integers in the order of the floats. What is no number comes first, as no approximation may leave it out.
SB_DEVICE int32_t sortable(float v) {
  const auto bits = same_bits<int32_t>(v);
  if (v != v) return kNoNumber;
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

// Every function begins and ends with a barrier, and gives all threads the same result.
class RouteBlock {
 public:
  static SB_HD int64_t bytes() { return 2 * kRouteThreads * int64_t(sizeof(int32_t)); }
  SB_DEVICE explicit RouteBlock(int64_t offset)
      : counts(shared_array<int32_t>(offset)),
        ties(shared_array<int32_t>(offset + kRouteThreads * int64_t(sizeof(int32_t)))),
        values(shared_array<float>(offset)) {}

  SB_DEVICE float maximum(float value) const {
    value = warp_max(value);
    sync_block();
    if (lane_index() == 0) values.set(warp_index(), value);
    sync_block();
    for (int w = 0; w < kRouteWarps; ++w) value = larger(value, values.get(w));
    sync_block();
    return value;
  }
  SB_DEVICE float sum(float value) const {
    value = warp_sum(value);
    sync_block();
    if (lane_index() == 0) values.set(warp_index(), value);
    sync_block();
    float total = 0;
    for (int w = 0; w < kRouteWarps; ++w) total += values.get(w);
    sync_block();
    return total;
  }
  SB_DEVICE int32_t sum(int32_t value) const {
    value = warp_sum(value);
    sync_block();
    if (lane_index() == 0) counts.set(warp_index(), value);
    sync_block();
    int32_t total = 0;
    for (int w = 0; w < kRouteWarps; ++w) total += counts.get(w);
    sync_block();
    return total;
  }

  // Writes the values `at` in [begin, end) that are wanted to out, in their order, and returns their number.
  template <class Wanted>
  SB_DEVICE int64_t write_wanted(int64_t begin, int64_t end, const Wanted& wanted, int32_t* out) const {
    const int thread = thread_index();
    const int64_t share = ceil_div(end > begin ? end - begin : 0, kRouteThreads), first = begin + thread * share,
                  stop = first + share < end ? first + share : end;
    int32_t own = 0;
    for (int64_t at = first; at < stop; ++at) own += wanted(at) ? 1 : 0;
    sync_block();
    counts.set(thread, own);
    sync_block();
    int64_t before = 0, total = 0;
    for (int t = 0; t < kRouteThreads; ++t) {
      if (t == thread) before = total;
      total += counts.get(t);
    }
    for (int64_t at = first; at < stop; ++at)
      if (wanted(at)) store(out + before++, int32_t(at));
    sync_block();
    return total;
  }

  // Writes the positions of the n largest of `count` keys, ascending; ties go to the lowest, kNever is never taken. A
  // round for every bit of the numbers from `low`, the least that is taken, to below `high`.
  SB_DEVICE int64_t take_top(const int32_t* key, int64_t count, int64_t n, int32_t* out,
                             int64_t low = int64_t(kNever) + 1, int64_t high = int64_t(0x7fffffff) + 1) const {
    if (n <= 0) return 0;
    const auto from = [&](int64_t threshold) {
      int32_t hits = 0;
      for (int64_t i = thread_index(); i < count; i += kRouteThreads) hits += load(key + i) >= threshold ? 1 : 0;
      return sum(hits);
    };
    // At least n keys are >= low, fewer are >= high.
    int32_t hits = from(low);
    while (hits > n && high - low > 1) {
      const int64_t middle = low + (high - low) / 2;
      const int32_t above = from(middle);
      if (above >= n)
        low = middle, hits = above;
      else
        high = middle;
    }
    // Some keys that equal `low` may be too many.
    const int64_t allowed = hits > n ? n - from(low + 1) : hits;
    const int thread = thread_index();
    const int64_t share = ceil_div(count, kRouteThreads), first = thread * share,
                  stop = first + share < count ? first + share : count;
    int32_t own = 0, own_ties = 0;
    for (int64_t i = first; i < stop; ++i) own += load(key + i) > low ? 1 : 0, own_ties += load(key + i) == low ? 1 : 0;
    sync_block();
    counts.set(thread, own), ties.set(thread, own_ties);
    sync_block();
    int64_t at = 0, ties_before = 0;
    for (int t = 0; t < thread; ++t) at += counts.get(t), ties_before += ties.get(t);
    at += ties_before < allowed ? ties_before : allowed;
    for (int64_t i = first; i < stop; ++i) {
      const int64_t value = load(key + i);
      if (value > low || (value == low && ties_before++ < allowed)) store(out + at++, int32_t(i));
    }
    sync_block();
    return hits > n ? n : hits;
  }

 private:
  Shared<int32_t> counts, ties;
  Shared<float> values;
};

}  // namespace sb::cuda
