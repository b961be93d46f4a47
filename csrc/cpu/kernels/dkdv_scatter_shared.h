// Scatter of the backward pass to dk, dv and dy, for query tiles that share a key list.
#pragma once
#include "complement_by_key.h"

namespace sb::SB_ISA {

// Weights and rows of one key list for the scatter: of the tile that shares it, or of one query.
template <class E>
struct ScatterRecord {
  typedef AccType<E> T;
  int64_t lanes, n_chunk, n_listed, n, L_begin;  // L_begin: first_low_rank of the list
  int64_t first_key, last_key;                   // of the list
  int32_t* key;
  E *w, *ds;    // weights [n][lanes]; ds [n_listed][lanes], times scale
  T* dt;        // dL/dt [n - L_begin][lanes]; of the centroid kernel dkappa, its sums over lanes
  const E** q;  // rows of the lanes
  const E** d_out;
  const T** x;
  bool has_unseen_pairs;  // some of which is not finite: a key reads the lanes alone that see it
  int32_t* last_seen;     // then, the last key that each lane sees
  const void* zero_row;
  int64_t by_key_count;  // lanes whose complement is summed key by key
  ByKeyQuery<E>* by_key;
};

// target(i) += weight[i] row for n rows.
template <class E, class T = AccType<E>>
SB_INLINE void scatter_row(int64_t n, int64_t columns, const T* weight, const E* row, const ListedRows<T>& target) {
  constexpr int N = kWidth<T>;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t column = 0; column < columns; column += N) {
      T* to = target(i) + column;
      store<T, N>(to, load<T, N>(to) + weight[i] * load_wide<N>(row + column));
    }
}

// target(i) += sum_q weight[i][q] row_q for n rows, where q goes over the record's lanes.
template <class E>
SB_INLINE void scatter_rows(int64_t n, int64_t columns, int64_t lanes, const E* weight, const E* const* rows,
                            const ListedRows<AccType<E>>& target) {
  typedef AccType<E> T;
  constexpr int N = kWidth<T>;
  const AcrossSteps<E, DenseRows<const E>> a{{weight, lanes}};
  const int64_t steps = steps_of<E>(lanes);
  const auto b = rows_in_steps<E>(PointedRows<const E>{rows}, lanes, nullptr);
  int64_t column = 0;
#if SB_VECTOR_BYTES == 64
  // Four vectors of a row at a time share the look-up of a listed row.
  for (; column + 4 * N <= columns; column += 4 * N) {
    if constexpr (kPaired<E>) {
      Word words[kBackwardLanes / 2][4 * N];
      for (int64_t k = 0; k < steps; ++k)
        SB_EACH (v, 4) store<Word, N>(words[k] + v * N, lanes_of<Word, N>(b, k, column + v * N));
      const ListedRows<T> columns_here{target.p + column, target.stride, target.list};
      gemm_rows<T, N, 4, 4, true>(0, n, 0, steps, a, DenseRows<const Word>{words[0], 4 * N}, columns_here);
    } else {
      gemm_rows<T, N, 4, 4, true>(0, n, column, steps, a, b, target);
    }
  }
#endif
  if (column < columns) gemm_from<T, N, true>(column, n, columns, steps, a, b, target);
}

// scatter_rows of a record with unseen pairs, whose weights are zero.
template <class E>
__attribute__((noinline)) void scatter_seen_rows(int64_t n, int64_t columns, int64_t lanes, const E* weight,
                                                 const E* const* rows, const int32_t* last_seen, const void* zero_row,
                                                 const ListedRows<AccType<E>>& target) {
  for (int64_t i = 0; i < n; ++i) {
    const E* seen[kBackwardLanes];
    for (int64_t lane = 0; lane < lanes; ++lane)
      seen[lane] = target.list[i] <= last_seen[lane] ? rows[lane] : static_cast<const E*>(zero_row);
    scatter_rows<E>(1, columns, lanes, weight + i * lanes, seen, target.from(i));
  }
}

// Counts every eighth key of a record by chunk: an estimate of where the work of a scatter lies.
template <class E>
SB_INLINE void count_keys_of_record(const ScatterRecord<E>& r, int64_t* keys_of_chunk) {
  for (int64_t i = 0; i < r.n; i += 8) ++keys_of_chunk[r.key[i] / kChunk];
}

// Adds to dkappa of n keys.
template <class T>
SB_INLINE void add_to_keys(const AttentionParams& p, int64_t b, int64_t kv, int64_t n, const int32_t* key,
                           const T* d_kappa) {
  for (int64_t i = 0; i < n; ++i) *p.dy.at<T>(b, kv, key[i]) += d_kappa[i];
}

// Adds, for keys in [key_begin, key_end), the share of queries whose complement was summed key by key.
template <class E>
void scatter_by_key(const AttentionParams& p, int64_t b, int64_t kv, const ScatterRecord<E>& r, int64_t key_begin,
                    int64_t key_end) {
  typedef AccType<E> T;
  const int64_t first = p.rows[b].k_first;
  for (int64_t i = 0; i < r.by_key_count; ++i) {
    const ByKeyQuery<E>& q = r.by_key[i];
    gradients_by_key<E>(p, q, key_begin > first ? key_begin - first : 0, key_end - first,
                        [&](const int32_t* key, int64_t n, const T* weight, const T* dt) {
                          scatter_row<E>(n, p.value_pad, weight, q.d_out, listed_target<T>(p.dv, b, kv, key));
                          if (p.has_clusters())
                            add_to_keys<T>(p, b, kv, n, key, dt);
                          else
                            scatter_row<T>(n, p.map_pad, dt, q.x, listed_target<T>(p.dy, b, kv, key));
                        });
  }
}

// Adds a tile's share of dk, dv and dy for the keys in [key_begin, key_end).
template <class E>
void dkdv_scatter_shared(const AttentionParams& p, int64_t b, int64_t kv, const ScatterRecord<E>& r, int64_t key_begin,
                         int64_t key_end) {
  typedef AccType<E> T;
  const int64_t part[4] = {0, r.n_chunk, r.n_listed, r.n};
  const bool listed_here = r.last_key >= key_begin && r.first_key < key_end;
  enum { kValues, kKeys, kMaps };
  const auto scatter = [&](int64_t n, int64_t columns, const auto* weight, const auto* const* rows,
                           const ListedRows<T>& to) SB_INLINE_LAMBDA {
    if (r.has_unseen_pairs)
      scatter_seen_rows(n, columns, r.lanes, weight, rows, r.last_seen, r.zero_row, to);
    else
      scatter_rows(n, columns, r.lanes, weight, rows, to);
  };
  for (int target = kValues; target <= kMaps; ++target)  // one after the other: a target's rows stay in cache
    for (int i = 0; i < 3 && listed_here; ++i) {
      const int64_t begin = lower_bound_key(r.key, part[i], part[i + 1], key_begin),
                    end = lower_bound_key(r.key, begin, part[i + 1], key_end);
      const int64_t n = end - begin;
      if (n == 0) continue;
      const int32_t* key = r.key + begin;
      if (target == kValues)
        scatter(n, p.value_pad, r.w + begin * r.lanes, r.d_out, listed_target<T>(p.dv, b, kv, key));
      if (target == kKeys && i < 2)
        scatter(n, p.head_pad, r.ds + begin * r.lanes, r.q, listed_target<T>(p.dk, b, kv, key));
      if (target == kMaps && begin >= r.L_begin && p.has_clusters())
        add_to_keys<T>(p, b, kv, n, key, r.dt + begin - r.L_begin);
      if (target == kMaps && begin >= r.L_begin && p.has_maps())
        scatter(n, p.map_pad, r.dt + (begin - r.L_begin) * r.lanes, r.x, listed_target<T>(p.dy, b, kv, key));
    }
  scatter_by_key<E>(p, b, kv, r, key_begin, key_end);
}

}  // namespace sb::SB_ISA
