// Products t = x.y of the low-rank kernel with listed keys, for a tile of queries and for a single one.
#pragma once
#include "../../math/low_rank_kernels.h"
#include "cluster_weights.h"

namespace sb::SB_ISA {

// t[i][lane] = x.y of the n keys, with x in lanes; of the centroid kernel as look_up_clusters.
template <class E, int kLanes>
SB_INLINE void low_rank_products(const AttentionParams& p, const QueryTile<E, kLanes>& tile, int64_t n,
                                 const int32_t* key, const AccType<E>* xT, AccType<E>* t) {
  typedef AccType<E> T;
  if (p.has_clusters())
    return look_up_clusters<kLanes>(p, clusters_of_keys(p, tile.b, tile.kv), tile.list.uses_kv_state, n, key, xT, t);
  const auto y = listed<T>(p.y, tile.b, tile.kv, key);
  gemm<T, kLaneWidth<T, kLanes>, false>(n, kLanes, p.rank, AcrossSteps<T, decltype(y)>{y},
                                        DenseRows<const T>{xT, kLanes}, DenseRows<T>{t, kLanes});
}
// dX[gradient_rows][lane] += sum over the n keys of y dt.
template <class E, int kLanes>
SB_INLINE void add_x_gradients(const AttentionParams& p, const QueryTile<E, kLanes>& tile, int64_t n,
                               const int32_t* key, const AccType<E>* dt, AccType<E>* dX) {
  typedef AccType<E> T;
  const auto y = listed<T>(p.y, tile.b, tile.kv, key);
  gemm<T, kLaneWidth<T, kLanes>, true>(gradient_rows(p.low_rank, p.rank), kLanes, n, DownRows<decltype(y)>{y},
                                       DenseRows<const T>{dt, kLanes}, DenseRows<T>{dX, kLanes});
}

// The coordinates of a query as a row that is zero behind them.
template <class T>
SB_INLINE void map_row(const AttentionParams& p, const T* x, T* row) {
  for (int64_t a = 0; a < p.map_pad; ++a) row[a] = a < p.rank ? x[a] : T(0);
}
// t[i] = x.y of the n keys, with x as such a row.
template <class T>
SB_INLINE void low_rank_products_of_query(const AttentionParams& p, int64_t b, int64_t kv, int64_t n,
                                          const int32_t* key, const T* x, T* t) {
  dot_rows<T>(n, listed<T>(p.y, b, kv, key), x, p.map_pad, t);
}

}  // namespace sb::SB_ISA
