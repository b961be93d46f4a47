// Keys behind the causal edges of a tile's queries. Their weights are zero, but 0 times NaN or infinity is NaN: a tile
// whose sums are not finite forms them again query by query, with zeros in place of the rows of such keys.
#pragma once
#include "gathered_rows.h"
#include "query_tile.h"

namespace sb::SB_ISA {

// n numbers, a multiple of N, times 0, summed in lanes: 0 if all are finite. A key's row with anything else in it
// leaves something else in the sums of every query of a tile, so that it is enough to look at those of one.
template <class T, int N>
SB_INLINE Vector<T, N> times_zero(const T* p, int64_t n) {
  Vector<T, N> zero[4] = {};
  int64_t i = 0;
  for (; i + 4 * N <= n; i += 4 * N)
    SB_EACH (v, 4) zero[v] += load<T, N>(p + i + v * N) * T(0);
  for (; i < n; i += N) zero[0] += load<T, N>(p + i) * T(0);
  return (zero[0] + zero[1]) + (zero[2] + zero[3]);
}

// Whether a tile evaluates keys that some of its queries may not see: before the chunk of its first query's edge
// all see every key.
template <class E, int kLanes>
SB_INLINE bool has_unseen_keys(const AttentionParams& p, const QueryTile<E, kLanes>& tile) {
  return p.is_causal && (tile.list.n_chunk > 0 || tile.list.n > tile.list.n_listed);
}
// The last key that the query of a lane sees. Without a causal edge that is the row's last: in float32, tile.edge is
// rounded in rows of more than 2^24 keys.
template <class E, int kLanes>
SB_INLINE int64_t last_seen_key(const AttentionParams& p, const QueryTile<E, kLanes>& tile, int lane) {
  return p.is_causal ? tile.chunk_first + int64_t(tile.edge[lane]) : int64_t(p.rows[tile.b].k_end) - 1;
}

// Rows of listed keys as one query sees them.
template <class E>
struct SeenRows {
  ListedRows<const E> rows;
  const E* zero_row;
  int64_t last_seen;
  SB_INLINE const E* operator()(int64_t i) const { return rows.list[i] <= last_seen ? rows(i) : zero_row; }
  SB_INLINE SeenRows from(int64_t first) const { return {rows.from(first), zero_row, last_seen}; }
};

template <class E, int kLanes, class R>
SB_INLINE SeenRows<R> rows_seen(const AttentionParams& p, const QueryTile<E, kLanes>& tile, int lane,
                                const ListedRows<const R>& rows) {
  const void* zero_row = tile.zero_row;
  return {rows, static_cast<const R*>(zero_row), last_seen_key<E, kLanes>(p, tile, lane)};
}

}  // namespace sb::SB_ISA
