// The complement of one query summed key by key, without the state: for queries whose listed keys hold so much of the
// state's L that the difference of the two is rounding (kCancelling). Rare on real tokens, and linear in the keys.

// One such query.
template <class T>
struct DirectQuery {
  int64_t b, kv, end;  // keys before `end`, counted from the row's first, are in the state
  const int32_t* key;  // which of them are listed, ascending
  int64_t listed;
  const T *x, *d_out;     // rows
  T* z;                   // x with zeros behind its coordinates
  T log, delta, inverse;  // log2 of the factor of L beside exp(kappa); delta; 1 / sum of weights
};

// Calls visit(keys, n), up to 64 keys at a time, for the keys in [begin, end) of the row that are neither ignored nor
// among the ascending `listed`. Positions count from the row's first key, listed keys are absolute.
template <class Visit>
SB_INLINE void for_each_unlisted(const AttentionParams& p, int64_t b, int64_t begin, int64_t end, const int32_t* listed,
                                 int64_t n_listed, const Visit& visit) {
  const int64_t first = p.rows[b].k_first;
  const uint8_t* mask = p.k_mask ? p.k_mask + b * p.k_tokens + first : nullptr;
  int64_t at = lower_bound_key(listed, 0, n_listed, first + begin);
  for (int64_t from = begin; from < end; from += kChunk) {
    const int64_t to = from + kChunk < end ? from + kChunk : end;
    int32_t key[kChunk];
    int64_t n = 0;
    for (int64_t j = from; j < to; ++j) {
      if (at < n_listed && listed[at] == int32_t(first + j))
        ++at;
      else if (!(mask && mask[j]))
        key[n++] = int32_t(first + j);
    }
    if (n > 0) visit(key, n);
  }
}

// exp(log + kappa) of n keys, and x.y from the row z.
template <class T>
SB_INLINE void direct_terms(const AttentionParams& p, int64_t b, int64_t kv, const int32_t* key, int64_t n, T log,
                            const T* z, T* e, T* t) {
  constexpr int N = kWidth<T>;
  const auto kappa = log_scales<T>(p.kappa, b, kv);
  for (int64_t i = 0; i < kChunk; ++i) e[i] = i < n ? log + kappa(key[i]) : T(-1e30);
  for (int64_t i = 0; i < n; i += N) store<T, N>(e + i, exp2v<N>(load<T, N>(e + i)));
  dot_rows<T>(n, listed<T>(p.y, b, kv, key), z, p.map_pad, t);
}
template <class T>
SB_INLINE void direct_row(const AttentionParams& p, const T* x, T* z) {
  for (int64_t a = 0; a < p.map_pad; ++a) z[a] = a < p.rank ? x[a] : T(0);
}

// Adds the unlisted keys' weight, and its product with dO.v - delta.
template <class T>
void direct_sums(const AttentionParams& p, const DirectQuery<T>& q, T* total, T* slope) {
  const bool quadratic = p.low_rank == LowRank::kQuadratic;
  for_each_unlisted(p, q.b, 0, q.end, q.key, q.listed, [&](const int32_t* key, int64_t n) {
    T e[kChunk], t[kChunk], g[kChunk], sum = T(0), moment = T(0);
    direct_terms<T>(p, q.b, q.kv, key, n, q.log, q.z, e, t);
    dot_rows<T>(n, listed<T>(p.v, q.b, q.kv, key), q.d_out, p.value_pad, g);
    for (int64_t i = 0; i < n; ++i) {
      const T half = t[i] * T(0.5) + T(1), weight = e[i] * (quadratic ? half * half : t[i]);
      sum += weight, moment += weight * (g[i] - q.delta);
    }
    *total += sum, *slope += moment;
  });
}

// Calls visit(key, n, weight, dt) with weights and gradients by x.y of the unlisted keys among [begin, end).
template <class T, class Visit>
SB_INLINE void direct_gradients(const AttentionParams& p, const DirectQuery<T>& q, int64_t begin, int64_t end,
                                const Visit& visit) {
  const bool quadratic = p.low_rank == LowRank::kQuadratic;
  for_each_unlisted(p, q.b, begin, end < q.end ? end : q.end, q.key, q.listed, [&](const int32_t* key, int64_t n) {
    T e[kChunk], t[kChunk], g[kChunk], weight[kChunk], dt[kChunk];
    direct_terms<T>(p, q.b, q.kv, key, n, q.log, q.z, e, t);
    dot_rows<T>(n, listed<T>(p.v, q.b, q.kv, key), q.d_out, p.value_pad, g);
    for (int64_t i = 0; i < n; ++i) {
      const T half = t[i] * T(0.5) + T(1), scaled = e[i] * q.inverse;
      weight[i] = scaled * (quadratic ? half * half : t[i]);
      dt[i] = scaled * (g[i] - q.delta) * (quadratic ? half : T(1));
    }
    visit(key, n, weight, dt);
  });
}

// The whole forward pass of one lane: its list is collected again, its stabiliser is that of what it sees. Leaves the
// sum of weights in `total` and sum of weight v in `out`; returns the stabiliser.
template <class T, int kLanes>
T forward_direct(const AttentionParams& p, const Group<T, kLanes>& g, int lane, const KeyList& list, T* q, T* z, T* S,
                 T* total, T* out) {
  constexpr int N = kWidth<T>;
  const bool quadratic = p.low_rank == LowRank::kQuadratic;
  const auto kappa = log_scales<T>(p.kappa, g.b, g.kv);
  const int64_t first = p.rows[g.b].k_first, chunk = g.chunk_first - first, edge = chunk + int64_t(g.edge[lane]);
  const auto unlisted = [&](const auto& visit) {
    if (!p.is_causal) return for_each_unlisted(p, g.b, 0, edge + 1, list.key, list.n01, visit);
    for_each_unlisted(p, g.b, 0, chunk, list.key + list.n0, list.n01 - list.n0, visit);
    for_each_unlisted(p, g.b, chunk, edge + 1, list.key, list.n0, visit);
  };
  for (int64_t e = 0; e < p.head_pad; ++e) q[e] = g.q[lane][e] * T(1.44269504088896340736 * p.scale);
  direct_row<T>(p, g.x[lane], z);
  dot_rows<T>(list.n01, listed<T>(p.k, g.b, g.kv, list.key), q, p.head_pad, S);
  T c = T(-1e30);
  for (int64_t i = 0; i < list.n01; ++i) {
    if (list.key[i] - first > edge) S[i] = T(-1e30);
    c = S[i] > c ? S[i] : c;
  }
  unlisted([&](const int32_t* key, int64_t n) {
    for (int64_t i = 0; i < n; ++i) c = g.rho[lane] + kappa(key[i]) > c ? g.rho[lane] + kappa(key[i]) : c;
  });
  for (int64_t i = 0; i < list.n01; i += N) store<T, N>(S + i, exp2v<N>(load<T, N>(S + i) - c));
  *total = sum_short<T>(S, list.n01);
  combine_rows<T>(list.n01, S, listed<T>(p.v, g.b, g.kv, list.key), p.value_pad, out);
  unlisted([&](const int32_t* key, int64_t n) {
    T e[kChunk], t[kChunk];
    direct_terms<T>(p, g.b, g.kv, key, n, g.rho[lane] - c, z, e, t);
    T sum = T(0);
    for (int64_t i = 0; i < n; ++i) {
      const T half = t[i] * T(0.5) + T(1);
      sum += e[i] *= quadratic ? half * half : t[i];
    }
    *total += sum;
    add_rows<T>(n, e, listed<T>(p.v, g.b, g.kv, key), p.value_pad, out);
  });
  return c;
}
