// The stabiliser of a query: the largest exponent, in base 2, among the weights that it sums.
#pragma once
#include "key_list_bitmask.h"

namespace sb::SB_ISA {

// Of every lane of a tile that shares a list. `state` holds rho + kappa_ref, or kLowest where no state is used; score i
// of lane l is at S[i * stride + l]. `exponents` [key][lane], where given, stand in place of rho: a key's cluster has
// its own.
template <class E, int kLanes, int N>
SB_INLINE void stabilisers(const QueryTile<E, kLanes>& tile, const LogScales<AccType<E>>& kappa, const AccType<E>* S,
                           int64_t stride, const Vector<AccType<E>, N>* state, const AccType<E>* exponents,
                           Vector<AccType<E>, N>* c) {
  typedef AccType<E> T;
  typedef Vector<T, N> V;
  constexpr int NQ = kLanes / N;
  const KeyList& list = tile.list;
  const V none = splat<T, N>(kLowest<T>);
  V rho[NQ], edge[NQ];
  SB_EACH (v, NQ) {
    rho[v] = load<T, N>(tile.rho + v * N), edge[v] = load<T, N>(tile.edge + v * N);
    c[v] = state[v];
  }
  for (int64_t i = 0; i < list.n_chunk; ++i) {
    const V at = splat<T, N>(T(list.key[i] - tile.chunk_first));
    SB_EACH (v, NQ) c[v] = max_lanes(c[v], at <= edge[v] ? load<T, N>(S + i * stride + v * N) : none);
  }
  for (int64_t i = list.n_chunk; i < list.n_listed; ++i)
    SB_EACH (v, NQ) c[v] = max_lanes(c[v], load<T, N>(S + i * stride + v * N));
  for (int64_t i = list.n_listed; i < list.n; ++i) {
    const V at = splat<T, N>(T(list.key[i] - tile.chunk_first));
    SB_EACH (v, NQ) {
      const V log = exponents ? load<T, N>(exponents + i * kLanes + v * N) : rho[v];
      c[v] = max_lanes(c[v], at <= edge[v] ? log + kappa(list.key[i]) : none);
    }
  }
}

// Of N lanes of a list with a bitmask, from lane v N on.
template <class E, int kLanes, int N>
SB_INLINE Vector<AccType<E>, N> bitmask_stabiliser(const QueryTile<E, kLanes>& tile, const LogScales<AccType<E>>& kappa,
                                                   const AccType<E>* S, int64_t stride, const AccType<E>* exponents,
                                                   int v) {
  auto c = splat<AccType<E>, N>(kLowest<AccType<E>>);
  for (int64_t i = 0; i < tile.list.n; ++i)
    c = max_lanes(c, BitmaskKey<E, kLanes, N>(tile, kappa, S, stride, exponents, i, v).exponent);
  return c;
}

// Of one query with scores S; `exponents` [key] as above.
template <class T>
SB_INLINE T stabiliser_of_query(const KeyList& list, const LogScales<T>& kappa, const T* S, T rho, T state,
                                const T* exponents) {
  T c = state;
  for (int64_t i = 0; i < list.n_listed; ++i) c = S[i] > c ? S[i] : c;
  for (int64_t i = list.n_listed; i < list.n; ++i) {
    const T log = (exponents ? exponents[i] : rho) + kappa(list.key[i]);
    c = log > c ? log : c;
  }
  return c;
}

// Whether lse is too large to be a stabiliser. Rows without weight have -kLowest, which leaves them none.
template <class T>
SB_INLINE bool is_lost(T lse) {
  return lse < T(-kLargestLse) || (lse > T(kLargestLse) && lse < -kLowest<T>);
}

}  // namespace sb::SB_ISA
