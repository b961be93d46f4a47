// States of the centroid kernel, a row for each cluster: sums of exp(kappa_j) v_j and of exp(kappa_j), with kappa
// counted from the largest of the cluster; and the gradients that reach keys and values through states and
// representatives.
#pragma once
#include "cluster_weights.h"
#include "kv_state.h"

namespace sb::SB_ISA {

// exp(kappa) of up to kChunk keys from `first` on, and which of them are not ignored.
template <class T>
struct ClusterChunk {
  static constexpr int L = int(kChunk);
  const int32_t* cluster;
  int64_t first;
  T weight[L];
  bool valid[L];
  SB_INLINE ClusterChunk(const AttentionParams& p, int64_t b, int64_t kv, int64_t first)
      : cluster(clusters_of_keys(p, b, kv) + first), first(first) {
    constexpr int N = kWidth<T>;
    const auto kappa = log_scales<T>(p.kappa, b, kv);
    for (int i = 0; i < L; ++i) {
      const int64_t j = first + i;
      valid[i] = j < p.rows[b].k_end && !(p.k_mask && p.k_mask[b * p.k_tokens + j]);
      weight[i] = valid[i] ? kappa(j) : T(-1e30);
    }
    for (int i = 0; i < L; i += N) store<T, N>(weight + i, exp2v<N>(load<T, N>(weight + i)));
  }
};

// Sets slot segment + 1 to the sums over the keys of the segment, sorted by cluster: each row is read and written once
// for every kChunk of its keys.
template <class E>
int64_t cluster_state_segment(const AttentionParams& p, int64_t b, int64_t kv, int64_t segment, void* scratch) {
  typedef AccType<E> T;
  constexpr int N = kWidth<T>;
  Arena arena{static_cast<char*>(scratch), 0};
  int32_t* key = arena.take<int32_t>(p.segment);  // sorted
  T* weight = arena.take<T>(p.segment);
  T* of_key = arena.take<T>(p.segment + kChunk);
  int32_t* end_of = arena.take<int32_t>(p.rank + 1);
  if (!scratch) return arena.used;
  const KVState<T> s = kv_state_slot<T>(p, b * p.kv_heads + kv, segment + 1);
  for (int64_t i = 0; i < p.kv_state_size(); ++i) s.H[i] = T(0);
  const int32_t* cluster = clusters_of_keys(p, b, kv);
  const int64_t begin = p.rows[b].k_first + segment * p.segment,
                end = begin + p.segment < p.rows[b].k_end ? begin + p.segment : p.rows[b].k_end;
  const auto is_valid = [&](int64_t j) { return !(p.k_mask && p.k_mask[b * p.k_tokens + j]); };
  for (int64_t c = 0; c <= p.rank; ++c) end_of[c] = 0;
  for (int64_t first = begin; first < end; first += kChunk) {
    const ClusterChunk<T> chunk(p, b, kv, first);
    for (int i = 0; i < int(kChunk); ++i) {
      of_key[first - begin + i] = chunk.weight[i];
      if (chunk.valid[i]) ++end_of[cluster[first + i] + 1];
    }
  }
  for (int64_t c = 0; c < p.rank; ++c) end_of[c + 1] += end_of[c];  // now the first of each, and then its end
  for (int64_t j = begin; j < end; ++j) {
    if (!is_valid(j)) continue;
    const int32_t at = end_of[cluster[j]]++;
    key[at] = int32_t(j), weight[at] = of_key[j - begin];
  }
  const ListedRows<const E> v{p.v.at<const E>(b, kv, 0), p.v.row, key};
  for (int64_t c = 0, at = 0; c < p.rank; at = end_of[c++])
    for (int64_t i = at; i < end_of[c]; i += kChunk) {
      const int64_t n = end_of[c] - i < kChunk ? end_of[c] - i : kChunk;
      const DenseRows<T> to{s.H + c * p.value_pad, 0};
      const Strided<T> a{weight + i, 0, 1};
      int64_t column = 0;
      for (; column + 4 * N <= p.value_pad; column += 4 * N) micro<T, N, 1, 4, true>(0, column, n, a, v.from(i), to);
      for (; column < p.value_pad; column += N) micro<T, N, 1, 1, true>(0, column, n, a, v.from(i), to);
      s.hz[c] += sum_short<T>(weight + i, n);
    }
  return arena.used;
}

// Sums the gradients of the representatives over the query heads of kv and over units, into the first of them.
template <class T>
void scan_representatives(const AttentionParams& p, int64_t b, int64_t kv) {
  const int64_t q_per_kv = p.q_heads / p.kv_heads, size = p.rank * p.head_pad, first = b * p.q_heads + kv * q_per_kv;
  T* to = d_representatives_slot<T>(p, first, 0);
  for (int64_t slot = 1; slot < q_per_kv * p.units; ++slot)
    for (int64_t i = 0; i < size; ++i) to[i] += to[slot * size + i];
}

// Adds the state's part to dv of a chunk of keys, and to dkappa.
template <class E>
void cluster_state_gradients(const AttentionParams& p, int64_t b, int64_t kv, int64_t chunk) {
  typedef AccType<E> T;
  constexpr int N = kWidth<T>;
  typedef Vector<T, N> V;
  if (!p.uses_kv_state) return;
  const KVState<T> d_state = d_kv_state_slot<T>(p, b * p.q_heads + kv * (p.q_heads / p.kv_heads), 0);
  const ClusterChunk<T> keys(p, b, kv, p.rows[b].k_first + chunk * kChunk);
  for (int i = 0; i < int(kChunk); ++i) {
    if (!keys.valid[i]) continue;
    const int64_t j = keys.first + i;
    const T *H = d_state.H + keys.cluster[i] * p.value_pad, w = keys.weight[i];
    const E* v = p.v.at<const E>(b, kv, j);
    T* dv = p.dv.at<T>(b, kv, j);
    V sum{};
    for (int64_t e = 0; e < p.value_pad; e += N) {
      const V h = load<T, N>(H + e);
      store<T, N>(dv + e, load<T, N>(dv + e) + w * h);
      sum += h * load_wide<N>(v + e);
    }
    *p.dy.at<T>(b, kv, j) += w * (sum_lanes<T, N>(sum) + d_state.hz[keys.cluster[i]]);
  }
}

// What each key of a cluster c takes, by its exp(kappa), from db_c and the dkappa of the cluster: (db_c - a sum dkappa)
// / sum exp(kappa), in the place of db_c.
template <class T>
void share_representatives(const AttentionParams& p, int64_t b, int64_t kv) {
  constexpr int N = kWidth<T>;
  const RowRange& range = p.rows[b];
  double moment[256]{}, mass[256]{};
  for (int64_t first = range.k_first; first < range.k_end; first += kChunk) {
    const ClusterChunk<T> keys(p, b, kv, first);
    for (int i = 0; i < int(kChunk); ++i) {
      if (!keys.valid[i]) continue;
      const int32_t c = keys.cluster[i];
      mass[c] += double(keys.weight[i]), moment[c] += double(*p.dy.at<const T>(b, kv, first + i));
    }
  }
  const T* a = p.query_mean.at<const T>(b, kv, 0);
  T* d = d_representatives_slot<T>(p, b * p.q_heads + kv * (p.q_heads / p.kv_heads), 0);
  for (int64_t c = 0; c < p.rank; ++c, d += p.head_pad) {
    if (mass[c] == 0) continue;
    const T sum = T(moment[c]), share = T(1 / mass[c]);
    for (int64_t e = 0; e < p.head_pad; e += N)
      store<T, N>(d + e, (load<T, N>(d + e) - sum * load<T, N>(a + e)) * share);
  }
}

// Adds to dk of a chunk of keys what reaches them through kappa and the representatives.
template <class T>
void cluster_key_gradients(const AttentionParams& p, int64_t b, int64_t kv, int64_t chunk) {
  constexpr int N = kWidth<T>;
  const ClusterChunk<T> keys(p, b, kv, p.rows[b].k_first + chunk * kChunk);
  const T *a = p.query_mean.at<const T>(b, kv, 0),
          *shares = d_representatives_slot<T>(p, b * p.q_heads + kv * (p.q_heads / p.kv_heads), 0);
  for (int i = 0; i < int(kChunk); ++i) {
    if (!keys.valid[i]) continue;
    const T *share = shares + keys.cluster[i] * p.head_pad, w = keys.weight[i],
            d_kappa = *p.dy.at<const T>(b, kv, keys.first + i);
    T* dk = p.dk.at<T>(b, kv, keys.first + i);
    for (int64_t e = 0; e < p.head_pad; e += N)
      store<T, N>(dk + e, load<T, N>(dk + e) + (w * load<T, N>(share + e) + d_kappa * load<T, N>(a + e)));
  }
}

}  // namespace sb::SB_ISA
