// The tiles of a unit one after the other, each with its list of keys, and what the next one is going to touch.

template <class E, int kLanes>
struct Tile {
  Group<E, kLanes> g;
  KeyList list;  // of queries that share it
};

SB_INLINE int64_t first_key(const KeyList& list) {
  int64_t first = INT64_MAX;
  if (list.n0 > 0) first = list.key[0];
  if (list.n01 > list.n0 && list.key[list.n0] < first) first = list.key[list.n0];
  if (list.n > list.n01 && list.key[list.n01] < first) first = list.key[list.n01];
  return first;
}
SB_INLINE int64_t last_key(const KeyList& list) {
  int64_t last = -1;
  if (list.n0 > 0) last = list.key[list.n0 - 1];
  if (list.n01 > list.n0 && list.key[list.n01 - 1] > last) last = list.key[list.n01 - 1];
  if (list.n > list.n01 && list.key[list.n - 1] > last) last = list.key[list.n - 1];
  return last;
}

template <class T>
SB_INLINE void fetch_row(const T* row, int64_t columns) {
  for (int64_t e = 0; e < columns; e += int64_t(64 / sizeof(T))) __builtin_prefetch(row + e, 0, 2);
}

// Of lists over so few keys, what one names is in the second level of cache since the first that did.
constexpr int64_t kNearKeys = 512;

// Rows that the next tile reads or adds to, and the current one did not. No hardware prefetcher guesses where a list
// goes next, and a burst of fetches would wait for itself: they are spread between the products of the current tile.
template <class E, int kLanes, bool kBackward>
struct Upcoming {
  typedef SumOf<E> T;
  const AttentionParams& p;
  const Tile<E, kLanes>* next = nullptr;
  ListedRows<const E> k, v;
  ListedRows<const T> y, dk, dv;
  int64_t at = 0, end = 0, head_pad, value_pad;  // keys of the list, then queries
  int64_t from, last;                            // keys that are there already
  bool mapped;

  explicit SB_INLINE Upcoming(const AttentionParams& params) : p(params) {}
  SB_INLINE void look_ahead(const Tile<E, kLanes>& now, const Tile<E, kLanes>* then) {
    next = p.index && p.k_tokens <= kNearKeys ? nullptr : then, at = end = 0;
    if (!next) return;
    const Group<E, kLanes>& g = next->g;
    const KeyList& list = next->list;
    end = list.n + g.lanes;
    // Of a window, and of a chunk, only the keys that came in; a span ascends: they are at its end.
    last = last_key(now.list), from = !p.index ? 0 : p.is_causal ? now.g.chunk_first : last + 1;
    if (!p.index && !p.is_causal && list.n == list.n01)
      for (at = list.n; at > 0 && list.key[at - 1] > last;) --at;
    k = listed<E>(p.k, g.b, g.kv, list.key), v = listed<E>(p.v, g.b, g.kv, list.key);
    y = listed<T>(p.y, g.b, g.kv, list.key), dk = listed<T>(p.dk, g.b, g.kv, list.key),
    dv = listed<T>(p.dv, g.b, g.kv, list.key);
    mapped = p.low_rank != LowRank::kNone, head_pad = p.head_pad, value_pad = p.value_pad;
  }
  SB_INLINE int64_t left() const { return end - at; }
  SB_INLINE void fetch(int64_t count) {
    const int64_t stop = at + count < end ? at + count : end, keys = next ? next->list.n : 0;
    for (; at < stop && at < keys; ++at) {
      const int64_t key = k.list[at];
      if (key >= from && key <= last) continue;
      const bool is_listed = at < next->list.n01;
      if (mapped) __builtin_prefetch(y(at), 0, 2);
      if (is_listed) fetch_row(k(at), head_pad);
      fetch_row(v(at), value_pad);
      if constexpr (kBackward) {
        if (is_listed) fetch_row(dk(at), head_pad);
        fetch_row(dv(at), value_pad);
      }
    }
    for (; at < stop; ++at) {
      const Group<E, kLanes>& g = next->g;
      const int64_t query = g.query[at - keys];
      if (query < 0) continue;
      fetch_row(g.q[at - keys], head_pad);
      if constexpr (kBackward) {
        fetch_row(p.d_out.at<const E>(g.b, g.h, query), value_pad);
        fetch_row(p.out.at<const E>(g.b, g.h, query), value_pad);
        fetch_row(p.dq.at<const T>(g.b, g.h, query), head_pad);
      }
    }
  }
};

// Calls visit(tile, next tile or null) for every tile of queries whose first slot belongs to `unit`: tiles of one
// block, with their lists, or single queries that share a state slot, without.
template <class E, int kLanes>
SB_INLINE void plan_tiles(const AttentionParams& p, Arena& arena, Tile<E, kLanes> (&tile)[2]) {
  for (auto& t : tile) t.list.key = arena.take<int32_t>(p.max_pairs);
}
template <class E, int kLanes, bool kShared, class Visit>
SB_INLINE void for_each_group(const AttentionParams& p, int64_t b, int64_t h, int64_t unit, const void* zero_row,
                              Tile<E, kLanes> (&tile)[2], Visit& visit) {
  const RowRange& range = p.rows[b];
  const int64_t slots = slots_of_row(p, range);
  const int64_t width = p.is_causal ? kChunk : kQueriesPerUnit;
  const int64_t shift = p.is_causal ? int64_t(range.q_first) + range.offset - range.k_first : 0;
  // With a causal edge a unit is a state slot: the last one takes every query past the keys.
  const int64_t last = p.is_causal ? state_of_edge(p, int64_t(range.k_end) - range.k_first - 1) : p.units - 1;
  if (unit > last) return;
  int64_t begin = unit * width - shift, end = begin + width;
  if (unit == 0 || begin < 0) begin = 0;
  if (unit == last || end > slots) end = slots;
  if constexpr (kShared) {
    const int64_t parts = (p.block_q + kLanes - 1) / kLanes;
    int64_t at = 0, filled = 0;
    for (int64_t block = begin / p.block_q; block * p.block_q < end; ++block)
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t first = block * p.block_q + part * kLanes;
        if (first < begin || first >= end) continue;
        int64_t stop = first + kLanes < (block + 1) * p.block_q ? first + kLanes : (block + 1) * p.block_q;
        stop = stop < slots ? stop : slots;
        Tile<E, kLanes>& next = tile[at];
        if (!fill_group<E, kLanes>(p, b, h, first, stop - first, zero_row, next.g)) continue;
        if constexpr (Visit::kLists) collect_pairs(p, b, h, first, stop - 1, next.list);
        at = 1 - at;
        if (filled++) visit(tile[at], &next);
      }
    if (filled) visit(tile[1 - at], nullptr);
  } else {
    for (int64_t first = begin; first < end;) {
      int64_t stop = first + kLanes < end ? first + kLanes : end;
      const int64_t slot = state_of_edge(p, edge_of_slot(p, range, first));
      while (state_of_edge(p, edge_of_slot(p, range, stop - 1)) != slot) --stop;
      if (fill_group<E, kLanes>(p, b, h, first, stop - first, zero_row, tile[0].g)) visit(tile[0], nullptr);
      first = stop;
    }
  }
}
