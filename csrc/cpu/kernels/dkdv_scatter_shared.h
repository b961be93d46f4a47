// The scatter of the backward pass: what the pairs of one record add to dk, dv and dy.

constexpr int kBackwardLanes = 16;  // queries of the largest tile

// What the scatter needs of one list: the lanes of the shared form, or one query.
template <class E>
struct PairRecord {
  typedef SumOf<E> T;
  int64_t lanes, n0, n01, n, l_begin;
  int64_t first_key, last_key;  // of the list
  int32_t* key;
  E *w, *ds;    // [n][lanes], [n01][lanes] times scale
  T* dt;        // [n - l_begin][lanes]
  const E** q;  // rows of the lanes
  const E** d_out;
  const T** x;
  int64_t directs;  // lanes whose complement is summed directly
  DirectQuery<T>* direct;
};

// target(i) += weight_i row for n rows.
template <class T>
SB_INLINE void scatter_row(int64_t n, int64_t columns, const T* weight, const T* row, const ListedRows<T>& target) {
  constexpr int N = kWidth<T>;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t column = 0; column < columns; column += N) {
      T* to = target(i) + column;
      store<T, N>(to, load<T, N>(to) + weight[i] * load<T, N>(row + column));
    }
}

// target(i)[columns] += sum_q weight[i][q] row_q[columns] for n rows, a row behind a pointer for each of the record's
// lanes.
template <class E>
SB_INLINE void scatter_rows(int64_t n, int64_t columns, int64_t lanes, const E* weight, const E* const* rows,
                            const ListedRows<SumOf<E>>& target) {
  typedef SumOf<E> T;
  constexpr int N = kWidth<T>;
  const AcrossSteps<E, DenseRows<const E>> a{{weight, lanes}};
  const int64_t steps = steps_of<E>(lanes);
  const auto b = rows_in_steps<E>(PointedRows<const E>{rows}, lanes, nullptr);
  int64_t column = 0;
#if SB_VECTOR_BYTES == 64
  // Four vectors of a row at a time: where a listed row is has to be found once for all of them.
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

// Counts every eighth pair of a record by block of keys: where the work of a scatter lies.
template <class E>
SB_INLINE void spread_of_record(const PairRecord<E>& r, int64_t* pairs) {
  for (int64_t i = 0; i < r.n; i += 8) ++pairs[r.key[i] / kChunk];
}

// What queries whose complement was summed directly add for the keys in [key_begin, key_end).
template <class E>
SB_INLINE void scatter_directs(const AttentionParams& p, int64_t b, int64_t kv, const PairRecord<E>& r,
                               int64_t key_begin, int64_t key_end) {
  typedef SumOf<E> T;
  if constexpr (sizeof(T) == sizeof(double)) {
    const int64_t first = p.rows[b].k_first;
    for (int64_t i = 0; i < r.directs; ++i) {
      const DirectQuery<T>& q = r.direct[i];
      direct_gradients<T>(p, q, key_begin > first ? key_begin - first : 0, key_end - first,
                          [&](const int32_t* key, int64_t n, const T* weight, const T* dt) {
                            scatter_row<T>(n, p.value_pad, weight, q.d_out, listed_target<T>(p.dv, b, kv, key));
                            scatter_row<T>(n, p.map_pad, dt, q.x, listed_target<T>(p.dy, b, kv, key));
                          });
    }
  }
}

// Adds the share of dk, dv and dy of queries that share a list for the keys in [key_begin, key_end).
template <class E>
void scatter_shared(const AttentionParams& p, int64_t b, int64_t kv, const PairRecord<E>& r, int64_t key_begin,
                    int64_t key_end) {
  typedef SumOf<E> T;
  const int64_t part[4] = {0, r.n0, r.n01, r.n};
  const bool listed_here = r.last_key >= key_begin && r.first_key < key_end;
  enum { kValues, kKeys, kMaps };
  for (int what = kValues; what <= kMaps; ++what)  // one after the other: the rows of a target stay in cache
    for (int i = 0; i < 3 && listed_here; ++i) {
      const int64_t begin = lower_bound_key(r.key, part[i], part[i + 1], key_begin),
                    end = lower_bound_key(r.key, begin, part[i + 1], key_end);
      const int64_t n = end - begin;
      if (n == 0) continue;
      const int32_t* key = r.key + begin;
      if (what == kValues)
        scatter_rows<E>(n, p.value_pad, r.lanes, r.w + begin * r.lanes, r.d_out, listed_target<T>(p.dv, b, kv, key));
      if (what == kKeys && i < 2)
        scatter_rows<E>(n, p.head_pad, r.lanes, r.ds + begin * r.lanes, r.q, listed_target<T>(p.dk, b, kv, key));
      if (what == kMaps && begin >= r.l_begin && p.low_rank != LowRank::kNone)
        scatter_rows<T>(n, p.map_pad, r.lanes, r.dt + (begin - r.l_begin) * r.lanes, r.x,
                        listed_target<T>(p.dy, b, kv, key));
    }
  scatter_directs<E>(p, b, kv, r, key_begin, key_end);
}
