// Scores q.k of a tile of queries and of a single one, and dO.v alike.

// Queries in lanes, in steps, and what their products are yet to be multiplied with to be exponents in base 2. Sums
// take the factor at once; bfloat16 would round it.
template <class E, int kLanes>
SB_INLINE void queries_in_lanes(const AttentionParams& p, const Group<E, kLanes>& g, StepOf<E>* qT) {
  if constexpr (kPaired<E>)
    transpose_steps<E, kLanes>(g.q, p.head_dim, qT);
  else
    transpose_rows<E, kLanes>(g.q, p.head_dim, E(1.44269504088896340736 * p.scale), qT);
}
template <class E>
struct ScoreFactor {
  SumOf<E> log2e;
  explicit SB_INLINE ScoreFactor(const AttentionParams& p) : log2e(SumOf<E>(1.44269504088896340736 * p.scale)) {}
  template <class V>
  SB_INLINE V operator()(V s) const {
    if constexpr (kPaired<E>)
      return s * log2e;
    else
      return s;
  }
};

// out[i][lane] = rows(i).lanes for n listed rows, fetching `per_slice` of the upcoming ones after every few.
template <class T, int kLanes>
inline constexpr int kSliceRows = kLanes <= kWidth<T> ? 8 : 6;
template <class E, int N, int kLanes, class U>
SB_INLINE void dot_lanes(int64_t n, int64_t depth, const ListedRows<const E>& rows, const StepOf<E>* lanes,
                         SumOf<E>* out, U& upcoming, int64_t per_slice) {
  typedef SumOf<E> T;
  constexpr int64_t kSlice = kSliceRows<T, kLanes>;
  for (int64_t i = 0; i < n; i += kSlice) {
    gemm<T, N, false>(n - i < kSlice ? n - i : kSlice, kLanes, steps_of<E>(depth),
                      AcrossSteps<E, ListedRows<const E>>{rows.from(i)}, DenseRows<const StepOf<E>>{lanes, kLanes},
                      DenseRows<T>{out + i * kLanes, kLanes});
    upcoming.fetch(per_slice);
  }
}

// Exponents in base 2 of one query's listed keys. Sums take the factor into the query's row (`row`), of bfloat16 it
// multiplies the products.
template <class E>
SB_INLINE void scores_of_query(const AttentionParams& p, const E* q, int64_t n, const ListedRows<const E>& keys,
                               [[maybe_unused]] StepOf<E>* row, SumOf<E>* S) {
  typedef SumOf<E> T;
  if constexpr (kPaired<E>) {
    constexpr int N = kWidth<T>;
    const ScoreFactor<E> score(p);
    dot_rows<E>(n, keys, q, p.head_pad, S);
    for (int64_t i = 0; i < n; i += N) store<T, N>(S + i, score(load<T, N>(S + i)));
  } else {
    const T log2e = T(1.44269504088896340736 * p.scale);
    for (int64_t e = 0; e < p.head_pad; ++e) row[e] = q[e] * log2e;
    dot_rows<T>(n, keys, row, p.head_pad, S);
  }
}
