// Backward pass of queries with key lists of their own: lanes are keys; attention_backward_tile.h has the steps.
#pragma once
#include "attention_backward_scratch.h"
#include "kv_state.h"
#include "stabiliser.h"

namespace sb::SB_ISA {

// Memory of P and dO.v - dO.o of one query: its record, or scratch where the record is bfloat16.
template <class T>
struct LaneWeights {
  T *P, *g;
};
template <class E, int kLanes>
SB_INLINE LaneWeights<AccType<E>> weights_of(const AttentionParams& p, const BackwardScratch<E, kLanes>& s, int lane,
                                             const ScatterRecord<E>& r) {
  if constexpr (kPaired<E>)
    return {s.P + lane * p.max_keys, s.g + lane * p.max_keys};
  else
    return {r.ds, r.w};
}

// out[i] = rows(i).d_out of n rows, values or outputs. Few queries do not average out what rounding leaves of
// dO.v - dO.o where the two are close: their float32 products are summed in float64.
template <class E, class R>
SB_INLINE void value_products(const AttentionParams& p, const RowRange& row, int64_t n, const R& rows, const E* d_out,
                              AccType<E>* out) {
  if constexpr (sizeof(E) == sizeof(float)) {
    if (row.q_end - row.q_first <= kByKeyQueries) {
      for (int64_t i = 0; i < n; ++i) out[i] = AccType<E>(dot_in_double(rows(i), d_out, p.value_pad));
      return;
    }
  }
  dot_rows<E>(n, rows, d_out, p.value_pad, out);
}

// Steps 1 and 2, with a record for each query. All queries take one step before any takes the next.
template <class E, int kLanes>
SB_INLINE void weigh_per_query(const AttentionParams& p, const QueryTile<E, kLanes>& tile,
                               const LogScales<AccType<E>>& kappa, AccType<E> kappa_ref, BackwardScratch<E, kLanes>& s,
                               ScatterRecord<E>* records) {
  typedef AccType<E> T;
  constexpr int N = kWidth<T>;
  typedef Vector<T, N> V;
  const RuntimeKernel kernel{p.low_rank};
  const auto for_each_query = [&](const auto& visit) SB_INLINE_LAMBDA {
    for (int lane = 0; lane < kLanes; ++lane)
      if (tile.query[lane] >= 0) visit(lane, records[lane], weights_of<E, kLanes>(p, s, lane, records[lane]));
  };

  // 1. S, then dP = V dO.
  for_each_query([&](int lane, ScatterRecord<E>& r, const LaneWeights<T>& w) {
    KeyList list{r.key, 0, 0, 0, false};
    collect_keys(p, tile.b, tile.h, tile.first_slot + lane, tile.first_slot + lane, list);
    r.n_chunk = list.n_chunk, r.n_listed = list.n_listed, r.n = list.n, r.L_begin = first_low_rank(list);
    r.first_key = first_key(list), r.last_key = last_key(list);
    r.q[0] = tile.q[lane], r.d_out[0] = s.d_out[lane], r.x[0] = tile.x[lane];
    s.kv_state_log[lane] = list.uses_kv_state ? tile.rho[lane] + kappa_ref : kLowest<T>;
    const KeptScores<T> kept = kept_scores<T, 1>(p, tile.b, tile.h, tile.first_slot + lane, r.n_listed);
    if (!kept.data) scores_of_query<E>(p, tile.q[lane], r.n_listed, listed<E>(p.k, tile.b, tile.kv, r.key), s.qT, w.P);
    const int64_t rest = r.n - r.n_listed;
    if (is_lost<T>(s.lse[lane])) {
      if (p.has_clusters() && rest > 0)
        look_up_clusters_of_query<kLanes>(p, clusters_of_keys(p, tile.b, tile.kv), false, rest, r.key + r.n_listed,
                                          s.xT, lane, r.dt);
      s.lse[lane] = stabiliser_of_query<T>(list, kappa, kept.data ? kept.data : w.P, tile.rho[lane],
                                           s.kv_state_log[lane], p.has_clusters() ? r.dt - r.n_listed : nullptr);
    }
  });
  for_each_query([&](int lane, ScatterRecord<E>& r, const LaneWeights<T>& w) {
    value_products<E>(p, p.rows[tile.b], r.n, listed<E>(p.v, tile.b, tile.kv, r.key), s.d_out[lane], w.g);
  });
  kv_state_weights<T, kLanes>(tile.rho, kappa_ref, s.lse, s.kv_state_log, s.weight);

  // 2. P into ds, dP - dO.o into w, dU/dt into dt and the weight into net.
  for_each_query([&](int lane, ScatterRecord<E>& r, const LaneWeights<T>& w) {
    const int64_t L_begin = r.L_begin, L_count = p.has_low_rank() ? r.n - L_begin : 0;
    T *exponent = s.exponent, *net = s.net + lane * p.max_keys;
    if (L_count) {
      if (p.has_clusters()) {
        look_up_clusters_of_query<kLanes>(p, clusters_of_keys(p, tile.b, tile.kv), L_begin < r.n_listed, L_count,
                                          r.key + L_begin, s.xT, lane, r.dt);
      } else {
        map_row<T>(p, tile.x[lane], s.row);
        low_rank_products_of_query<T>(p, tile.b, tile.kv, L_count, r.key + L_begin, s.row, r.dt);
      }
      for (int64_t i = L_begin; i < r.n_listed; ++i) exponent[i - L_begin] = kappa(r.key[i]) - kappa_ref;
      for (int64_t i = r.n_listed; i < r.n; ++i) {
        T& t = r.dt[i - L_begin];
        exponent[i - L_begin] = ((p.has_clusters() ? t : tile.rho[lane]) - s.lse[lane]) + kappa(r.key[i]);
        if (p.has_clusters()) t = T(1);
      }
    }
    const T a = s.weight[lane];
    const KeptScores<T> kept = kept_scores<T, 1>(p, tile.b, tile.h, tile.first_slot + lane, r.n_listed);
    const T* S = kept.data ? kept.data : w.P;
    for (int64_t i = 0; i < r.n_listed; i += N) store<T, N>(w.P + i, exp2v<N>(load<T, N>(S + i) - s.lse[lane]));
    for (int64_t i = 0; i < L_count; i += N) {  // U in exponent, dU/dt in dt
      const V e = exp2v<N>(load<T, N>(exponent + i)), t = load<T, N>(r.dt + i);
      store<T, N>(r.dt + i, e * kernel.slope(t));
      store<T, N>(exponent + i, e * kernel.value(t));
    }
    for (int64_t i = 0; i < r.n_listed; ++i) net[i] = w.P[i];
    for (int64_t i = L_begin; i < r.n_listed; ++i) net[i] -= exponent[i - L_begin] *= a, r.dt[i - L_begin] *= -a;
    for (int64_t i = r.n_listed; i < r.n; ++i) net[i] = exponent[i - L_begin];
    for (int64_t i = 0; i < r.n; ++i) w.g[i] -= s.delta[lane];

    V moment = {};
    int64_t i = 0;
    for (; i + N <= r.n; i += N) moment += load<T, N>(net + i) * load<T, N>(w.g + i);
    T tail = T(0);
    for (; i < r.n; ++i) tail += net[i] * w.g[i];
    const int64_t taken = r.n_listed - L_begin;
    s.slope[lane] = sum_lanes<T, N>(moment) + tail;
    s.removed[lane] = sum_short<T>(exponent, L_count ? taken : 0);
    s.exact[lane] = sum_short<T>(w.P, r.n_listed) + (L_count ? sum_short<T>(exponent + taken, L_count - taken) : T(0));
  });
}

// Steps 4 and 5 of one query.
template <class E, int kLanes>
SB_INLINE void gradients_per_query(const AttentionParams& p, const QueryTile<E, kLanes>& tile, int lane,
                                   BackwardScratch<E, kLanes>& s, ScatterRecord<E>& r) {
  typedef AccType<E> T;
  const T correction = s.correction[lane], inverse = s.inverse[lane], scaled = inverse * T(p.scale);
  const T* net = s.net + lane * p.max_keys;
  const LaneWeights<T> w = weights_of<E, kLanes>(p, s, lane, r);
  for (int64_t i = 0; i < r.n; ++i) w.g[i] -= correction;
  for (int64_t i = 0; i < r.n_listed; ++i) w.P[i] *= w.g[i] * scaled;
  const int64_t L_count = p.has_low_rank() ? r.n - r.L_begin : 0;
  for (int64_t i = 0; i < L_count; ++i) r.dt[i] *= w.g[r.L_begin + i] * inverse;
  for (int64_t i = 0; i < r.n; ++i) w.g[i] = net[i] * inverse;
  combine_rows<E>(r.n_listed, w.P, listed<E>(p.k, tile.b, tile.kv, r.key), p.head_pad, s.dQ + lane * p.head_pad);
  if constexpr (kPaired<E>) {  // the scatter reads the record
    constexpr int N = kWidth<T>;
    for (int64_t i = 0; i < r.n_listed; i += N) store_narrow<E, N>(r.ds + i, load<T, N>(w.P + i));
    for (int64_t i = 0; i < r.n; i += N) store_narrow<E, N>(r.w + i, load<T, N>(w.g + i));
  }
  if (L_count == 0) return;
  if (p.has_clusters())
    return add_exponent_gradients_of_query<kLanes>(clusters_of_keys(p, tile.b, tile.kv), r.L_begin < r.n_listed,
                                                   L_count, r.key + r.L_begin, s.xT, lane, r.dt, s.dX);
  combine_rows<T>(L_count, r.dt, listed<T>(p.y, tile.b, tile.kv, r.key + r.L_begin), p.map_pad, s.row);
  for (int64_t a = 0; a < gradient_rows(p.low_rank, p.rank); ++a) s.dX[a * kLanes + lane] = s.row[a];
}

}  // namespace sb::SB_ISA
