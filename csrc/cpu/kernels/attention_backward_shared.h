// Backward pass of a query tile that shares a key list, a query in every lane; attention_backward_tile.h has the steps.
#pragma once
#include "attention_backward_scratch.h"
#include "kv_state.h"
#include "stabiliser.h"
#include "tile_prefetch.h"
#include "unseen_keys.h"

namespace sb::SB_ISA {

// Step 2 of a list with a bitmask: P is zero where a query does not list the key, dU/dt where it does.
template <class E, int kLanes>
SB_INLINE void weigh_bitmask(const AttentionParams& p, const QueryTile<E, kLanes>& tile,
                             const LogScales<AccType<E>>& kappa, const AccType<E>* S, BackwardScratch<E, kLanes>& s,
                             ScatterRecord<E>& r) {
  typedef AccType<E> T;
  const KeyList& list = tile.list;
  constexpr int N = kLaneWidth<T, kLanes>, NQ = kLanes / N;
  typedef Vector<T, N> V;
  const RuntimeKernel kernel{p.low_rank};
  const T* exponents = p.has_clusters() ? r.dt : nullptr;
  for (int v = 0; v < NQ; ++v) {
    const V lse = load<T, N>(s.lse + v * N), delta = load<T, N>(s.delta + v * N);
    V exact{}, slope{};
    for (int64_t begin = 0; begin < list.n; begin += kShortChain) {
      V sum{}, moment{};
      for (int64_t i = begin; i < list.n && i < begin + kShortChain; ++i) {
        const int64_t o = i * kLanes + v * N;
        const BitmaskKey<E, kLanes, N> key(tile, kappa, S, kLanes, exponents, i, v);
        const V grad = load<T, N>(s.g + o) - delta;
        const V e = exp2v<N>(key.exponent - lse), t = load<T, N>(r.dt + o);
        const V P = key.listed ? e : V{}, weight = key.is_whole ? e : e * kernel.value(t);
        store<T, N>(r.dt + o, key.listed ? V{} : e * (exponents ? splat<T, N>(T(1)) : kernel.slope(t)));
        sum += weight, moment += weight * grad;
        store<T, N>(s.P + o, P), store<T, N>(s.net + o, weight), store<T, N>(s.g + o, grad);
      }
      exact += sum, slope += moment;
    }
    store<T, N>(s.exact + v * N, exact), store<T, N>(s.removed + v * N, V{}), store<T, N>(s.slope + v * N, slope);
  }
}

// Puts the stabiliser in the place of every lse that is too large for one.
template <class E, int kLanes>
SB_INLINE void restore_stabilisers(const QueryTile<E, kLanes>& tile, const LogScales<AccType<E>>& kappa,
                                   const AccType<E>* S, int64_t stride,
                                   const Vector<AccType<E>, kLaneWidth<AccType<E>, kLanes>>* state,
                                   const AccType<E>* exponents, BackwardScratch<E, kLanes>& s) {
  typedef AccType<E> T;
  constexpr int N = kLaneWidth<T, kLanes>, NQ = kLanes / N;
  bool lost = false;
  for (int lane = 0; lane < kLanes; ++lane) lost |= is_lost<T>(s.lse[lane]);
  if (!lost) return;
  Vector<T, N> c[NQ];
  if (tile.list.bitmask)
    for (int v = 0; v < NQ; ++v) c[v] = bitmask_stabiliser<E, kLanes, N>(tile, kappa, S, stride, exponents, v);
  else
    stabilisers<E, kLanes, N>(tile, kappa, S, stride, state, exponents, c);
  for (int lane = 0; lane < kLanes; ++lane)
    if (is_lost<T>(s.lse[lane])) s.lse[lane] = c[lane / N][lane % N];
}

// Steps 1 and 2: P, U and g before they are rescaled.
template <class E, int kLanes>
SB_INLINE void weigh_shared(const AttentionParams& p, const QueryTile<E, kLanes>& tile,
                            const LogScales<AccType<E>>& kappa, AccType<E> kappa_ref, BackwardScratch<E, kLanes>& s,
                            ScatterRecord<E>& r, TilePrefetcher<E, kLanes, true>& prefetcher) {
  typedef AccType<E> T;
  const KeyList& list = tile.list;
  constexpr int N = kLaneWidth<T, kLanes>, NQ = kLanes / N;
  typedef Vector<T, N> V;
  const RuntimeKernel kernel{p.low_rank};
  for (int64_t i = 0; i < list.n; ++i) r.key[i] = list.key[i];
  const int64_t chunk_first = tile.chunk_first;
  const int64_t L_begin = first_low_rank(list);
  r.lanes = kLanes, r.by_key_count = 0, r.has_unseen_pairs = false, r.n_chunk = list.n_chunk,
  r.n_listed = list.n_listed, r.n = list.n, r.L_begin = L_begin;
  r.first_key = first_key(list), r.last_key = last_key(list);
  const auto k = listed<E>(p.k, tile.b, tile.kv, list.key), v_rows = listed<E>(p.v, tile.b, tile.kv, list.key);
  if constexpr (!kPaired<E>) s.P = r.ds, s.g = r.w;  // ds and w, which replace them, have the same type
  T *const P = s.P, *const grad_of = s.g;

  // 1. S, kept or recomputed, x.y as in the forward pass, and dP = V dO.
  const KeptScores<T> kept = kept_scores<T, kLanes>(p, tile.b, tile.h, tile.first_slot, list.n_listed);
  const T* const S = kept.data ? kept.data : P;
  const int64_t stride = kept.stride, dots = (kept.data ? 0 : list.n_listed) + list.n;
  const int64_t per_slice = prefetcher.left() * kSliceRows<T, kLanes> / (dots + 1) + 1;
  if (!kept.data) {
    queries_in_lanes<E, kLanes>(p, tile, s.qT);
    dot_lanes<E, N, kLanes>(list.n_listed, p.head_dim, k, s.qT, P, prefetcher, per_slice);
    scale_scores<E>(p, list.n_listed * kLanes, P);
  }
  if (p.has_low_rank()) low_rank_products<E, kLanes>(p, tile, list.n - L_begin, list.key + L_begin, s.xT, r.dt);
  dot_lanes<E, N, kLanes>(list.n, p.value_pad, v_rows, s.gT, grad_of, prefetcher, per_slice);
  prefetcher.fetch(prefetcher.left());

  // 2. P, dP - dO.o into g, dU/dt into dt and the weight into net, with their sums in short chains.
  V rho[NQ], edge[NQ], lse[NQ], delta[NQ], a[NQ], exact[NQ], removed[NQ], slope[NQ], state[NQ];
  SB_EACH (v, NQ) {
    rho[v] = load<T, N>(tile.rho + v * N);
    state[v] = list.uses_kv_state ? rho[v] + kappa_ref : splat<T, N>(kLowest<T>);
    store<T, N>(s.kv_state_log + v * N, state[v]);
  }
  restore_stabilisers<E, kLanes>(tile, kappa, S, stride, state, p.has_clusters() ? r.dt - L_begin * kLanes : nullptr,
                                 s);
  SB_EACH (v, NQ) {
    edge[v] = load<T, N>(tile.edge + v * N);
    lse[v] = load<T, N>(s.lse + v * N), delta[v] = load<T, N>(s.delta + v * N);
    exact[v] = removed[v] = slope[v] = V{};
  }
  kv_state_weights<T, kLanes>(tile.rho, kappa_ref, s.lse, s.kv_state_log, s.weight);
  SB_EACH (v, NQ) a[v] = load<T, N>(s.weight + v * N);
  if (list.bitmask) return weigh_bitmask<E, kLanes>(p, tile, kappa, S, s, r);
  if (list.uses_kv_state) decay_of_keys<T>(kappa, kappa_ref, list.key, list.n_chunk, list.n_listed, s.exponent);
  SB_EACH (v, NQ) {
    V zero = delta[v] * T(0);
    if (list.n_chunk > 0) zero += load<T, N>(S + v * N) * T(0);
    if (list.n > list.n_listed && !p.has_clusters()) zero += load<T, N>(r.dt + v * N) * T(0);
    store<T, N>(s.zero + v * N, zero);
  }
  for (int64_t begin = 0; begin < list.n; begin += kShortChain) {
    const int64_t end = begin + kShortChain < list.n ? begin + kShortChain : list.n;
    V sum[NQ] = {}, taken[NQ] = {}, moment[NQ] = {};
    int64_t i = begin;
    for (; i < list.n_chunk && i < end; ++i) {
      const V at = splat<T, N>(T(list.key[i] - chunk_first));
      SB_EACH (v, NQ) {
        const int64_t o = i * kLanes + v * N;
        const auto sees = at <= edge[v];
        const V weight = sees ? exp2v<N>(load<T, N>(S + i * stride + v * N) - lse[v]) : V{},
                grad = sees ? load<T, N>(grad_of + o) - delta[v] : V{};
        sum[v] += weight, moment[v] += weight * grad;
        store<T, N>(P + o, weight), store<T, N>(s.net + o, weight), store<T, N>(grad_of + o, grad);
      }
    }
    const int64_t listed_end = list.n_listed < end ? list.n_listed : end;
    const auto weigh_listed = [&](auto uses_state) SB_INLINE_LAMBDA {
      for (; i < listed_end; ++i)
        SB_EACH (v, NQ) {
          const int64_t o = i * kLanes + v * N;
          const V weight = exp2v<N>(load<T, N>(S + i * stride + v * N) - lse[v]),
                  grad = load<T, N>(grad_of + o) - delta[v];
          V net = weight;
          if constexpr (uses_state) {
            T* dt = r.dt + (i - L_begin) * kLanes + v * N;
            const V t = load<T, N>(dt), du = a[v] * s.exponent[i] * kernel.slope(t), u = du * kernel.root(t);
            taken[v] += u, net -= u;
            store<T, N>(dt, -du);
          }
          sum[v] += weight, moment[v] += net * grad;
          store<T, N>(P + o, weight), store<T, N>(s.net + o, net), store<T, N>(grad_of + o, grad);
        }
    };
    list.uses_kv_state ? weigh_listed(Yes{}) : weigh_listed(No{});
    const auto weigh_rest = [&](auto has_clusters) SB_INLINE_LAMBDA {
      for (; i < end; ++i) {
        const V at = splat<T, N>(T(list.key[i] - chunk_first));
        const T kj = kappa(list.key[i]);
        SB_EACH (v, NQ) {
          const int64_t o = i * kLanes + v * N;
          T* dt = r.dt + (i - L_begin) * kLanes + v * N;
          const auto sees = at <= edge[v];
          const V t = load<T, N>(dt), grad = sees ? load<T, N>(grad_of + o) - delta[v] : V{};
          V slope, weight;
          if constexpr (has_clusters) {
            slope = weight = exp2v<N>((t - lse[v]) + kj);
          } else {
            const V e = exp2v<N>((rho[v] - lse[v]) + kj);
            weight = e * kernel.value(t), slope = e * kernel.slope(t);
          }
          weight = sees ? weight : V{}, slope = sees ? slope : V{};
          sum[v] += weight, moment[v] += weight * grad;
          store<T, N>(dt, slope);
          store<T, N>(s.net + o, weight), store<T, N>(grad_of + o, grad);
        }
      }
    };
    p.has_clusters() ? weigh_rest(Yes{}) : weigh_rest(No{});
    SB_EACH (v, NQ) exact[v] += sum[v], removed[v] += taken[v], slope[v] += moment[v];
  }
  SB_EACH (v, NQ) {
    store<T, N>(s.exact + v * N, exact[v]);
    store<T, N>(s.removed + v * N, removed[v]);
    store<T, N>(s.slope + v * N, slope[v]);
  }
}

// Where something of a tile is not finite: w, ds and dt of the pairs that do not see each other become zero, dq and dX
// are formed again of what each query sees, and the scatter is told what that is.
template <class E, int kLanes>
__attribute__((noinline)) void part_unseen_pairs(const AttentionParams& p, const QueryTile<E, kLanes>& tile,
                                                 AccType<E>* const* dq, BackwardScratch<E, kLanes>& s,
                                                 ScatterRecord<E>& r) {
  typedef AccType<E> T;
  constexpr int N = kWidth<T>;
  r.has_unseen_pairs = true, r.zero_row = tile.zero_row;
  for (int lane = 0; lane < kLanes; ++lane) {
    r.last_seen[lane] = int32_t(last_seen_key<E, kLanes>(p, tile, lane));
    for (int64_t i = 0; i < r.n; ++i) {
      if (r.key[i] <= r.last_seen[lane]) continue;
      const int64_t at = i * kLanes + lane;
      r.w[at] = E{};
      if (i < r.n_listed) s.P[at] = T(0), r.ds[at] = E{};
      if (i >= r.L_begin) r.dt[at - r.L_begin * kLanes] = T(0);
    }
  }
  const StepOf<E>* W = weight_steps<E, kLanes>(r.n_listed, s.P, s.W);
  for (int lane = 0; lane < kLanes; ++lane) {
    const auto k_rows = rows_seen<E, kLanes>(p, tile, lane, listed<E>(p.k, tile.b, tile.kv, r.key));
    combine_listed<E, false>(1, p.head_pad, r.n_listed, W + lane, kLanes, k_rows, tile.zero_row,
                             DenseRows<T>{dq[lane], 0});
    if (!p.has_maps()) continue;
    const auto y_rows = rows_seen<E, kLanes>(p, tile, lane, listed<T>(p.y, tile.b, tile.kv, r.key + r.L_begin));
    gemm<T, N, false>(1, p.map_pad, r.n - r.L_begin, Strided<T>{r.dt + lane, 1, kLanes}, y_rows,
                      DenseRows<T>{s.row, 0});
    for (int64_t a = 0; a < gradient_rows(p.low_rank, p.rank); ++a) s.dX[a * kLanes + lane] = s.row[a];
  }
}

// Steps 4 and 5: w, ds and dt of the record, then dq and dx.
template <class E, int kLanes>
SB_INLINE void gradients_shared(const AttentionParams& p, const QueryTile<E, kLanes>& tile,
                                BackwardScratch<E, kLanes>& s, ScatterRecord<E>& r) {
  typedef AccType<E> T;
  constexpr int N = kLaneWidth<T, kLanes>, NQ = kLanes / N;
  typedef Vector<T, N> V;
  V correction[NQ], inverse[NQ], scaled[NQ];
  SB_EACH (v, NQ) {
    correction[v] = load<T, N>(s.correction + v * N), inverse[v] = load<T, N>(s.inverse + v * N);
    scaled[v] = inverse[v] * T(p.scale);
  }
  const auto rescale = [&](int64_t begin, int64_t end, auto is_listed, auto has_L) SB_INLINE_LAMBDA {
    T* dt = r.dt - r.L_begin * kLanes;
    for (int64_t o = begin * kLanes; o < end * kLanes; o += kLanes)
      SB_EACH (v, NQ) {
        const int64_t at = o + v * N;
        const V grad = load<T, N>(s.g + at) - correction[v];
        if constexpr (is_listed) {
          const V ds = load<T, N>(s.P + at) * grad * scaled[v];
          if constexpr (kPaired<E>) store<T, N>(s.P + at, ds);
          store_narrow<E, N>(r.ds + at, ds);
        }
        if constexpr (has_L) store<T, N>(dt + at, load<T, N>(dt + at) * grad * inverse[v]);
        store_narrow<E, N>(r.w + at, load<T, N>(s.net + at) * inverse[v]);
      }
  };
  rescale(0, r.L_begin, Yes{}, No{});
  rescale(r.L_begin, r.n_listed, Yes{}, Yes{});
  rescale(r.n_listed, r.n, No{}, Yes{});
  T* dq[kLanes];
  for (int lane = 0; lane < kLanes; ++lane)
    dq[lane] = tile.query[lane] < 0 ? s.dQ + lane * p.head_pad : p.dq.at<T>(tile.b, tile.h, tile.query[lane]);
  const StepOf<E>* W;
  if constexpr (kPaired<E>)
    W = weight_steps<E, kLanes>(r.n_listed, s.P, s.W);
  else
    W = r.ds;
  combine_listed<E, false>(kLanes, p.head_pad, r.n_listed, W, kLanes, listed<E>(p.k, tile.b, tile.kv, r.key),
                           tile.zero_row, PointedRows<T>{dq});
  if (p.has_clusters())
    add_exponent_gradients<kLanes>(clusters_of_keys(p, tile.b, tile.kv), tile.list.uses_kv_state, r.n - r.L_begin,
                                   r.key + r.L_begin, s.xT, r.dt, s.dX);
  else if (p.has_low_rank())
    add_x_gradients<E, kLanes>(p, tile, r.n - r.L_begin, r.key + r.L_begin, r.dt, s.dX);
  if (!has_unseen_keys<E, kLanes>(p, tile)) return;
  auto zero = times_zero<T, N>(dq[0], p.head_pad);
  SB_EACH (v, NQ) zero += load<T, N>(s.zero + v * N) + (inverse[v] + correction[v]) * T(0);
  if (p.has_maps() && r.n > r.n_listed) zero += times_zero<T, N>(s.dX, gradient_rows(p.low_rank, p.rank) * kLanes);
  if (sum_lanes<T, N>(zero) != T(0)) part_unseen_pairs<E, kLanes>(p, tile, dq, s, r);
}

}  // namespace sb::SB_ISA
