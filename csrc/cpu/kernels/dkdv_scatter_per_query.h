// Scatter of the backward pass to dk, dv and dy, for queries with key lists of their own. Lists of neighbouring queries
// overlap: what a tile adds to the keys of a block is one small product, so a key's rows are read and written once.
#pragma once
#include "dkdv_scatter_shared.h"

namespace sb::SB_ISA {

// Consecutive keys of one query's list that lie in one block, whole or in part.
struct Piece {
  int32_t next;  // piece of the same block, in the order of the queries; -1 after the last
  int32_t at;    // first entry, in the record
  int8_t lane, part, offset, n;
};

template <class E>
struct BlockScatter {
  typedef AccType<E> T;
  int32_t* index;                 // block -> its entry in what follows if that names it, else anything
  int32_t *block, *first, *last;  // blocks that have pieces, and their first and last piece
  Piece* piece;
  T *w, *ds, *dt;             // weights of one block, [piece][key]
  const T **d_out, **q, **x;  // rows of the pieces
  T* wide;                    // rows of bfloat16 as float32: [2][lane][width]
  const T *lane_d_out[kBackwardLanes], *lane_q[kBackwardLanes];
  int64_t blocks, pieces, width;
};
template <class E>
SB_INLINE void allocate_block_scatter(const AttentionParams& p, Arena& arena, BlockScatter<E>& s) {
  typedef AccType<E> T;
  constexpr int64_t kMost = kBackwardLanes * kScatterBlockKeys;  // pieces of a block
  const int64_t entries = kBackwardLanes * p.max_keys;
  s.width = p.head_pad > p.value_pad ? p.head_pad : p.value_pad;
  s.index = arena.take<int32_t>(p.k_tokens / kScatterBlockKeys + 1);
  s.block = arena.take<int32_t>(entries), s.first = arena.take<int32_t>(entries), s.last = arena.take<int32_t>(entries);
  s.piece = arena.take<Piece>(entries);
  s.w = arena.take<T>(kMost * kScatterBlockKeys), s.ds = arena.take<T>(kMost * kScatterBlockKeys),
  s.dt = arena.take<T>(kMost * kScatterBlockKeys);
  s.d_out = arena.take<const T*>(kMost), s.q = arena.take<const T*>(kMost), s.x = arena.take<const T*>(kMost);
  s.wide = arena.take<T>(kPaired<E> ? 2 * kBackwardLanes * s.width : 0);
  s.blocks = s.pieces = 0;
}
// The entry of a block, or -1. The index is never cleared: that would take the time of all keys for a few.
template <class E>
SB_INLINE int32_t entry_of_block(const BlockScatter<E>& s, int64_t block) {
  const int32_t entry = s.index[block];
  return entry >= 0 && entry < s.blocks && s.block[entry] == block ? entry : -1;
}

// Cuts the record of one query into pieces. Blocks count from the row's first key, like those of its lists.
template <class E>
SB_INLINE void add_pieces(const ScatterRecord<E>& r, int lane, int64_t first_key, int64_t key_begin, int64_t key_end,
                          BlockScatter<E>& s) {
  const int64_t part[4] = {0, r.n_chunk, r.n_listed, r.n};
  for (int i = 0; i < 3; ++i) {
    int64_t at = lower_bound_key(r.key, part[i], part[i + 1], key_begin);
    while (at < part[i + 1] && r.key[at] < key_end) {
      const int64_t key = r.key[at] - first_key, offset = key % kScatterBlockKeys, block = key / kScatterBlockKeys;
      const int64_t room = kScatterBlockKeys - offset, left = part[i + 1] - at, most = left < room ? left : room;
      int64_t n = most;  // keys ascend: there is no gap if the last one is where it would be without
      if (r.key[at + most - 1] != r.key[at] + most - 1)
        for (n = 1; r.key[at + n] == r.key[at] + n;) ++n;
      const int32_t here = int32_t(s.pieces++);
      s.piece[here] = {-1, int32_t(at), int8_t(lane), int8_t(i), int8_t(offset), int8_t(n)};
      int32_t entry = entry_of_block<E>(s, block);
      if (entry < 0) {
        entry = s.index[block] = int32_t(s.blocks++);
        s.block[entry] = int32_t(block), s.first[entry] = here;
      } else {
        s.piece[s.last[entry]].next = here;
      }
      s.last[entry] = here;
      at += n;
    }
  }
}

template <class E, int kKeys>
SB_INLINE void copy_weights(const E* from, AccType<E>* to) {
  if constexpr (kKeys == 1)
    *to = widen_one<E>(*from);
  else
    store<AccType<E>, kKeys>(to, load_wide<kKeys>(from));
}

// Adds the pieces of one block to its keys [offset, offset + kKeys), which all of them cover.
template <class E, int kKeys>
SB_INLINE void scatter_keys(const AttentionParams& p, int64_t b, int64_t kv, const ScatterRecord<E>* records,
                            int64_t entry, int64_t key, int64_t offset, BlockScatter<E>& s) {
  typedef AccType<E> T;
  constexpr int N = kWidth<T>;
  int64_t values = 0, keys = 0, maps = 0;
  for (int32_t i = s.first[entry]; i >= 0; i = s.piece[i].next) {
    const Piece& piece = s.piece[i];
    if (kKeys == 1 && (offset < piece.offset || offset >= piece.offset + piece.n)) continue;
    const ScatterRecord<E>& r = records[piece.lane];
    const int64_t at = piece.at + offset - piece.offset;
    copy_weights<E, kKeys>(r.w + at, s.w + values * kKeys);
    s.d_out[values++] = s.lane_d_out[piece.lane];
    if (piece.part < 2) {
      copy_weights<E, kKeys>(r.ds + at, s.ds + keys * kKeys);
      s.q[keys++] = s.lane_q[piece.lane];
    }
    if (at >= r.L_begin && p.has_clusters())
      for (int64_t k = 0; k < kKeys; ++k) *p.dy.at<T>(b, kv, key + k) += r.dt[at - r.L_begin + k];
    if (at >= r.L_begin && p.has_maps()) {
      copy_weights<T, kKeys>(r.dt + at - r.L_begin, s.dt + maps * kKeys);
      s.x[maps++] = r.x[0];
    }
  }
  const auto add = [&](int64_t n, int64_t columns, const T* weight, const T** rows, const auto& to) SB_INLINE_LAMBDA {
    if (n > 0)
      gemm<T, N, true>(kKeys, columns, n, Strided<T>{weight, 1, kKeys}, PointedRows<const T>{rows},
                       DenseRows<T>{to.template at<T>(b, kv, key), to.row});
  };
  add(values, p.value_pad, s.w, s.d_out, p.dv);
  add(keys, p.head_pad, s.ds, s.q, p.dk);
  if (maps > 0) add(maps, p.map_pad, s.dt, s.x, p.dy);
}

// Prefetches the gradient rows of a block's keys.
template <class T>
SB_INLINE void fetch_block(const AttentionParams& p, int64_t b, int64_t kv, int64_t key) {
  const int64_t end = key + kScatterBlockKeys < p.k_tokens ? key + kScatterBlockKeys : p.k_tokens;
  for (; key < end; ++key)
    fetch_row<1>(p.dv.at<T>(b, kv, key), p.value_pad), fetch_row<1>(p.dk.at<T>(b, kv, key), p.head_pad);
}

// Adds a tile's share of dk, dv and dy for the keys in [key_begin, key_end).
template <class E>
void dkdv_scatter_per_query(const AttentionParams& p, int64_t b, int64_t kv, const ScatterRecord<E>* records, int n,
                            int64_t key_begin, int64_t key_end, BlockScatter<E>& s) {
  const int64_t first_key = p.rows[b].k_first;
  s.blocks = s.pieces = 0;
  for (int lane = 0; lane < n; ++lane) {
    const ScatterRecord<E>& r = records[lane];
    if (r.n == 0 || r.last_key < key_begin || r.first_key >= key_end) continue;
    add_pieces<E>(r, lane, first_key, key_begin, key_end, s);
    s.lane_d_out[lane] = widen_row_of<E>(r.d_out[0], p.value_pad, s.wide + lane * s.width);
    s.lane_q[lane] = widen_row_of<E>(r.q[0], p.head_pad, s.wide + (kBackwardLanes + lane) * s.width);
  }
  for (int64_t entry = 0; entry < s.blocks; ++entry) {
    const int64_t begin = first_key + int64_t(s.block[entry]) * kScatterBlockKeys;
    if (entry + 1 < s.blocks)
      fetch_block<AccType<E>>(p, b, kv, first_key + int64_t(s.block[entry + 1]) * kScatterBlockKeys);
    bool whole = begin >= key_begin && begin + kScatterBlockKeys <= key_end;
    for (int32_t i = s.first[entry]; i >= 0; i = s.piece[i].next) whole &= s.piece[i].n == kScatterBlockKeys;
    if (whole) {
      scatter_keys<E, kScatterBlockKeys>(p, b, kv, records, entry, begin, 0, s);
      continue;
    }
    for (int64_t offset = 0; offset < kScatterBlockKeys; ++offset)
      if (begin + offset >= key_begin && begin + offset < key_end)
        scatter_keys<E, 1>(p, b, kv, records, entry, begin + offset, offset, s);
  }
  for (int lane = 0; lane < n; ++lane) scatter_by_key<E>(p, b, kv, records[lane], key_begin, key_end);
}

}  // namespace sb::SB_ISA
