// Forward pass of a query tile that shares a key list, a query in every lane (docs/algorithm.md, sections 1 and 7).
#pragma once
#include "attention_forward_scratch.h"
#include "kv_state.h"
#include "low_rank_products.h"
#include "stabiliser.h"
#include "tile_prefetch.h"
#include "unseen_keys.h"

namespace sb::SB_ISA {

// Step 4: O = W V, of `lanes` queries of the tile from lane `first` on.
template <class E, int kLanes, class R>
SB_INLINE void combine_lanes(const AttentionParams& p, const QueryTile<E, kLanes>& tile, int64_t lanes, int64_t first,
                             const StepOf<E>* W, const R& v_rows, AccType<E>* O) {
  const DenseRows<AccType<E>> to{O + first * p.value_pad, p.value_pad};
  if (p.index)
    combine_scattered<E>(lanes, p.value_pad, tile.list.n, W + first, kLanes, v_rows, p.k_tokens > kNearKeys,
                         tile.zero_row, to);
  else
    combine_listed<E, false>(lanes, p.value_pad, tile.list.n, W + first, kLanes, v_rows, tile.zero_row, to);
}
template <class E, int kLanes>
__attribute__((noinline)) void combine_seen_values(const AttentionParams& p, const QueryTile<E, kLanes>& tile,
                                                   const StepOf<E>* W, AccType<E>* O) {
  for (int lane = 0; lane < kLanes; ++lane) {
    const auto v_rows = listed<E>(p.v, tile.b, tile.kv, tile.list.key);
    combine_lanes<E, kLanes>(p, tile, 1, lane, W, rows_seen<E, kLanes>(p, tile, lane, v_rows), O);
  }
}
template <class E, int kLanes>
SB_INLINE void combine_weights(const AttentionParams& p, const QueryTile<E, kLanes>& tile,
                               ForwardScratch<E, kLanes>& s) {
  typedef AccType<E> T;
  constexpr int N = kWidth<T>;
  const StepOf<E>* W = weight_steps<E, kLanes>(tile.list.n, s.S, s.W);
  combine_lanes<E, kLanes>(p, tile, kLanes, 0, W, listed<E>(p.v, tile.b, tile.kv, tile.list.key), s.O);
  if (has_unseen_keys<E, kLanes>(p, tile) && sum_lanes<T, N>(times_zero<T, N>(s.O, p.value_pad)) != T(0))
    combine_seen_values<E, kLanes>(p, tile, W, s.O);
}

// Steps 2 and 3 of a list with a bitmask.
template <class E, int kLanes>
SB_INLINE void bitmask_weights(const AttentionParams& p, const QueryTile<E, kLanes>& tile,
                               const LogScales<AccType<E>>& kappa, const AccType<E>* S, ForwardScratch<E, kLanes>& s) {
  typedef AccType<E> T;
  const KeyList& list = tile.list;
  constexpr int N = kLaneWidth<T, kLanes>, NQ = kLanes / N;
  typedef Vector<T, N> V;
  const RuntimeKernel kernel{p.low_rank};
  const V none = splat<T, N>(kLowest<T>);
  const T* exponents = p.has_clusters() ? s.L : nullptr;
  for (int v = 0; v < NQ; ++v) {
    const V c = bitmask_stabiliser<E, kLanes, N>(tile, kappa, S, kLanes, exponents, v);
    V exact{};
    for (int64_t begin = 0; begin < list.n; begin += kShortChain) {
      V sum{};
      for (int64_t i = begin; i < list.n && i < begin + kShortChain; ++i) {
        const BitmaskKey<E, kLanes, N> key(tile, kappa, S, kLanes, exponents, i, v);
        const V e = exp2v<N>(key.exponent - c), t = load<T, N>(s.L + i * kLanes + v * N);
        const V weight = key.is_whole ? e : e * kernel.value(t);
        sum += weight;
        store<T, N>(s.S + i * kLanes + v * N, weight);
      }
      exact += sum;
    }
    store<T, N>(s.c + v * N, c), store<T, N>(s.exact + v * N, exact), store<T, N>(s.removed + v * N, V{});
    store<T, N>(s.kv_state_log + v * N, none), store<T, N>(s.weight + v * N, V{});
  }
}

// Steps 1 to 4.
template <class E, int kLanes>
SB_INLINE void forward_shared(const AttentionParams& p, const QueryTile<E, kLanes>& tile,
                              const LogScales<AccType<E>>& kappa, AccType<E> kappa_ref, ForwardScratch<E, kLanes>& s,
                              TilePrefetcher<E, kLanes, false>& prefetcher) {
  typedef AccType<E> T;
  const KeyList& list = tile.list;
  constexpr int N = kLaneWidth<T, kLanes>, NQ = kLanes / N;
  typedef Vector<T, N> V;
  const RuntimeKernel kernel{p.low_rank};
  const V none = splat<T, N>(kLowest<T>);
  const int64_t chunk_first = tile.chunk_first;
  const auto k = listed<E>(p.k, tile.b, tile.kv, list.key);

  const KeptScores<T> kept = kept_scores<T, kLanes>(p, tile.b, tile.h, tile.first_slot, list.n_listed);
  T* const S = kept.data ? kept.data : s.S;

  // 1. Scores of the listed keys and x.y where L is needed.
  dot_lanes<E, N, kLanes>(list.n_listed, p.head_dim, k, s.qT, S, prefetcher,
                          prefetcher.left() * kSliceRows<T, kLanes> / (list.n_listed + 1) + 1);
  scale_scores<E>(p, list.n_listed * kLanes, S);
  prefetcher.fetch(prefetcher.left());
  const int64_t L_begin = first_low_rank(list);
  if (p.has_low_rank())
    low_rank_products<E, kLanes>(p, tile, list.n - L_begin, list.key + L_begin, s.xT, s.L + L_begin * kLanes);

  // 2. The stabiliser.
  V rho[NQ], edge[NQ], c[NQ], exact[NQ], removed[NQ], a[NQ], state[NQ];
  SB_EACH (v, NQ) {
    rho[v] = load<T, N>(tile.rho + v * N), edge[v] = load<T, N>(tile.edge + v * N);
    state[v] = list.uses_kv_state ? rho[v] + kappa_ref : none;
    store<T, N>(s.kv_state_log + v * N, state[v]);
    exact[v] = removed[v] = V{};
  }
  if (list.bitmask) {
    bitmask_weights<E, kLanes>(p, tile, kappa, S, s);
    return combine_weights<E, kLanes>(p, tile, s);
  }
  stabilisers<E, kLanes, N>(tile, kappa, S, kLanes, state, p.has_clusters() ? s.L : nullptr, c);

  // 3. Weights, into S for listed keys and behind them for the rest.
  SB_EACH (v, NQ) store<T, N>(s.c + v * N, c[v]);
  kv_state_weights<T, kLanes>(tile.rho, kappa_ref, s.c, s.kv_state_log, s.weight);
  SB_EACH (v, NQ) a[v] = load<T, N>(s.weight + v * N);
  if (list.uses_kv_state) decay_of_keys<T>(kappa, kappa_ref, list.key, list.n_chunk, list.n_listed, s.decay);
  for (int64_t begin = 0; begin < list.n; begin += kShortChain) {
    const int64_t end = begin + kShortChain < list.n ? begin + kShortChain : list.n;
    V sum[NQ] = {}, taken[NQ] = {};
    int64_t i = begin;
    for (; i < list.n_chunk && i < end; ++i) {
      const V at = splat<T, N>(T(list.key[i] - chunk_first));
      SB_EACH (v, NQ) {
        const int64_t o = i * kLanes + v * N;
        const V weight = at <= edge[v] ? exp2v<N>(load<T, N>(S + o) - c[v]) : V{};
        sum[v] += weight;
        store<T, N>(s.S + o, weight);
      }
    }
    const int64_t listed_end = list.n_listed < end ? list.n_listed : end;
    const auto weigh_listed = [&](auto uses_state) SB_INLINE_LAMBDA {
      for (; i < listed_end; ++i)
        SB_EACH (v, NQ) {
          const int64_t o = i * kLanes + v * N;
          V weight = exp2v<N>(load<T, N>(S + o) - c[v]);
          sum[v] += weight;
          if constexpr (uses_state) {
            const V u = a[v] * s.decay[i] * kernel.value(load<T, N>(s.L + o));
            taken[v] += u, weight -= u;
          }
          store<T, N>(s.S + o, weight);
        }
    };
    list.uses_kv_state ? weigh_listed(Yes{}) : weigh_listed(No{});
    const auto weigh_rest = [&](auto has_clusters) SB_INLINE_LAMBDA {
      for (; i < end; ++i) {
        const V at = splat<T, N>(T(list.key[i] - chunk_first));
        const T kj = kappa(list.key[i]);
        SB_EACH (v, NQ) {
          const V t = load<T, N>(s.L + i * kLanes + v * N);
          V u;
          if constexpr (has_clusters)
            u = exp2v<N>((t - c[v]) + kj);
          else
            u = exp2v<N>((rho[v] - c[v]) + kj) * kernel.value(t);
          const V weight = at <= edge[v] ? u : V{};
          sum[v] += weight;
          store<T, N>(s.S + i * kLanes + v * N, weight);
        }
      }
    };
    p.has_clusters() ? weigh_rest(Yes{}) : weigh_rest(No{});
    SB_EACH (v, NQ) exact[v] += sum[v], removed[v] += taken[v];
  }
  SB_EACH (v, NQ) {
    store<T, N>(s.exact + v * N, exact[v]);
    store<T, N>(s.removed + v * N, removed[v]);
  }

  combine_weights<E, kLanes>(p, tile, s);
}

}  // namespace sb::SB_ISA
