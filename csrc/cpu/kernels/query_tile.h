// Query tiles: up to kLanes queries of one query block, a query in every lane.
#pragma once
#include "arena.h"
#include "key_list.h"

namespace sb::SB_ISA {

template <class E, int kLanes>
struct QueryTile {
  typedef AccType<E> T;
  int64_t b, h, kv;       // batch row, query head, its key/value head
  int64_t lanes;          // lanes in use
  int64_t query[kLanes];  // -1: no query in this lane
  int64_t first_slot;     // query slot of the first lane
  int64_t slot;           // state slot
  int64_t chunk_first;    // key that the edges count from: the first of the causal edge's chunk, or the row's first
  T edge[kLanes];         // causal edge; below 0: sees nothing from chunk_first on
  const E* zero_row;
  const E* q[kLanes];  // rows; zero_row where there is no query
  const T* x[kLanes];
  T rho[kLanes];
  KeyList list;  // of queries that share it
};

// Fills all but the list; returns whether any lane has a query.
template <class E, int kLanes>
SB_INLINE bool fill_tile(const AttentionParams& p, int64_t b, int64_t h, int64_t first_slot, int64_t lanes,
                         const void* zero_row, QueryTile<E, kLanes>& tile) {
  typedef AccType<E> T;
  const RowRange& range = p.rows[b];
  tile.zero_row = static_cast<const E*>(zero_row);
  tile.b = b, tile.h = h, tile.kv = p.kv_head(h), tile.lanes = lanes, tile.first_slot = first_slot;
  tile.slot = kv_state_of_edge(p, edge_of_slot(p, range, first_slot));
  const int64_t chunk = p.is_causal ? tile.slot * kChunk : 0;
  tile.chunk_first = range.k_first + chunk;
  const bool has_maps = p.has_maps();  // else rho waits for weigh_clusters, or is not used
  if (lanes == kLanes && !p.order && !p.q_mask && !p.is_causal) {
    const int64_t first = range.q_first + first_slot;
    const T edge = T(edge_of_slot(p, range, first_slot));
    for (int lane = 0; lane < kLanes; ++lane) {
      tile.query[lane] = first + lane, tile.edge[lane] = edge;
      tile.q[lane] = p.q.at<const E>(b, h, first + lane);
      tile.x[lane] = has_maps ? p.x.at<const T>(b, h, first + lane) : static_cast<const T*>(zero_row);
      tile.rho[lane] = has_maps ? *p.rho.at<const T>(b, h, first + lane) : T(0);
    }
    return true;
  }
  bool any = false;
  for (int lane = 0; lane < kLanes; ++lane) {
    int64_t i = -1;
    if (lane < lanes) {
      i = p.order ? p.order[(b * p.order_heads + h * p.order_heads / p.q_heads) * p.q_tokens + first_slot + lane]
                  : range.q_first + first_slot + lane;
      if (i >= 0 && p.q_mask && p.q_mask[b * p.q_tokens + i]) i = -1;
    }
    tile.query[lane] = i, any |= i >= 0;
    tile.edge[lane] = i < 0 ? T(-1) : T(edge_of_slot(p, range, first_slot + lane) - chunk);
    tile.q[lane] = i < 0 ? tile.zero_row : p.q.at<const E>(b, h, i);
    tile.x[lane] = has_maps && i >= 0 ? p.x.at<const T>(b, h, i) : static_cast<const T*>(zero_row);
    tile.rho[lane] = has_maps && i >= 0 ? *p.rho.at<const T>(b, h, i) : T(0);
  }
  return any;
}

template <class E, int kLanes>
SB_INLINE void allocate_tiles(const AttentionParams& p, Arena& arena, QueryTile<E, kLanes> (&tile)[2]) {
  for (auto& t : tile) t.list.key = arena.take<int32_t>(p.max_keys);
}
// Calls visit(tile, next tile or null) for every tile whose first slot belongs to `unit`: queries of one block, with
// their list where Visit::kNeedsLists, or (not kShared) queries with lists of their own that share a state slot.
template <class E, int kLanes, bool kShared, class Visit>
SB_INLINE void for_each_tile(const AttentionParams& p, int64_t b, int64_t h, int64_t unit, const void* zero_row,
                             QueryTile<E, kLanes> (&tile)[2], Visit& visit) {
  const RowRange& range = p.rows[b];
  const int64_t slots = slots_of_row(p, range);
  const int64_t width = p.is_causal ? kChunk : queries_per_unit(p);
  const int64_t shift = p.is_causal ? int64_t(range.q_first) + range.offset - range.k_first : 0;
  // With a causal edge a unit is a state slot: the last one takes every query past the keys.
  const int64_t last = p.is_causal ? kv_state_of_edge(p, int64_t(range.k_end) - range.k_first - 1) : p.units - 1;
  if (unit > last) return;
  int64_t begin = unit * width - shift, end = begin + width;
  if (unit == 0 || begin < 0) begin = 0;
  if (unit == last || end > slots) end = slots;
  if constexpr (kShared) {
    int64_t at = 0, filled = 0;
    for (int64_t block = begin / p.block_q; block * p.block_q < end; ++block) {
      const int64_t of_block = block * p.block_q, behind = of_block + p.block_q, before = begin - of_block;
      for (int64_t first = of_block + (before > 0 ? pad_to(before, kLanes) : 0); first < behind && first < end;
           first += kLanes) {
        int64_t stop = first + kLanes < behind ? first + kLanes : behind;
        stop = stop < slots ? stop : slots;
        QueryTile<E, kLanes>& next = tile[at];
        if (!fill_tile<E, kLanes>(p, b, h, first, stop - first, zero_row, next)) continue;
        if constexpr (Visit::kNeedsLists) collect_keys(p, b, h, first, stop - 1, next.list);
        at = 1 - at;
        if (filled++) visit(tile[at], &next);
      }
    }
    if (filled) visit(tile[1 - at], nullptr);
  } else {
    for (int64_t first = begin; first < end;) {
      int64_t stop = first + kLanes < end ? first + kLanes : end;
      const int64_t slot = kv_state_of_edge(p, edge_of_slot(p, range, first));
      while (kv_state_of_edge(p, edge_of_slot(p, range, stop - 1)) != slot) --stop;
      if (fill_tile<E, kLanes>(p, b, h, first, stop - first, zero_row, tile[0])) visit(tile[0], nullptr);
      first = stop;
    }
  }
}

}  // namespace sb::SB_ISA
