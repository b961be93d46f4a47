// The centroid kernel's weights of clusters, exp(q.b_c + the largest log mass of c), for the queries of a tile, their
// values for listed keys, and what gradients by their exponents add up to (docs/algorithm.md, section 2).
#pragma once
#include "scores.h"

namespace sb::SB_ISA {

// The clusters of the keys of one head.
SB_INLINE const int32_t* clusters_of_keys(const AttentionParams& p, int64_t b, int64_t kv) {
  return p.cluster + (b * p.kv_heads + kv) * p.k_tokens;
}
template <class T>
SB_INLINE DenseRows<const T> representatives_of(const AttentionParams& p, int64_t b, int64_t kv) {
  return {p.representatives.at<const T>(b, kv, 0), p.representatives.row};
}

// Where the exponents stand, behind the weights: [cluster][lane] both.
template <class T>
SB_INLINE const T* exponents_of_clusters(const AttentionParams& p, const T* xT, int lanes) {
  return xT + p.map_pad * lanes;
}

// Fills xT with the weights of the clusters relative to the largest, whose exponent in base 2 becomes rho, and with the
// exponents, which the forward pass leaves to the backward pass where there is room. `wide`: [d][lane] for rows of
// bfloat16.
template <class E, int kLanes, bool kBackward>
SB_INLINE void weigh_clusters(const AttentionParams& p, QueryTile<E, kLanes>& tile, StepOf<E>* qT, AccType<E>* wide,
                              AccType<E>* xT) {
  typedef AccType<E> T;
  constexpr int N = kLaneWidth<T, kLanes>, NQ = kLanes / N;
  typedef Vector<T, N> V;
  T* exponent = xT + p.map_pad * kLanes;
  const KeptScores<T> kept = kept_exponents<T>(p, tile.b, tile.h, tile.first_slot);
  const T* largest = p.largest.at<const T>(tile.b, tile.kv, 0);
  V peak[NQ];
  SB_EACH (v, NQ) peak[v] = splat<T, N>(T(-1e30));
  if (kBackward && kept.data) {
    for (int64_t c = 0; c < p.rank; ++c)
      SB_EACH (v, NQ) {
        const V e = load<T, N>(kept.data + c * kept.stride + v * N);
        peak[v] = max_lanes(peak[v], e);
        store<T, N>(exponent + c * kLanes + v * N, e);
      }
  } else {
    queries_in_lanes<E, kLanes>(p, tile, qT);
    gemm<T, N, false>(
        p.rank, kLanes, p.head_dim, AcrossSteps<T, DenseRows<const T>>{representatives_of<T>(p, tile.b, tile.kv)},
        DenseRows<const T>{widen_steps<E, kLanes>(qT, p.head_dim, wide), kLanes}, DenseRows<T>{exponent, kLanes});
    scale_scores<E>(p, p.rank * kLanes, exponent);
    const auto add_largest = [&](auto keeps) SB_INLINE_LAMBDA {
      for (int64_t c = 0; c < p.rank; ++c)
        SB_EACH (v, NQ) {
          T* to = exponent + c * kLanes + v * N;
          const V e = largest[c] <= T(-1e29) ? splat<T, N>(T(-1e30)) : load<T, N>(to) + largest[c];
          peak[v] = max_lanes(peak[v], e);
          store<T, N>(to, e);
          if constexpr (keeps) store<T, N>(kept.data + c * kept.stride + v * N, e);
        }
    };
    kept.data ? add_largest(Yes{}) : add_largest(No{});
  }
  SB_EACH (v, NQ) store<T, N>(tile.rho + v * N, peak[v]);
  for (int64_t at = 0; at < p.rank * kLanes; at += kLanes)
    SB_EACH (v, NQ) store<T, N>(xT + at + v * N, exp2v<N>(load<T, N>(exponent + at + v * N) - peak[v]));
}

// t[i][lane] for n keys that share a list: the weight of the key's cluster where the state holds it, else its exponent.
template <int kLanes, class T>
SB_INLINE void look_up_clusters(const AttentionParams& p, const int32_t* cluster, bool uses_kv_state, int64_t n,
                                const int32_t* key, const T* xT, T* t) {
  constexpr int N = kLaneWidth<T, kLanes>;
  const T* from = uses_kv_state ? xT : exponents_of_clusters<T>(p, xT, kLanes);
  for (int64_t i = 0; i < n; ++i)
    SB_EACH (v, kLanes / N) store<T, N>(t + i * kLanes + v * N, load<T, N>(from + cluster[key[i]] * kLanes + v * N));
}
// t[i] of one query in `lane`.
template <int kLanes, class T>
SB_INLINE void look_up_clusters_of_query(const AttentionParams& p, const int32_t* cluster, bool uses_kv_state,
                                         int64_t n, const int32_t* key, const T* xT, int lane, T* t) {
  const T* from = (uses_kv_state ? xT : exponents_of_clusters<T>(p, xT, kLanes)) + lane;
  for (int64_t i = 0; i < n; ++i) t[i] = from[cluster[key[i]] * kLanes];
}

// From dt [n][lane], the gradients by what look_up_clusters found: adds those by the clusters' exponents to dX
// [cluster][lane], and puts their sums over lanes, the gradients by kappa, in the place of dt.
template <int kLanes, class T>
SB_INLINE void add_exponent_gradients(const int32_t* cluster, bool uses_kv_state, int64_t n, const int32_t* key,
                                      const T* xT, T* dt, T* dX) {
  constexpr int N = kLaneWidth<T, kLanes>, NQ = kLanes / N;
  typedef Vector<T, N> V;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t c = cluster[key[i]] * kLanes;
    V sum{};
    SB_EACH (v, NQ) {
      V d = load<T, N>(dt + i * kLanes + v * N);
      if (uses_kv_state) d *= load<T, N>(xT + c + v * N);
      store<T, N>(dX + c + v * N, load<T, N>(dX + c + v * N) + d);
      sum += d;
    }
    dt[i] = sum_lanes<T, N>(sum);
  }
}
template <int kLanes, class T>
SB_INLINE void add_exponent_gradients_of_query(const int32_t* cluster, bool uses_kv_state, int64_t n,
                                               const int32_t* key, const T* xT, int lane, T* dt, T* dX) {
  for (int64_t i = 0; i < n; ++i) {
    const int64_t c = cluster[key[i]] * kLanes + lane;
    if (uses_kv_state) dt[i] *= xT[c];
    dX[c] += dt[i];
  }
}

// The gradient of the representatives, summed over the queries of unit `unit` of head `row` = (b, h).
template <class T>
SB_INLINE T* d_representatives_slot(const AttentionParams& p, int64_t row, int64_t unit) {
  return static_cast<T*>(p.d_representatives) + (row * p.units + unit) * p.rank * p.head_pad;
}

// Adds what the gradients dX by the clusters' exponents come to: to the rows dq of the lanes, and to that of the
// representatives. `wide`: [lane][d] for rows of bfloat16.
template <class E, int kLanes>
SB_INLINE void exponent_gradients_to_rows(const AttentionParams& p, const QueryTile<E, kLanes>& tile, int64_t unit,
                                          AccType<E>* dX, AccType<E>* wide, AccType<E>* const* dq) {
  typedef AccType<E> T;
  constexpr int N = kWidth<T>, NL = kLaneWidth<T, kLanes>;
  for (int64_t at = 0; at < p.rank * kLanes; at += NL) store<T, NL>(dX + at, load<T, NL>(dX + at) * T(p.scale));
  gemm<T, N, true>(kLanes, p.head_pad, p.rank, Strided<T>{dX, 1, kLanes}, representatives_of<T>(p, tile.b, tile.kv),
                   PointedRows<T>{dq});
  const T* q[kLanes];
  for (int lane = 0; lane < kLanes; ++lane)
    q[lane] = widen_row_of<E>(tile.q[lane], p.head_pad, wide + lane * p.head_pad);
  gemm<T, N, true>(p.rank, p.head_pad, kLanes, Strided<T>{dX, kLanes, 1}, PointedRows<const T>{q},
                   DenseRows<T>{d_representatives_slot<T>(p, tile.b * p.q_heads + tile.h, unit), p.head_pad});
}

}  // namespace sb::SB_ISA
