// Scores q.k of listed keys, and dO.v alike, for a tile of queries and for a single one.
#pragma once
#include "gathered_rows.h"
#include "query_tile.h"
#include "transpose.h"

namespace sb::SB_ISA {

// Scores kept from the forward to the backward pass, of a tile or of the one query at `first_slot`, with n listed keys:
// that of key i and lane l is data[i * stride + l]. Null where they are not kept: there is room for the lists of the
// call, which a short row whose keys are all evaluated together can exceed.
template <class T>
struct KeptScores {
  T* data;
  int64_t stride;
};
template <class T, int kLanes>
SB_INLINE KeptScores<T> kept_scores(const AttentionParams& p, int64_t b, int64_t h, int64_t first_slot, int64_t n) {
  if (!p.scores || n > p.kept_keys) return {nullptr, kLanes};
  const int64_t lanes = p.kept_lanes, tile = first_slot / lanes;  // tiles are full
  T* head = static_cast<T*>(p.scores) + (b * p.q_heads + h) * p.kept_slots * p.kept_rows();
  return {head + tile * lanes * p.kept_rows() + first_slot % lanes, lanes == 1 ? kLanes : lanes};
}
// The exponents of the clusters of a tile that shares a list, likewise.
template <class T>
SB_INLINE KeptScores<T> kept_exponents(const AttentionParams& p, int64_t b, int64_t h, int64_t first_slot) {
  if (!p.scores || p.kept_clusters == 0) return {nullptr, 0};
  const int64_t lanes = p.kept_lanes, tile = first_slot / lanes;
  T* head = static_cast<T*>(p.scores) + (b * p.q_heads + h) * p.kept_slots * p.kept_rows();
  return {head + (tile * p.kept_rows() + p.kept_keys) * lanes + first_slot % lanes, lanes};
}

// Queries in lanes, in steps. Products with them are exponents in base 2 after scale_scores: the factor is part of the
// queries, except in bfloat16, which would round it.
template <class E, int kLanes>
SB_INLINE void queries_in_lanes(const AttentionParams& p, const QueryTile<E, kLanes>& tile, StepOf<E>* qT) {
  if constexpr (kPaired<E>)
    transpose_steps<E, kLanes>(tile.q, p.head_dim, qT);
  else
    transpose_rows<E, kLanes>(tile.q, p.head_dim, E(kLog2e * p.scale), qT);
}
// A pass of its own: fused with the subtraction of the stabiliser, the product would be rounded otherwise than in the
// stabiliser itself, which large scores do not survive.
template <class E>
SB_INLINE void scale_scores([[maybe_unused]] const AttentionParams& p, [[maybe_unused]] int64_t n,
                            [[maybe_unused]] AccType<E>* S) {
  if constexpr (kPaired<E>) {
    typedef AccType<E> T;
    constexpr int N = 8;  // the narrowest tile
    const T log2e = T(kLog2e * p.scale);
    for (int64_t i = 0; i < n; i += N) store<T, N>(S + i, load<T, N>(S + i) * log2e);
  }
}

// out[i][lane] = rows(i).lanes for n listed rows, prefetching `per_slice` of the next tile's rows after every few.
template <class T, int kLanes>
inline constexpr int kSliceRows = kLanes <= kWidth<T> ? 8 : 6;
template <class E, int N, int kLanes, class Prefetcher>
SB_INLINE void dot_lanes(int64_t n, int64_t depth, const ListedRows<const E>& rows, const StepOf<E>* lanes,
                         AccType<E>* out, Prefetcher& prefetcher, int64_t per_slice) {
  typedef AccType<E> T;
  constexpr int64_t kSlice = kSliceRows<T, kLanes>;
  for (int64_t i = 0; i < n; i += kSlice) {
    gemm<T, N, false>(n - i < kSlice ? n - i : kSlice, kLanes, steps_of<E>(depth),
                      AcrossSteps<E, ListedRows<const E>>{rows.from(i)}, DenseRows<const StepOf<E>>{lanes, kLanes},
                      DenseRows<T>{out + i * kLanes, kLanes});
    prefetcher.fetch(per_slice);
  }
}

// Exponents in base 2 of one query's listed keys. The factor is part of the query's copy `row`; in bfloat16 it
// multiplies the products.
template <class E>
SB_INLINE void scores_of_query(const AttentionParams& p, const E* q, int64_t n, const ListedRows<const E>& keys,
                               [[maybe_unused]] StepOf<E>* row, AccType<E>* S) {
  typedef AccType<E> T;
  if constexpr (kPaired<E>) {
    dot_rows<E>(n, keys, q, p.head_pad, S);
    scale_scores<E>(p, n, S);
  } else {
    const T log2e = T(kLog2e * p.scale);
    for (int64_t e = 0; e < p.head_pad; ++e) row[e] = q[e] * log2e;
    dot_rows<T>(n, keys, row, p.head_pad, S);
  }
}

}  // namespace sb::SB_ISA
