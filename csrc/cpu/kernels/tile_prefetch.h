// Prefetches the rows that the next query tile touches. Hardware prefetchers cannot follow a list, and a burst of
// prefetches would stall: they are spread between the products of the current tile.
#pragma once
#include "gathered_rows.h"
#include "query_tile.h"

namespace sb::SB_ISA {

// Rows that the next tile reads or adds to and the current one did not.
template <class E, int kLanes, bool kBackward>
struct TilePrefetcher {
  typedef AccType<E> T;
  const AttentionParams& p;
  const QueryTile<E, kLanes>* next = nullptr;
  ListedRows<const E> k, v;
  ListedRows<const T> y, dk, dv;
  int64_t at = 0, end = 0, head_pad, value_pad;  // keys of the list, then queries
  int64_t from, last;                            // keys of the current tile
  bool has_maps;

  explicit SB_INLINE TilePrefetcher(const AttentionParams& params) : p(params) {}
  SB_INLINE void look_ahead(const QueryTile<E, kLanes>& now, const QueryTile<E, kLanes>* then) {
    next = p.index && p.k_tokens <= kNearKeys ? nullptr : then, at = end = 0;
    if (!next) return;
    const QueryTile<E, kLanes>& tile = *next;
    const KeyList& list = next->list;
    end = list.n + tile.lanes;
    // Of a window, and of a chunk, only new keys; a span ascends, so they are at its end.
    last = last_key(now.list), from = !p.index ? 0 : p.is_causal ? now.chunk_first : last + 1;
    if (!p.index && !p.is_causal && list.n == list.n_listed)
      for (at = list.n; at > 0 && list.key[at - 1] > last;) --at;
    k = listed<E>(p.k, tile.b, tile.kv, list.key), v = listed<E>(p.v, tile.b, tile.kv, list.key);
    y = listed<T>(p.y, tile.b, tile.kv, list.key), dk = listed<T>(p.dk, tile.b, tile.kv, list.key),
    dv = listed<T>(p.dv, tile.b, tile.kv, list.key);
    has_maps = p.has_maps(), head_pad = p.head_pad, value_pad = p.value_pad;
  }
  SB_INLINE int64_t left() const { return end - at; }
  SB_INLINE void fetch(int64_t count) {
    const int64_t stop = at + count < end ? at + count : end, keys = next ? next->list.n : 0;
    for (; at < stop && at < keys; ++at) {
      const int64_t key = k.list[at];
      if (key >= from && key <= last) continue;
      const bool is_listed = at < next->list.n_listed;
      if (has_maps) __builtin_prefetch(y(at), 0, 2);
      if (is_listed) fetch_row<0, 2>(k(at), head_pad);
      fetch_row<0, 2>(v(at), value_pad);
      if constexpr (kBackward) {
        if (is_listed) fetch_row<0, 2>(dk(at), head_pad);
        fetch_row<0, 2>(dv(at), value_pad);
      }
    }
    for (; at < stop; ++at) {
      const QueryTile<E, kLanes>& tile = *next;
      const int64_t query = tile.query[at - keys];
      if (query < 0) continue;
      fetch_row<0, 2>(tile.q[at - keys], head_pad);
      if constexpr (kBackward) {
        fetch_row<0, 2>(p.d_out.at<const E>(tile.b, tile.h, query), value_pad);
        fetch_row<0, 2>(p.out.at<const E>(tile.b, tile.h, query), value_pad);
        fetch_row<0, 2>(p.dq.at<const T>(tile.b, tile.h, query), head_pad);
      }
    }
  }
};

}  // namespace sb::SB_ISA
