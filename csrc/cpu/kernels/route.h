// Routing: which keys a query, or a block of queries, reads exactly (algorithm note, section 3;
// scatterbrain/reference_routing.py is the dense definition).
//
// The key side is held in panels: tokens in lanes, rows of coordinates. A token is a key or the mean of a run of keys,
// so one scoring loop serves every level of the search. Rows of a panel: k (head_dim), then |k|^2 (per-query form: the
// spread of the run), then y and kappa, then how many keys stand behind the lane. Scores are in base 2. Everything
// counts from the row's first valid key.

inline constexpr int kLeaf = 32;   // lanes of a panel, and keys of a candidate block
inline constexpr int kSuper = 16;  // candidate blocks of a superblock
inline constexpr int kGroup = 4;   // query blocks that share candidate blocks
inline constexpr int kPool = 16;   // queries that the causal form pools
inline constexpr int kBranch = 8;  // listed blocks of a superblock, and keys of a listed block (per query)
inline constexpr int kRows = 16;   // queries scored together (per query)
inline constexpr int32_t kNever = int32_t(0x807fffff);  // the sortable form of -inf
inline constexpr float kLog2e = 1.44269504088896340736f;
constexpr int kRouteWidth = kWidth<float>, kBlockWidth = kRouteWidth < 8 ? kRouteWidth : 8;  // eight keys make a block
typedef Vec<float, kRouteWidth>::type RouteVec;
typedef Vec<float, kRouteWidth>::ints RouteInts;
typedef Vec<float, kBlockWidth>::type BlockVec;
typedef Vec<float, kBlockWidth>::ints BlockInts;

template <int W = kRouteWidth>
SB_INLINE typename Vec<float, W>::type load_lanes(const float* p) {
  return load<float, W>(p);
}
template <int W = kRouteWidth>
SB_INLINE typename Vec<float, W>::ints load_ints(const void* p) {
  return (typename Vec<float, W>::ints)load<float, W>(static_cast<const float*>(p));
}
template <int W = kRouteWidth>
SB_INLINE void store_ints(void* p, typename Vec<float, W>::ints v) {
  store<float, W>(static_cast<float*>(p), (typename Vec<float, W>::type)v);
}
template <int W = kRouteWidth>
SB_INLINE typename Vec<float, W>::ints lane_numbers() {
  static const int32_t numbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return load_ints<W>(numbers);
}
// Integers in the order of the floats.
template <int W = kRouteWidth>
SB_INLINE typename Vec<float, W>::ints sortable(typename Vec<float, W>::type v) {
  const auto i = (typename Vec<float, W>::ints)v;
  return i ^ ((i >> 31) & 0x7fffffff);
}
SB_INLINE int64_t clamp_to(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : value > high ? high : value;
}
SB_INLINE int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }

#include "route_keys.h"
#include "route_select.h"
#include "route_pooled.h"
#include "route_per_query.h"

// Lists of query group `group` of head (b, h), which must be cleared before. Returns the scratch it needs; without
// scratch it does nothing else.
inline int64_t route_group(const RouteParams& p, int64_t b, int64_t h, int64_t group, const float* panels,
                           void* scratch) {
  if (p.block_k == 1) {
    PooledScratch w(p, scratch);
    if (scratch) route_pooled(p, b, h, group, panels, w);
    return w.bytes;
  }
  PerQueryScratch w(p, scratch);
  if (scratch) route_per_query(p, b, h, group, panels, w);
  return w.bytes;
}
