// The backward pass of a query tile (docs/algorithm.md: formulas and the order of sums in section 6, steps in 7).
#pragma once
#include "attention_backward_per_query.h"
#include "attention_backward_shared.h"

namespace sb::SB_ISA {

// Step 3: the state's part of the sums, then the factor that makes the weights sum to one and the correction that makes
// delta their mean. Returns whether any lane uses the state.
template <class E, int kLanes>
SB_INLINE bool balance_tile(const AttentionParams& p, const QueryTile<E, kLanes>& tile,
                            const KVState<AccType<E>>& state, BackwardScratch<E, kLanes>& s) {
  typedef AccType<E> T;
  constexpr int N = kLaneWidth<T, kLanes>, NQ = kLanes / N;
  typedef Vector<T, N> V;
  bool any = false;
  for (int lane = 0; lane < kLanes; ++lane) any |= !(s.kv_state_log[lane] <= T(-1e29));
  any &= !p.sums_by_key;
  V total[NQ] = {}, slope[NQ];
  for (int lane = 0; lane < kLanes; ++lane) s.squares[lane] = 0;
  SB_EACH (v, NQ) slope[v] = load<T, N>(s.slope + v * N);
  if (any) {
    expand_features<T, kLanes>(p.low_rank, p.rank, s.xT, s.weight, s.F);
    s.centre = centre_of_slot<T>(p, tile.b, tile.kv, tile.slot);
    if (s.centre) centre_features<T, kLanes>(p.low_rank, p.rank, s.xT, s.centre, s.alpha, s.F);
    if (p.needs_again) squared_terms<T, kLanes>(p, s.xT, s.centre ? s.alpha : nullptr, state.hz, s.weight, s.squares);
    gemm<T, N, false>(p.features, kLanes, p.value_pad, Strided<T>{state.H, p.value_pad, 1},
                      DenseRows<const T>{widen_steps<E, kLanes>(s.gT, p.value_pad, s.wide), kLanes},
                      DenseRows<T>{s.gF, kLanes});
    for (int64_t begin = 0; begin < p.features; begin += kShortChain) {
      V sum[NQ] = {}, moment[NQ] = {};
      for (int64_t f = begin; f < p.features && f < begin + kShortChain; ++f)
        SB_EACH (v, NQ) {
          const V F = load<T, N>(s.F + f * kLanes + v * N);
          const V g = load<T, N>(s.gF + f * kLanes + v * N) - load<T, N>(s.delta + v * N) * state.hz[f];
          store<T, N>(s.gF + f * kLanes + v * N, g);
          sum[v] += F * state.hz[f], moment[v] += F * g;
        }
      SB_EACH (v, NQ) total[v] += sum[v], slope[v] += moment[v];
    }
  }
  // A state far above all that a query takes from it (features that meet in nothing but underflow) has gradients beyond
  // what T holds: they are limited.
  constexpr T kMostOfState = sizeof(T) == sizeof(double) ? T(0x1p900) : T(0x1p100);
  SB_EACH (v, NQ) {
    const V complement = total[v] - load<T, N>(s.removed + v * N), exact = load<T, N>(s.exact + v * N);
    const V den = exact + (complement < T(0) ? V{} : complement);
    const V weight = max_lanes(load<T, N>(s.weight + v * N), splat<T, N>(T(1)));
    const V rounded = den == T(0) ? V{} : T(1) / den, most = kMostOfState / weight;
    const V inverse = rounded > most ? most : rounded;
    store<T, N>(s.den + v * N, den);
    store<T, N>(s.inverse + v * N, inverse);
    store<T, N>(s.correction + v * N, slope[v] * inverse - load<T, N>(s.d_lse + v * N));
  }
  return any;
}

// One lane's arrays of listed keys: element i is at i * stride.
template <class T>
struct LaneArrays {
  int64_t stride;
  T *P, *g, *dt, *net;
};

// Balances a lane whose complement is summed key by key, without the record's U.
template <class E, int kLanes, class T = AccType<E>>
void balance_by_key(const AttentionParams& p, const QueryTile<E, kLanes>& tile, int lane, const LaneArrays<T>& of,
                    BackwardScratch<E, kLanes>& s, ScatterRecord<E>& r) {
  ByKeyQuery<E>& q = r.by_key[r.by_key_count++];
  const RowRange& range = p.rows[tile.b];
  q.b = tile.b, q.kv = tile.kv, q.end = p.is_causal ? tile.chunk_first - range.k_first : range.k_end - range.k_first;
  q.held = held_keys(p, tile.b, tile.kv, tile.slot);
  q.key = r.key + r.n_chunk, q.listed = r.n_listed - r.n_chunk, q.x = tile.x[lane], q.d_out = s.d_out[lane];
  q.log = (p.has_clusters() ? T(0) : tile.rho[lane]) - s.lse[lane], q.delta = s.delta[lane];
  query_row<E, kLanes>(p, tile, lane, s.xT, q.z);
  for (int64_t i = 0; i < r.n_listed; ++i) of.net[i * of.stride] = of.P[i * of.stride];
  for (int64_t i = r.L_begin; i < r.n_listed; ++i) of.dt[(i - r.L_begin) * of.stride] = T(0);
  T den = s.exact[lane], slope = T(0);
  for (int64_t i = 0; i < r.n; ++i) slope += of.net[i * of.stride] * of.g[i * of.stride];
  sum_by_key<E>(p, q, &den, &slope);
  s.inverse[lane] = q.inverse = den == T(0) ? T(0) : T(1) / den;
  s.correction[lane] = slope * q.inverse - s.d_lse[lane];
  q.delta += s.correction[lane];
}

// Removes a lane that is recomputed in double (p.needs_again) from the record.
template <class E, int kLanes, class T>
void drop_lane(int lane, const LaneArrays<T>& of, BackwardScratch<E, kLanes>& s, const ScatterRecord<E>& r) {
  for (int64_t i = 0; i < r.n; ++i) of.net[i * of.stride] = of.g[i * of.stride] = T(0);
  for (int64_t i = 0; i < r.n_listed; ++i) of.P[i * of.stride] = T(0);
  for (int64_t i = r.L_begin; i < r.n; ++i) of.dt[(i - r.L_begin) * of.stride] = T(0);
  s.inverse[lane] = s.correction[lane] = T(0);
}

// dx of a lane whose complement is summed key by key.
template <class E, int kLanes>
void query_gradient_by_key(const AttentionParams& p, int lane, BackwardScratch<E, kLanes>& s, const ByKeyQuery<E>& q) {
  typedef AccType<E> T;
  if (p.has_clusters()) {
    const int32_t* cluster = clusters_of_keys(p, q.b, q.kv);
    gradients_by_key<E>(p, q, 0, q.end, [&](const int32_t* key, int64_t n, const T*, const T* dt) {
      for (int64_t i = 0; i < n; ++i) s.dX[cluster[key[i]] * kLanes + lane] += dt[i];
    });
    return;
  }
  for (int64_t a = 0; a < p.map_pad; ++a) s.row[a] = T(0);
  gradients_by_key<E>(p, q, 0, q.end, [&](const int32_t* key, int64_t n, const T*, const T* dt) {
    add_rows<T>(n, dt, listed<T>(p.y, q.b, q.kv, key), p.map_pad, s.row);
  });
  for (int64_t a = 0; a < gradient_rows(p.low_rank, p.rank); ++a) s.dX[a * kLanes + lane] += s.row[a];
}

// Step 6: dx through F(x) H, and the tile's share of the state's gradient.
template <class E, int kLanes>
SB_INLINE void kv_state_gradients(const AttentionParams& p, const KVState<AccType<E>>& state,
                                  const KVState<AccType<E>>& d_state, BackwardScratch<E, kLanes>& s) {
  typedef AccType<E> T;
  constexpr int N = kLaneWidth<T, kLanes>, NQ = kLanes / N;
  typedef Vector<T, N> V;
  V inverse[NQ], correction[NQ], delta[NQ];
  SB_EACH (v, NQ) {
    inverse[v] = load<T, N>(s.inverse + v * N), correction[v] = load<T, N>(s.correction + v * N);
    delta[v] = load<T, N>(s.delta + v * N) + correction[v];
    store<T, N>(s.weight + v * N, load<T, N>(s.weight + v * N) * inverse[v]);
  }
  for (int64_t begin = 0; begin < p.features; begin += N) {  // as many sums over lanes at once as there are lanes
    const int64_t count = p.features - begin < N ? p.features - begin : N;
    V sum[N]{};
    for (int64_t i = 0; i < count; ++i)
      SB_EACH (v, NQ) {
        const int64_t o = (begin + i) * kLanes + v * N;
        store<T, N>(s.gF + o, load<T, N>(s.gF + o) - correction[v] * state.hz[begin + i]);
        const V weighted = load<T, N>(s.F + o) * inverse[v];
        store<T, N>(s.F + o, weighted);
        sum[i] += weighted * delta[v];
      }
    fold_rows<T, N>(sum);
    store<T, N>(d_state.hz + begin, load<T, N>(d_state.hz + begin) - sum[0]);
  }
  if (p.has_clusters())  // by their exponents
    for (int64_t at = 0; at < p.rank * kLanes; at += N)
      store<T, N>(s.dX + at, load<T, N>(s.dX + at) + load<T, N>(s.F + at) * load<T, N>(s.gF + at));
  else if (s.centre)
    chain_centred_features<T, kLanes>(p.low_rank, p.rank, s.xT, s.centre, s.alpha, s.weight, s.gF, s.dX);
  else
    chain_features<T, kLanes>(p.low_rank, p.rank, s.xT, s.weight, s.gF, s.dX);
  const T* d_out[kLanes];
  for (int lane = 0; lane < kLanes; ++lane)
    d_out[lane] = widen_row_of<E>(s.d_out[lane], p.value_pad, s.wide_rows + lane * p.value_pad);
  gemm<T, kWidth<T>, true>(p.features, p.value_pad, kLanes, Strided<T>{s.F, kLanes, 1}, PointedRows<const T>{d_out},
                           DenseRows<T>{d_state.H, p.value_pad});
}

// Fills the tile's own inputs: dO in lanes, delta = dO.o, lse in base 2. A row without weight gets the largest number,
// which makes all its weights exactly 0.
template <class E, int kLanes, bool kShared>
SB_INLINE void backward_prepare(const AttentionParams& p, const QueryTile<E, kLanes>& tile,
                                BackwardScratch<E, kLanes>& s) {
  typedef AccType<E> T;
  for (int lane = 0; lane < kLanes; ++lane) {
    const int64_t i = tile.query[lane];
    s.d_out[lane] = s.out[lane] = tile.zero_row, s.lse[lane] = -kLowest<T>, s.d_lse[lane] = T(0),
    s.kv_state_log[lane] = kLowest<T>;
    if (i < 0) continue;
    const int64_t at = (tile.b * p.q_heads + tile.h) * p.q_tokens + i;
    const T lse = static_cast<const T*>(p.lse)[at];
    if (lse == -T(__builtin_inf())) continue;
    s.d_out[lane] = p.d_out.at<const E>(tile.b, tile.h, i);
    s.out[lane] = p.out.at<const E>(tile.b, tile.h, i);
    s.d_lse[lane] = p.d_lse ? static_cast<const T*>(p.d_lse)[at] : T(0);
    s.lse[lane] = lse * T(kLog2e);
  }
  // delta is summed in the order of dO.v: a query with a single key gets a gradient of exactly zero.
  transpose_steps<E, kLanes>(s.d_out, p.value_pad, s.gT);
  if constexpr (kShared) {
    dot_of_lanes<E, kLanes>(s.out, p.value_pad, s.gT, s.delta);
  } else {
    for (int lane = 0; lane < kLanes; ++lane)
      value_products<E>(p, p.rows[tile.b], 1, PointedRows<const E>{s.out + lane}, s.d_out[lane], s.delta + lane);
  }
}

// Lanes beyond the fallback bound leave the state: they are computed again, or here and now, key by key. Writes the
// lanes of the latter kind to by_key and returns their number.
template <class E, int kLanes, bool kShared>
SB_INLINE int apply_fallback(const AttentionParams& p, const QueryTile<E, kLanes>& tile, BackwardScratch<E, kLanes>& s,
                             ScatterRecord<E>* records, int* by_key) {
  typedef AccType<E> T;
  int by_key_count = 0;
  if (tile.list.bitmask) return 0;
  for (int lane = 0; lane < tile.lanes; ++lane) {
    if (tile.query[lane] < 0 || !is_beyond_bound<T>(p, s.removed[lane], s.den[lane], s.squares[lane])) continue;
    ScatterRecord<E>& r = records[kShared ? 0 : lane];
    LaneArrays<T> of{kLanes, s.P + lane, s.g + lane, r.dt + lane, s.net + lane};
    if constexpr (!kShared) {
      const LaneWeights<T> w = weights_of<E, kLanes>(p, s, lane, r);
      of = {1, w.P, w.g, r.dt, s.net + lane * p.max_keys};
    }
    s.weight[lane] = T(0);
    for (int64_t f = 0; f < p.features; ++f) s.F[f * kLanes + lane] = T(0);
    if (p.needs_again) {
      p.needs_again[(tile.b * p.q_heads + tile.h) * p.q_tokens + tile.query[lane]] = 1;
      drop_lane<E, kLanes>(lane, of, s, r);
      continue;
    }
    by_key[by_key_count++] = lane;
    balance_by_key<E, kLanes>(p, tile, lane, of, s, r);
  }
  return by_key_count;
}

// Adds to dq, and to the gradient of the representatives, what the clusters' weights come to.
template <class E, int kLanes, bool kShared>
SB_INLINE void query_cluster_gradients(const AttentionParams& p, const QueryTile<E, kLanes>& tile, int64_t unit,
                                       BackwardScratch<E, kLanes>& s) {
  AccType<E>* dq[kLanes];
  for (int lane = 0; lane < kLanes; ++lane)
    dq[lane] = kShared && tile.query[lane] >= 0 ? p.dq.at<AccType<E>>(tile.b, tile.h, tile.query[lane])
                                                : s.dQ + lane * p.head_pad;
  exponent_gradients_to_rows<E, kLanes>(p, tile, unit, s.dX, s.wide_rows, dq);
}

// Gradients of x and rho: written, or multiplied with the projection's weights and added to dq.
template <class E, int kLanes, bool kShared>
SB_INLINE void query_map_gradients(const AttentionParams& p, const QueryTile<E, kLanes>& tile,
                                   BackwardScratch<E, kLanes>& s) {
  typedef AccType<E> T;
  T d_rho[kLanes];
  log_gradient<T, kLanes>(p.low_rank, p.rank, s.xT, s.dX, d_rho);
  const T* weight = weight_of_head<T>(p, p.query_weight, tile.b, tile.h, p.q_heads);
  if (weight) {
    T* dq[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      const bool in_place = kShared && tile.query[lane] >= 0;
      dq[lane] = in_place ? p.dq.at<T>(tile.b, tile.h, tile.query[lane]) : s.dQ + lane * p.head_pad;
      s.dX[p.rank * kLanes + lane] = d_rho[lane];
    }
    gemm<T, kWidth<T>, true>(kLanes, p.head_pad, p.rank + 1, Strided<T>{s.dX, 1, kLanes},
                             DenseRows<const T>{weight, p.head_pad}, PointedRows<T>{dq});
  }
  for (int lane = 0; lane < tile.lanes && !weight; ++lane) {
    if (tile.query[lane] < 0) continue;
    T* d_map = p.d_query_map.at<T>(tile.b, tile.h, tile.query[lane]);
    for (int64_t a = 0; a < p.rank; ++a) d_map[a] = s.dX[a * kLanes + lane];
    d_map[p.rank] = d_rho[lane];
  }
}

// All steps of one tile; fills its records.
template <class E, int kLanes, bool kShared>
void backward_tile(const AttentionParams& p, QueryTile<E, kLanes>& tile, BackwardScratch<E, kLanes>& s,
                   ScatterRecord<E>* records, TilePrefetcher<E, kLanes, true>& prefetcher) {
  typedef AccType<E> T;
  const bool has_low_rank = p.has_low_rank();
  const int64_t row = tile.b * p.kv_heads + tile.kv;
  const auto kappa = log_scales<T>(p.kappa, tile.b, tile.kv);
  const KVState<T> state = has_low_rank ? kv_state_slot<T>(p, row, tile.slot) : KVState<T>{};
  const T kappa_ref = has_low_rank ? *state.kappa_ref : T(0);
  backward_prepare<E, kLanes, kShared>(p, tile, s);
  if (p.has_clusters()) {
    weigh_clusters<E, kLanes, true>(p, tile, s.qT, s.wide, s.xT);
  } else if (has_low_rank) {
    transpose_rows<T, kLanes>(tile.x, p.rank, T(1), s.xT);
  }
  for (int64_t a = 0; a < p.map_pad * kLanes; ++a) s.dX[a] = T(0);
  if constexpr (kShared) {
    weigh_shared<E, kLanes>(p, tile, kappa, kappa_ref, s, records[0], prefetcher);
    for (int lane = 0; lane < kLanes; ++lane)
      records[0].q[lane] = tile.q[lane], records[0].d_out[lane] = s.d_out[lane], records[0].x[lane] = tile.x[lane];
  } else {
    for (int lane = 0; lane < kLanes; ++lane) {
      ScatterRecord<E>& r = records[lane];
      r.lanes = 1, r.by_key_count = 0, r.n_chunk = r.n_listed = r.n = r.L_begin = 0, r.first_key = INT64_MAX,
      r.last_key = -1;
      s.weight[lane] = s.exact[lane] = s.removed[lane] = s.slope[lane] = T(0);
    }
    weigh_per_query<E, kLanes>(p, tile, kappa, kappa_ref, s, records);
  }
  const bool any = balance_tile<E, kLanes>(p, tile, state, s);
  int by_key[kLanes];
  const int by_key_count = apply_fallback<E, kLanes, kShared>(p, tile, s, records, by_key);
  if constexpr (kShared)
    gradients_shared<E, kLanes>(p, tile, s, records[0]);
  else
    for (int lane = 0; lane < kLanes; ++lane)
      if (tile.query[lane] >= 0) gradients_per_query<E, kLanes>(p, tile, lane, s, records[lane]);
  for (int i = 0; i < by_key_count; ++i)
    query_gradient_by_key<E, kLanes>(p, by_key[i], s, kShared ? records[0].by_key[i] : records[by_key[i]].by_key[0]);
  if (has_low_rank) {
    const int64_t unit = p.is_causal ? tile.slot : tile.first_slot / queries_per_unit(p);
    if (any) kv_state_gradients<E, kLanes>(p, state, d_kv_state_slot<T>(p, tile.b * p.q_heads + tile.h, unit), s);
    if (p.has_clusters())
      query_cluster_gradients<E, kLanes, kShared>(p, tile, unit, s);
    else
      query_map_gradients<E, kLanes, kShared>(p, tile, s);
  }
  for (int lane = 0; lane < tile.lanes && !kShared; ++lane) {
    if (tile.query[lane] < 0) continue;
    T* dq = p.dq.at<T>(tile.b, tile.h, tile.query[lane]);
    for (int64_t e = 0; e < p.head_pad; e += kWidth<T>)
      store<T, kWidth<T>>(dq + e, load<T, kWidth<T>>(s.dQ + lane * p.head_pad + e));
  }
}

}  // namespace sb::SB_ISA
