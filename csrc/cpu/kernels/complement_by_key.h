// The complement of one query summed key by key, where subtracting from the state loses precision: of single queries of
// a head (kByKeyKeys), and where even float64 loses it (kFallbackBoundInDouble).
#pragma once
#include "features.h"
#include "low_rank_products.h"
#include "scores.h"
#include "unseen_keys.h"

namespace sb::SB_ISA {

// One such query in the backward pass.
template <class E>
struct ByKeyQuery {
  typedef AccType<E> T;
  int64_t b, kv, end;  // keys before `end`, counted from the row's first, are in the state
  const int32_t* key;  // those of them that are listed, ascending
  int64_t listed;      // and their number
  KeyRange held;       // keys before `end` that the state does not hold
  const T* x;          // rows
  const E* d_out;
  T* z;                   // as query_row fills it
  T log, delta, inverse;  // log2 of the factor of L beside exp(kappa) (and z's); delta; 1 / sum of weights
};

// Calls visit(keys, n), up to kChunk keys at a time, for the keys in [begin, end) of the row that are neither masked
// nor held nor among the ascending `listed`. Positions count from the row's first key, those keys are absolute.
template <class Visit>
SB_INLINE void for_each_unlisted(const AttentionParams& p, int64_t b, int64_t begin, int64_t end, const int32_t* listed,
                                 int64_t n_listed, const KeyRange& held, const Visit& visit) {
  const int64_t first = p.rows[b].k_first;
  const uint8_t* mask = p.k_mask ? p.k_mask + b * p.k_tokens + first : nullptr;
  int64_t at = lower_bound_key(listed, 0, n_listed, first + begin),
          at_held = lower_bound_key(held.key, 0, held.n, first + begin);
  for (int64_t from = begin; from < end; from += kChunk) {
    const int64_t to = from + kChunk < end ? from + kChunk : end;
    int32_t key[kChunk];
    int64_t n = 0;
    for (int64_t j = from; j < to; ++j) {  // runs between keys that are left out
      const int64_t of_list = at < n_listed ? listed[at] - first : end,
                    of_held = at_held < held.n ? held.key[at_held] - first : end;
      const int64_t next = of_list < of_held ? of_list : of_held, stop = next < to ? next : to;
      if (mask) {
        for (; j < stop; ++j)
          if (!mask[j]) key[n++] = int32_t(first + j);
      } else {
        for (int64_t i = j; i < stop; ++i) key[n + i - j] = int32_t(first + i);
        n += stop - j, j = stop;
      }
      if (j < to) at += j == of_list, at_held += j == of_held;
    }
    if (n > 0) visit(key, n);
  }
}

// What the products of one query read: its coordinates with zeros behind them, or the exponents of its clusters.
template <class E, int kLanes>
SB_INLINE void query_row(const AttentionParams& p, const QueryTile<E, kLanes>& tile, int lane, const AccType<E>* xT,
                         AccType<E>* z) {
  typedef AccType<E> T;
  if (!p.has_clusters()) return map_row<T>(p, tile.x[lane], z);
  const T* exponent = exponents_of_clusters<T>(p, xT, kLanes);
  for (int64_t c = 0; c < p.map_pad; ++c) z[c] = c < p.rank ? exponent[c * kLanes + lane] : T(0);
}

// e = exp(log + kappa) and t = x.y of n keys, from the row z of query_row; with clusters L is all in e.
template <class T>
SB_INLINE void by_key_terms(const AttentionParams& p, int64_t b, int64_t kv, const int32_t* key, int64_t n, T log,
                            const T* z, T* e, T* t) {
  constexpr int N = kWidth<T>;
  const auto kappa = log_scales<T>(p.kappa, b, kv);
  const int32_t* cluster = p.has_clusters() ? clusters_of_keys(p, b, kv) : nullptr;
  for (int64_t i = 0; i < kChunk; ++i)
    e[i] = i >= n ? T(-1e30) : (cluster ? log + z[cluster[key[i]]] : log) + kappa(key[i]);
  for (int64_t i = 0; i < n; i += N) store<T, N>(e + i, exp2v<N>(load<T, N>(e + i)));
  if (!cluster) return low_rank_products_of_query<T>(p, b, kv, n, key, z, t);
  for (int64_t i = 0; i < n; ++i) t[i] = T(1);
}

// Adds the weight of the unlisted keys to `total`, and its product with dO.v - delta to `slope`.
template <class E, class T>
void sum_by_key(const AttentionParams& p, const ByKeyQuery<E>& q, T* total, T* slope) {
  const RuntimeKernel kernel{p.low_rank};
  for_each_unlisted(p, q.b, 0, q.end, q.key, q.listed, q.held, [&](const int32_t* key, int64_t n) {
    T e[kChunk], t[kChunk], g[kChunk], sum = T(0), moment = T(0);
    by_key_terms<T>(p, q.b, q.kv, key, n, q.log, q.z, e, t);
    dot_rows<E>(n, listed<E>(p.v, q.b, q.kv, key), q.d_out, p.value_pad, g);
    for (int64_t i = 0; i < n; ++i) {
      const T weight = e[i] * kernel.value(t[i]);
      sum += weight, moment += weight * (g[i] - q.delta);
    }
    *total += sum, *slope += moment;
  });
}

// Calls visit(key, n, weight, dt) with the weights of the unlisted keys among [begin, end) and the gradients by x.y.
template <class E, class Visit>
SB_INLINE void gradients_by_key(const AttentionParams& p, const ByKeyQuery<E>& q, int64_t begin, int64_t end,
                                const Visit& visit) {
  typedef AccType<E> T;
  const RuntimeKernel kernel{p.low_rank};
  for_each_unlisted(p, q.b, begin, end < q.end ? end : q.end, q.key, q.listed, q.held,
                    [&](const int32_t* key, int64_t n) {
                      T e[kChunk], t[kChunk], g[kChunk], weight[kChunk], dt[kChunk];
                      by_key_terms<T>(p, q.b, q.kv, key, n, q.log, q.z, e, t);
                      dot_rows<E>(n, listed<E>(p.v, q.b, q.kv, key), q.d_out, p.value_pad, g);
                      for (int64_t i = 0; i < n; ++i) {
                        const T scaled = e[i] * q.inverse;
                        weight[i] = scaled * kernel.value(t[i]);
                        dt[i] = scaled * (g[i] - q.delta) * kernel.slope(t[i]);
                      }
                      visit(key, n, weight, dt);
                    });
}

// The whole forward pass of one lane, whose stabiliser is the largest exponent of the keys it sees. Writes the sum of
// weights to `total` and that of weight v to `out`; returns the stabiliser. `q`, z and S are scratch for a query, its
// query_row and its list.
template <class E, int kLanes, class T = AccType<E>>
T forward_by_key(const AttentionParams& p, const QueryTile<E, kLanes>& tile, int lane, const KeyList& list, const T* xT,
                 StepOf<E>* q, T* z, T* S, T* total, T* out) {
  constexpr int N = kWidth<T>;
  const RuntimeKernel kernel{p.low_rank};
  const auto kappa = log_scales<T>(p.kappa, tile.b, tile.kv);
  const int64_t first = p.rows[tile.b].k_first, chunk = tile.chunk_first - first,
                edge = last_seen_key<E, kLanes>(p, tile, lane) - first;
  const auto unlisted = [&](const auto& visit) {
    for_each_unlisted(p, tile.b, 0, p.is_causal ? chunk : edge + 1, list.key + list.n_chunk,
                      list.n_listed - list.n_chunk, held_keys(p, tile.b, tile.kv, tile.slot), visit);
    for (int64_t i = list.n_listed; i < list.n; i += kChunk) {  // the third part
      const int64_t end = i + kChunk < list.n ? i + kChunk : list.n;
      const int64_t n = lower_bound_key(list.key, i, end, first + edge + 1) - i;
      if (n > 0) visit(list.key + i, n);
    }
  };
  scores_of_query<E>(p, tile.q[lane], list.n_listed, listed<E>(p.k, tile.b, tile.kv, list.key), q, S);
  query_row<E, kLanes>(p, tile, lane, xT, z);
  const int32_t* cluster = p.has_clusters() ? clusters_of_keys(p, tile.b, tile.kv) : nullptr;
  T c = kLowest<T>;
  for (int64_t i = 0; i < list.n_listed; ++i) {
    if (list.key[i] - first > edge) S[i] = kLowest<T>;
    c = S[i] > c ? S[i] : c;
  }
  for (int64_t i = 0; i < list.n_listed; i += N) store<T, N>(S + i, exp2v<N>(load<T, N>(S + i) - c));
  *total = sum_short<T>(S, list.n_listed);
  const auto v_rows = listed<E>(p.v, tile.b, tile.kv, list.key);
  combine_rows<E>(list.n_listed, S, rows_seen<E, kLanes>(p, tile, lane, v_rows), p.value_pad, out);
  unlisted([&](const int32_t* key, int64_t n) {
    T e[kChunk], t[kChunk], top = c;
    for (int64_t i = 0; i < n; ++i) {
      const T log = (cluster ? z[cluster[key[i]]] : tile.rho[lane]) + kappa(key[i]);
      top = log > top ? log : top;
    }
    if (top > c) {
      const T factor = exp2s<T>(c - top);
      *total *= factor, c = top;
      for (int64_t column = 0; column < p.value_pad; column += N)
        store<T, N>(out + column, load<T, N>(out + column) * factor);
    }
    by_key_terms<T>(p, tile.b, tile.kv, key, n, (cluster ? T(0) : tile.rho[lane]) - c, z, e, t);
    T sum = T(0);
    for (int64_t i = 0; i < n; ++i) sum += e[i] *= kernel.value(t[i]);
    *total += sum;
    add_rows<T>(n, e, listed<E>(p.v, tile.b, tile.kv, key), p.value_pad, out);
  });
  return c;
}

}  // namespace sb::SB_ISA
