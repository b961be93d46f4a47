// Which keys a tile of queries evaluates. A tile holds up to `kLanes` queries of one query block and one key list in
// three parts, each ascending:
//   [0, n0)        listed keys from the chunk of the tile's causal edge on: exp(s), each query masked by its own edge
//   (n0 = 0 without a causal edge) [n0, n01)      listed keys before that chunk, which every query of the tile sees:
//   exp(s) minus the L that the state holds [n01, n)       keys that are not listed and not taken from the state, those
//   of the chunk and a few before it: L, masked by the edge

template <class E, int kLanes>
struct Group {
  typedef SumOf<E> T;
  int64_t b, h, kv;       // batch row, query head, its key/value head
  int64_t lanes;          // queries in use
  int64_t query[kLanes];  // -1: no query in this lane
  int64_t first_slot;
  int64_t slot;         // state slot
  int64_t chunk_first;  // key that the edges count from: the first of the chunk of the causal edge, or the row's first
  T edge[kLanes];       // causal edge; below 0: sees nothing from chunk_first on
  const E* zero_row;
  const E* q[kLanes];  // rows; a zero row where there is no query
  const T* x[kLanes];
  T rho[kLanes];
};

struct KeyList {
  int32_t* key;  // absolute
  int64_t n0, n01, n;
  bool complement;  // the state's part is needed: it holds keys that are neither listed nor in the third part
  // With few keys, of queries that have lists of their own: all keys that any of them sees (n0 = 0, n01 = n), and for
  // each, which queries list it. Null else.
  const uint32_t* lanes = nullptr;
};

// Causal edge of query slot `s`, relative to the first key of the row; without a causal edge the last key.
SB_INLINE int64_t edge_of_slot(const AttentionParams& p, const RowRange& range, int64_t s) {
  const int64_t last = range.k_end - range.k_first - 1;
  if (!p.is_causal) return last;
  const int64_t edge = int64_t(range.q_first) + s + range.offset - range.k_first;
  return edge < -1 ? -1 : edge > last ? last : edge;
}
// The state slot of a causal edge: every whole chunk before the edge's own.
SB_INLINE int64_t state_of_edge(const AttentionParams& p, int64_t edge) {
  return p.is_causal ? (edge < 0 ? 0 : edge / kChunk) : p.slots - 1;
}
// Slots of queries: with an order every position of it, else the row's range.
SB_INLINE int64_t slots_of_row(const AttentionParams& p, const RowRange& range) {
  return p.order ? p.q_tokens : int64_t(range.q_end) - range.q_first;
}

// Whether any slot has a query.
template <class E, int kLanes>
SB_INLINE bool fill_group(const AttentionParams& p, int64_t b, int64_t h, int64_t first_slot, int64_t lanes,
                          const void* zero_row, Group<E, kLanes>& g) {
  typedef SumOf<E> T;
  const RowRange& range = p.rows[b];
  g.zero_row = static_cast<const E*>(zero_row);
  g.b = b, g.h = h, g.kv = p.kv_head(h), g.lanes = lanes, g.first_slot = first_slot;
  g.slot = state_of_edge(p, edge_of_slot(p, range, first_slot));
  const int64_t chunk = p.is_causal ? g.slot * kChunk : 0;
  g.chunk_first = range.k_first + chunk;
  const bool mapped = p.low_rank != LowRank::kNone;
  if (lanes == kLanes && !p.order && !p.q_mask && !p.is_causal) {
    const int64_t first = range.q_first + first_slot;
    const T edge = T(edge_of_slot(p, range, first_slot));
    for (int lane = 0; lane < kLanes; ++lane) {
      g.query[lane] = first + lane, g.edge[lane] = edge;
      g.q[lane] = p.q.at<const E>(b, h, first + lane);
      g.x[lane] = mapped ? p.x.at<const T>(b, h, first + lane) : static_cast<const T*>(zero_row);
      g.rho[lane] = mapped ? *p.rho.at<const T>(b, h, first + lane) : T(0);
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
    g.query[lane] = i, any |= i >= 0;
    g.edge[lane] = i < 0 ? T(-1) : T(edge_of_slot(p, range, first_slot + lane) - chunk);
    g.q[lane] = i < 0 ? g.zero_row : p.q.at<const E>(b, h, i);
    g.x[lane] = mapped && i >= 0 ? p.x.at<const T>(b, h, i) : static_cast<const T*>(zero_row);
    g.rho[lane] = mapped && i >= 0 ? *p.rho.at<const T>(b, h, i) : T(0);
  }
  return any;
}

struct KeyAppender {
  int32_t* key;
  const uint8_t* mask;
  int64_t first, chunk_first, n, from_chunk;
  SB_INLINE void append(int64_t begin, int64_t end) {
    if (!mask && begin < end) {
      for (int64_t j = begin; j < end; ++j) key[n + j - begin] = int32_t(first + j);
      n += end - begin;
      if (end > chunk_first) from_chunk += end - (begin > chunk_first ? begin : chunk_first);
      return;
    }
    for (int64_t j = begin; j < end; ++j) {
      if (mask && mask[j]) continue;
      key[n++] = int32_t(first + j);
      from_chunk += j >= chunk_first;
    }
  }
};

// Appends keys begin .. end - 1 (from the row's first key) that are neither ignored nor among the ascending key[listed,
// listed_end).
SB_INLINE void append_unlisted(KeyList& list, const uint8_t* mask, int64_t first, int64_t begin, int64_t end,
                               int64_t listed, int64_t listed_end) {
  for (int64_t j = begin; j < end; ++j) {
    const int32_t absolute = int32_t(first + j);
    if (listed < listed_end && list.key[listed] == absolute)
      ++listed;
    else if (!(mask && mask[j]))
      list.key[list.n++] = absolute;
  }
}

// Lists the keys of slots first_slot .. last_slot, which lie in one query block.
SB_INLINE void collect_pairs(const AttentionParams& p, int64_t b, int64_t h, int64_t first_slot, int64_t last_slot,
                             KeyList& list) {
  const RowRange& range = p.rows[b];
  const int64_t length = range.k_end - range.k_first, block = first_slot / p.block_q;
  const int64_t edge = edge_of_slot(p, range, last_slot);
  const int64_t slot = state_of_edge(p, edge_of_slot(p, range, first_slot));
  const int64_t chunk_first = p.is_causal ? slot * kChunk : length;
  const uint8_t* mask = p.k_mask ? p.k_mask + b * p.k_tokens + range.k_first : nullptr;

  int64_t lo = 0, hi = 0;
  if (p.span) {
    const int32_t* span = p.span + b * p.span_batch + block * 2;
    lo = span[0] - range.k_first, hi = span[1] - range.k_first;
    lo = lo < 0 ? 0 : lo;
    hi = hi > edge + 1 ? edge + 1 : hi;
  }
  const int32_t *entry = nullptr, *entry_end = nullptr;
  if (p.index) {
    const int64_t row = (b * p.list_heads + h * p.list_heads / p.q_heads) * p.blocks + block;
    entry = p.index + row * p.capacity;
    entry_end = entry + p.count[row];
  }

  // Ascending merge of the span and the listed blocks: listed keys inside the span are already there.
  KeyAppender to{list.key, mask, range.k_first, chunk_first, 0, 0};
  bool span_done = lo >= hi;
  if (p.block_k == 1 && !mask && span_done && !p.is_causal) {  // single keys as they are
    for (; entry != entry_end; ++entry) list.key[to.n++] = int32_t(range.k_first + *entry);
  }
  for (; entry != entry_end; ++entry) {
    const int64_t begin = int64_t(*entry) * p.block_k;
    int64_t end = begin + p.block_k;
    if (begin > edge) break;
    end = end > edge + 1 ? edge + 1 : end;
    if (lo < hi && begin < hi && end > lo) {
      to.append(begin, lo < end ? lo : end);
      if (!span_done) to.append(lo, hi), span_done = true;
      to.append(begin > hi ? begin : hi, end);
      continue;
    }
    if (!span_done && begin >= hi) to.append(lo, hi), span_done = true;
    to.append(begin, end);
  }
  if (!span_done) to.append(lo, hi);

  int32_t* key = list.key;
  const int64_t n = to.n, from_chunk = to.from_chunk;
  // Keys came ascending: [before the chunk | in the chunk]. The three-part order wants the chunk's first.
  const int64_t before = n - from_chunk;
  list.n0 = from_chunk, list.n01 = list.n = n;
  list.complement = p.low_rank != LowRank::kNone && before < p.valid_before[b * p.slots + slot];
  if (from_chunk > 0 && before > 0) {
    int32_t moved[2 * kChunk + 32];
    for (int64_t i = 0; i < from_chunk; ++i) moved[i] = key[before + i];
    for (int64_t i = before - 1; i >= 0; --i) key[from_chunk + i] = key[i];
    for (int64_t i = 0; i < from_chunk; ++i) key[i] = moved[i];
  }
  if (p.low_rank == LowRank::kNone) return;
  // A complement of a few keys is evaluated pair by pair: cheaper than the state's features, and nothing cancels.
  if (list.complement && p.valid_before[b * p.slots + slot] - before <= p.direct_keys(range)) {
    list.complement = false;
    append_unlisted(list, mask, range.k_first, 0, chunk_first < length ? chunk_first : length, list.n0, list.n01);
  }
  if (p.is_causal) append_unlisted(list, mask, range.k_first, chunk_first, edge + 1, 0, list.n0);
}

// Where x.y is needed from.
SB_INLINE int64_t first_mapped(const KeyList& list) { return list.lanes ? 0 : list.complement ? list.n0 : list.n01; }

// The scores of a tile, or of the one query at `first_slot`, with `n` listed keys, from the forward to the backward
// pass: that of key i and lane l at data[i * stride + l]. Null where they are not kept: there is room for the lists of
// the call, which a short row whose keys are all evaluated together can exceed.
template <class T>
struct KeptScores {
  T* data;
  int64_t stride;
};
template <class T, int kLanes>
SB_INLINE KeptScores<T> kept_scores(const AttentionParams& p, int64_t b, int64_t h, int64_t first_slot, int64_t n) {
  if (!p.scores || n > p.kept_keys) return {nullptr, kLanes};
  const int64_t lanes = p.kept_lanes, tile = first_slot / lanes;  // tiles are full
  T* head = static_cast<T*>(p.scores) + (b * p.q_heads + h) * p.kept_slots * p.kept_keys;
  return {head + tile * lanes * p.kept_keys + first_slot % lanes, lanes == 1 ? kLanes : lanes};
}

// Rows of the projection that made the map of head h of `heads`; null where it is not given.
template <class T>
SB_INLINE const T* weight_of_head(const AttentionParams& p, const MapWeight& w, int64_t b, int64_t h, int64_t heads) {
  if (!w.data) return nullptr;
  return static_cast<const T*>(w.data) + b * w.batch + h * w.heads / heads * (p.rank + 1) * p.head_pad;
}

struct Arena {  // a bump allocator over one block; with a null base it only counts
  char* base;
  int64_t used;
  template <class U>
  SB_INLINE U* take(int64_t count) {
    const int64_t at = used;
    used += pad_to(count * int64_t(sizeof(U)) + 64, 64);
    return base ? reinterpret_cast<U*>(base + at) : nullptr;
  }
};
