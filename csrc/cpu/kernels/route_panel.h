// Panels, the form in which routing holds keys: tokens in lanes, rows of coordinates. A token is a key or the mean of a
// run of keys, so one scoring loop serves every level of the search. Rows of a panel: k (head_dim), then |k|^2
// (per-query form: the variance of the run; with two pools as route_groups.h has it), then y and kappa, then the number
// of keys behind the lane. With clusters, a key has the number of its own, and its squared distance to the
// representative, in place of y (one-hot, in means). Scores are in base 2. Positions count from the row's first valid
// key.
#pragma once
#include "vec.h"

namespace sb::SB_ISA {

inline constexpr int32_t kNever = int32_t(0x807fffff);  // the sortable form of -inf
inline constexpr int32_t kNoNumber = 0x7fc00000;        // of NaN, whose sign differs between machines
constexpr int kRouteWidth = kWidth<float>;
constexpr int kBlockWidth = kRouteWidth < kBranch ? kRouteWidth : kBranch;  // at most the keys of a listed block
typedef Vector<float, kRouteWidth> RouteVec;
typedef Ints<float, kRouteWidth> RouteInts;
typedef Vector<float, kBlockWidth> BlockVec;
typedef Ints<float, kBlockWidth> BlockInts;

template <int W = kRouteWidth>
SB_INLINE Vector<float, W> load_lanes(const float* p) {
  return load<float, W>(p);
}
template <int W = kRouteWidth>
SB_INLINE Ints<float, W> load_ints(const void* p) {
  return (Ints<float, W>)load<float, W>(static_cast<const float*>(p));
}
template <int W = kRouteWidth>
SB_INLINE void store_ints(void* p, Ints<float, W> v) {
  store<float, W>(static_cast<float*>(p), (Vector<float, W>)v);
}
template <int W = kRouteWidth>
SB_INLINE Ints<float, W> lane_numbers() {
  static const int32_t numbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return load_ints<W>(numbers);
}
// Integers in the order of the floats v. What is no number comes first, as no approximation may leave it out.
template <int W = kRouteWidth>
SB_INLINE Ints<float, W> sortable(Vector<float, W> v) {
  const auto i = (Ints<float, W>)v;
  return v == v ? i ^ ((i >> 31) & 0x7fffffff) : Ints<float, W>{} + kNoNumber;
}
SB_INLINE int64_t clamp_to(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : value > high ? high : value;
}
SB_INLINE int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }

}  // namespace sb::SB_ISA
