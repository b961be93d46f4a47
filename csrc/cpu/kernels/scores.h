// Products of queries with listed keys: scores q.k, dO.v, and x.y of the low-rank kernel, for a tile of queries and for
// a single one.
#pragma once
#include <cstdint>

#include "../../math/base2.h"
#include "../../params.h"
#include "element_types.h"
#include "gathered_rows.h"
#include "gemm.h"
#include "isa.h"
#include "key_list.h"
#include "query_tile.h"
#include "transpose.h"
#include "vec.h"

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
  T* head = static_cast<T*>(p.scores) + (b * p.q_heads + h) * p.kept_slots * p.kept_keys;
  return {head + tile * lanes * p.kept_keys + first_slot % lanes, lanes == 1 ? kLanes : lanes};
}

// Queries in lanes, in steps. Products with them are exponents in base 2 after ScoreFactor: the factor is part of the
// queries, except in bfloat16, which would round it.
template <class E, int kLanes>
SB_INLINE void queries_in_lanes(const AttentionParams& p, const QueryTile<E, kLanes>& tile, StepOf<E>* qT) {
  if constexpr (kPaired<E>)
    transpose_steps<E, kLanes>(tile.q, p.head_dim, qT);
  else
    transpose_rows<E, kLanes>(tile.q, p.head_dim, E(kLog2e * p.scale), qT);
}
template <class E>
struct ScoreFactor {
  AccType<E> log2e;
  explicit SB_INLINE ScoreFactor(const AttentionParams& p) : log2e(AccType<E>(kLog2e * p.scale)) {}
  template <class V>
  SB_INLINE V operator()(V s) const {
    if constexpr (kPaired<E>)
      return s * log2e;
    else
      return s;
  }
};

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
    constexpr int N = kWidth<T>;
    const ScoreFactor<E> score(p);
    dot_rows<E>(n, keys, q, p.head_pad, S);
    for (int64_t i = 0; i < n; i += N) store<T, N>(S + i, score(load<T, N>(S + i)));
  } else {
    const T log2e = T(kLog2e * p.scale);
    for (int64_t e = 0; e < p.head_pad; ++e) row[e] = q[e] * log2e;
    dot_rows<T>(n, keys, row, p.head_pad, S);
  }
}

// t[i][lane] = x.y of listed keys from entry `begin` on, with x in lanes.
template <class E, int kLanes>
SB_INLINE void low_rank_products(const AttentionParams& p, const QueryTile<E, kLanes>& tile, const KeyList& list,
                                 int64_t begin, const AccType<E>* xT, AccType<E>* t) {
  typedef AccType<E> T;
  constexpr int N = kLaneWidth<T, kLanes>;
  const auto y = listed<T>(p.y, tile.b, tile.kv, list.key + begin);
  gemm<T, N, false>(list.n - begin, kLanes, p.rank, AcrossRows<decltype(y)>{y}, DenseRows<const T>{xT, kLanes},
                    DenseRows<T>{t, kLanes});
}
// The coordinates of a query as a row that is zero behind them, and x.y of n keys with it.
template <class T>
SB_INLINE void map_row(const AttentionParams& p, const T* x, T* row) {
  for (int64_t a = 0; a < p.map_pad; ++a) row[a] = a < p.rank ? x[a] : T(0);
}
template <class T>
SB_INLINE void low_rank_products_of_query(const AttentionParams& p, int64_t b, int64_t kv, int64_t n,
                                          const int32_t* key, const T* row, T* t) {
  dot_rows<T>(n, listed<T>(p.y, b, kv, key), row, p.map_pad, t);
}

}  // namespace sb::SB_ISA
