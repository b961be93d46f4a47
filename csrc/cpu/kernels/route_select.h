// Selection of the largest scores, as integers in the order of the floats.
#pragma once
#include "route_panel.h"

namespace sb::SB_ISA {

// The keys of a head's lists, or all that there are.
SB_INLINE int64_t keys_of(const RouteParams& p, int64_t h) {
  return p.head_keys && p.head_keys[h] < p.keys ? p.head_keys[h] : p.keys;
}

// Bit i: whether lane i is at least `threshold`.
SB_INLINE uint32_t lanes_from(RouteInts v, int32_t threshold) {
#if defined(__x86_64__) && SB_VECTOR_BYTES == 64
  return uint16_t(__builtin_ia32_cmpd512_mask(v, RouteInts{} + threshold, 5, 0xffff));
#elif defined(__x86_64__) && SB_VECTOR_BYTES == 32
  return uint32_t(__builtin_ia32_movmskps256((RouteVec)(v >= threshold)));
#elif defined(__x86_64__)
  return uint32_t(__builtin_ia32_movmskps((RouteVec)(v >= threshold)));
#else
  uint32_t bits = 0;
  SB_EACH (i, kRouteWidth) bits |= uint32_t(v[i] >= threshold) << i;
  return bits;
#endif
}

// The number of keys that are at least `threshold`; `count` is a multiple of the width.
SB_INLINE int64_t count_from(const int32_t* key, int64_t count, int32_t threshold) {
  int64_t total = 0;
  if constexpr (kRouteWidth == 16) {
    for (int64_t i = 0; i < count; i += kRouteWidth)
      total += __builtin_popcount(lanes_from(load_ints(key + i), threshold));
    return total;
  }
  RouteInts hits[2]{};
  int64_t i = 0;
  for (; i + 2 * kRouteWidth <= count; i += 2 * kRouteWidth)
    SB_EACH (v, 2) hits[v] -= load_ints(key + i + v * kRouteWidth) >= threshold;
  for (; i < count; i += kRouteWidth) hits[0] -= load_ints(key + i) >= threshold;
  hits[0] += hits[1];
  SB_EACH (lane, kRouteWidth) total += hits[0][lane];
  return total;
}

// Writes first + lane for every set bit to out, ascending, and returns their number. May write a whole vector.
SB_INLINE int64_t append_lanes(uint32_t bits, int64_t first, int32_t* out) {
#if defined(__x86_64__) && SB_VECTOR_BYTES == 64
  store_ints(out, __builtin_ia32_compresssi512_mask(lane_numbers() + int32_t(first), RouteInts{}, uint16_t(bits)));
  return __builtin_popcount(bits);
#else
  int64_t n = 0;
  for (; bits; bits &= bits - 1) out[n++] = int32_t(first) + __builtin_ctz(bits);
  return n;
#endif
}

// Writes the positions of the n largest of `count` keys, ascending, where `from_low` are at least `low` and
// `from_high`, fewer than n, are more. Ties go to the lowest position. `out` has room for a vector more.
SB_INLINE int64_t write_top(const int32_t* key, int64_t count, int64_t n, int32_t low, int64_t from_low,
                            int64_t from_high, int32_t* out) {
  int64_t taken = 0;
  if (from_low <= n) {
    for (int64_t i = 0; i < count; i += kRouteWidth)
      taken += append_lanes(lanes_from(load_ints(key + i), low), i, out + taken);
    return taken;
  }
  int64_t ties = n - from_high;
  for (int64_t i = 0; i < count; i += kRouteWidth) {
    const uint32_t above = lanes_from(load_ints(key + i), low + 1);  // no key is the largest integer
    uint32_t tied = lanes_from(load_ints(key + i), low) & ~above;
    while (__builtin_popcount(tied) > ties) tied &= ~(0x80000000u >> __builtin_clz(tied));
    ties -= __builtin_popcount(tied);
    taken += append_lanes(above | tied, i, out + taken);
  }
  return taken;
}

// As write_top, of `count` keys, a multiple of the width; kNever is never taken. The search for the smallest key taken
// starts at `guess`, which receives it: neighbouring queries have similar ones. It changes the time, not the result.
SB_INLINE int64_t take_top(const int32_t* key, int64_t count, int64_t n, int32_t* out, int32_t& guess) {
  if (n <= 0) return 0;
  // Fewer than n keys are >= high, at least n are >= low: narrow until exactly n are, or until only ties of `low` are
  // left to cut.
  int64_t low = int64_t(kNever) + 1, high = int64_t(INT32_MAX) + 1, from_low = count_from(key, count, int32_t(low)),
          from_high = 0, step = int64_t(1) << 21;
  if (from_low > n) {
    for (int64_t probe = guess, turn = 0; high - low > 1 && from_low != n; ++turn) {
      if (probe <= low || probe >= high) probe = low + (high - low) / 2;
      const int64_t hits = count_from(key, count, int32_t(probe));
      if (hits >= n)
        low = probe, from_low = hits;
      else
        high = probe, from_high = hits;
      // First move away from the guess in growing steps, then interpolate and halve in turn.
      if (high > INT32_MAX || low <= kNever + 1)
        probe += high > INT32_MAX ? step : -step, step *= 4;
      else
        probe = turn % 2 ? low + (high - low) / 2
                         : low + (high - low) * (2 * (from_low - n) + 1) / (2 * (from_low - from_high) + 1);
    }
    guess = int32_t(low);
  }
  return write_top(key, count, n, int32_t(low), from_low, from_high, out);
}

}  // namespace sb::SB_ISA
