// Forward pass of queries with key lists of their own: lanes are keys (docs/algorithm.md, sections 1 and 7).
#pragma once
#include "attention_forward_scratch.h"
#include "kv_state.h"
#include "low_rank_products.h"
#include "stabiliser.h"

namespace sb::SB_ISA {

// Steps 1 to 4. All queries take one step before any takes the next: rows that one has read are still in the first
// level of cache for its neighbour.
template <class E, int kLanes>
SB_INLINE void forward_per_query(const AttentionParams& p, const QueryTile<E, kLanes>& tile,
                                 const LogScales<AccType<E>>& kappa, AccType<E> kappa_ref,
                                 ForwardScratch<E, kLanes>& s) {
  typedef AccType<E> T;
  constexpr int N = kWidth<T>;
  const RuntimeKernel kernel{p.low_rank};
  const auto for_each_query = [&](const auto& visit) SB_INLINE_LAMBDA {
    for (int lane = 0; lane < kLanes; ++lane)
      if (tile.query[lane] >= 0)
        visit(lane, s.lists[lane], s.S + lane * p.max_keys, s.L + lane * p.max_keys, s.decay + lane * p.max_keys);
  };
  // Scores of a query: the kept ones, or where its weights will be.
  const auto scores_of = [&](int lane, T* W) SB_INLINE_LAMBDA {
    const KeptScores<T> kept = kept_scores<T, 1>(p, tile.b, tile.h, tile.first_slot + lane, s.lists[lane].n_listed);
    return kept.data ? kept.data : W;
  };

  // 1. S = q.k of the listed keys.
  for_each_query([&](int lane, KeyList& list, T* W, T*, T*) {
    collect_keys(p, tile.b, tile.h, tile.first_slot + lane, tile.first_slot + lane, list);
    scores_of_query<E>(p, tile.q[lane], list.n_listed, listed<E>(p.k, tile.b, tile.kv, list.key), s.qT,
                       scores_of(lane, W));
  });

  // 2. x.y where L is needed, and the stabiliser. The exponent is kappa_j - kappa_ref where the state holds L, whose
  // common factor follows in step 3, and rho + kappa_j - c elsewhere.
  T* x = s.xT;
  for_each_query([&](int lane, const KeyList& list, T* W, T* L, T* exponent) {
    const T* S = scores_of(lane, W);
    const int64_t L_begin = first_low_rank(list), L_count = p.has_low_rank() ? list.n - L_begin : 0;
    if (L_count) {
      if (p.has_clusters()) {
        look_up_clusters_of_query<kLanes>(p, clusters_of_keys(p, tile.b, tile.kv), list.uses_kv_state, L_count,
                                          list.key + L_begin, x, lane, L);
      } else {
        map_row<T>(p, tile.x[lane], x);
        low_rank_products_of_query<T>(p, tile.b, tile.kv, L_count, list.key + L_begin, x, L);
      }
      for (int64_t i = L_begin; i < list.n_listed; ++i) exponent[i - L_begin] = kappa(list.key[i]) - kappa_ref;
    }
    s.kv_state_log[lane] = list.uses_kv_state ? tile.rho[lane] + kappa_ref : kLowest<T>;
    const T c = stabiliser_of_query<T>(list, kappa, S, tile.rho[lane], s.kv_state_log[lane],
                                       p.has_clusters() ? L - L_begin : nullptr);
    for (int64_t i = list.n_listed; i < list.n; ++i) {
      T& t = L[i - L_begin];
      exponent[i - L_begin] = ((p.has_clusters() ? t : tile.rho[lane]) - c) + kappa(list.key[i]);
      if (p.has_clusters()) t = T(1);
    }
    s.c[lane] = c;
  });

  // 3. Weights, into W.
  kv_state_weights<T, kLanes>(tile.rho, kappa_ref, s.c, s.kv_state_log, s.weight);
  for_each_query([&](int lane, const KeyList& list, T* W, T* L, const T* exponent) {
    const int64_t L_begin = first_low_rank(list), L_count = p.has_low_rank() ? list.n - L_begin : 0;
    const T a = s.weight[lane], c = s.c[lane], *S = scores_of(lane, W);
    for (int64_t i = 0; i < list.n_listed; i += N) store<T, N>(W + i, exp2v<N>(load<T, N>(S + i) - c));
    T exact = sum_short<T>(W, list.n_listed);
    for (int64_t i = 0; i < L_count; i += N)
      store<T, N>(L + i, exp2v<N>(load<T, N>(exponent + i)) * kernel.value(load<T, N>(L + i)));
    s.removed[lane] = a * sum_short<T>(L, list.n_listed - L_begin);
    for (int64_t i = L_begin; i < list.n_listed; ++i) W[i] -= a * L[i - L_begin];
    exact += sum_short<T>(L + list.n_listed - L_begin, L_count - (list.n_listed - L_begin));
    for (int64_t i = list.n_listed; i < list.n; ++i) W[i] = L[i - L_begin];
    s.exact[lane] = exact;
  });

  // 4. O = W V.
  for_each_query([&](int lane, const KeyList& list, const T* W, T*, T*) {
    combine_rows<E>(list.n, W, listed<E>(p.v, tile.b, tile.kv, list.key), p.value_pad, s.O + lane * p.value_pad);
  });
}

}  // namespace sb::SB_ISA
