// The forward pass of one group of queries (algorithm note, sections 1 and 5).

// exp(kappa_j - kappa_ref) of keys [begin, end) of a list.
template <class T>
SB_INLINE void decay_of_keys(const LogScales<T>& kappa, T kappa_ref, const int32_t* key, int64_t begin, int64_t end,
                             T* decay) {
  constexpr int N = kWidth<T>;
  for (int64_t i = begin; i < end; ++i) decay[i] = kappa(key[i]) - kappa_ref;
  for (int64_t i = begin; i < end; i += N) store<T, N>(decay + i, exp2v<N>(load<T, N>(decay + i)));
}

// exp(rho + kappa_ref - log) of each lane, 0 where state_log says that no state is needed. The exponent is formed in
// double: what it is off by scales the whole complement of a query against its exact part.
template <class T, int kLanes>
SB_INLINE void state_weights(const T* rho, T kappa_ref, const T* log, const T* state_log, T* weight) {
  constexpr int N = kLanes < kWidth<double> ? kLanes : kWidth<double>;
  double exponent[kLanes];
  for (int lane = 0; lane < kLanes; ++lane)
    exponent[lane] = state_log[lane] <= T(-1e29) ? -1e30 : double(rho[lane]) + double(kappa_ref) - double(log[lane]);
  for (int lane = 0; lane < kLanes; lane += N) {
    const auto power = exp2v<N>(load<double, N>(exponent + lane));
    SB_EACH (i, N) weight[lane + i] = T(power[i]);
  }
}

// log2 of each lane, in double; a full library function where double is what the kernel computes in.
template <class T, int kLanes>
SB_INLINE void log2_lanes(const T* x, T* y) {
  if constexpr (sizeof(T) == sizeof(double)) {
    for (int lane = 0; lane < kLanes; ++lane) y[lane] = __builtin_log2(x[lane]);
  } else {
    constexpr int N = kLanes < kWidth<double> ? kLanes : kWidth<double>;
    for (int lane = 0; lane < kLanes; lane += N) {
      typename Vec<double, N>::type v;
      SB_EACH (i, N) v[i] = double(x[lane + i]);
      v = log2v<N>(v);
      SB_EACH (i, N) y[lane + i] = T(v[i]);
    }
  }
}

// K(x, y) of the low-rank kernel and its derivative from t = x.y.
template <class V>
SB_INLINE V kernel_of(bool quadratic, V t) {
  const V half = t * decltype(t[0] + t[0])(0.5) + decltype(t[0] + t[0])(1);
  return quadratic ? half * half : t;
}

template <class E, int kLanes>
struct ForwardScratch {
  typedef SumOf<E> T;
  StepOf<E>*qT, *W;       // [d][lanes] and weights [pairs][lanes], both in steps
  T *xT, *S, *L, *F, *O;  // [map][lanes], [pairs][lanes] twice, [features][lanes], [lanes][dv]
  T *decay, *direct;      // [pairs] (of every query that has its own list), and rows of one query: [d], [map], [pairs]
  T c[kLanes], exact[kLanes], removed[kLanes],
      state_log[kLanes],   // stabiliser; sums of exact weight and of L taken back; log2 scale of the state or -1e30
      weight[kLanes];      // exp of the state's log scale - c
  KeyList lists[kLanes];  // of queries that do not share one
};

// 4. O = W V.
template <class E, int kLanes>
SB_INLINE void combine_weights(const AttentionParams& p, const Group<E, kLanes>& g, const KeyList& list,
                               ForwardScratch<E, kLanes>& s) {
  const auto v_rows = listed<E>(p.v, g.b, g.kv, list.key);
  const StepOf<E>* W = weight_steps<E, kLanes>(list.n, s.S, s.W);
  const DenseRows<SumOf<E>> to{s.O, p.value_pad};
  if (p.index)
    combine_scattered<E>(kLanes, p.value_pad, list.n, W, v_rows, p.k_tokens > kNearKeys, g.zero_row, to);
  else
    combine_listed<E, false>(kLanes, p.value_pad, list.n, W, v_rows, g.zero_row, to);
}

// Stabiliser and weights of a dense list.
template <class E, int kLanes>
SB_INLINE void dense_weights(const AttentionParams& p, const Group<E, kLanes>& g, const KeyList& list,
                             const LogScales<SumOf<E>>& kappa, const SumOf<E>* S, ForwardScratch<E, kLanes>& s) {
  typedef SumOf<E> T;
  constexpr int N = kLanes < kWidth<T> ? kLanes : kWidth<T>, NQ = kLanes / N;
  typedef typename Vec<T, N>::type V;
  const bool quadratic = p.low_rank == LowRank::kQuadratic;
  const ScoreFactor<E> score(p);
  const V none = splat<T, N>(T(-1e30));
  for (int v = 0; v < NQ; ++v) {
    V c = none, exact{};
    for (int64_t i = 0; i < list.n; ++i) {
      const DenseKey<E, kLanes, N> key(g, list, kappa, score, S, i, v);
      c = max_lanes(c, key.exponent);
    }
    for (int64_t begin = 0; begin < list.n; begin += kShort) {
      V sum{};
      for (int64_t i = begin; i < list.n && i < begin + kShort; ++i) {
        const DenseKey<E, kLanes, N> key(g, list, kappa, score, S, i, v);
        const V e = exp2v<N>(key.exponent - c), t = load<T, N>(s.L + i * kLanes + v * N);
        const V weight = key.listed ? e : e * kernel_of(quadratic, t);
        sum += weight;
        store<T, N>(s.S + i * kLanes + v * N, weight);
      }
      exact += sum;
    }
    store<T, N>(s.c + v * N, c), store<T, N>(s.exact + v * N, exact), store<T, N>(s.removed + v * N, V{});
    store<T, N>(s.state_log + v * N, none), store<T, N>(s.weight + v * N, V{});
  }
}

// All queries of the group share one list: lanes are queries.
template <class E, int kLanes>
SB_INLINE void forward_shared(const AttentionParams& p, const Group<E, kLanes>& g, const KeyList& list,
                              const LogScales<SumOf<E>>& kappa, SumOf<E> kappa_ref, ForwardScratch<E, kLanes>& s,
                              Upcoming<E, kLanes, false>& upcoming) {
  typedef SumOf<E> T;
  constexpr int N = kLanes < kWidth<T> ? kLanes : kWidth<T>, NQ = kLanes / N;
  typedef typename Vec<T, N>::type V;
  const bool quadratic = p.low_rank == LowRank::kQuadratic;
  const V none = splat<T, N>(T(-1e30));
  const int64_t chunk_first = g.chunk_first;
  const auto k = listed<E>(p.k, g.b, g.kv, list.key);
  const ScoreFactor<E> score(p);

  const KeptScores<T> kept = kept_scores<T, kLanes>(p, g.b, g.h, g.first_slot, list.n01);
  T* const S = kept.data ? kept.data : s.S;

  // 1. Scores of the listed keys and x.y where L is needed.
  dot_lanes<E, N, kLanes>(list.n01, p.head_dim, k, s.qT, S, upcoming,
                          upcoming.left() * kSliceRows<T, kLanes> / (list.n01 + 1) + 1);
  upcoming.fetch(upcoming.left());
  const int64_t l_begin = first_mapped(list);
  if (p.low_rank != LowRank::kNone) {
    const auto y = listed<T>(p.y, g.b, g.kv, list.key + l_begin);
    gemm<T, N, false>(list.n - l_begin, kLanes, p.rank, AcrossRows<decltype(y)>{y}, DenseRows<const T>{s.xT, kLanes},
                      DenseRows<T>{s.L + l_begin * kLanes, kLanes});
  }

  // 2. The stabiliser: each query's largest exponent among what it sees.
  V rho[NQ], edge[NQ], c[NQ], exact[NQ], removed[NQ], a[NQ];
  SB_EACH (v, NQ) {
    rho[v] = load<T, N>(g.rho + v * N), edge[v] = load<T, N>(g.edge + v * N);
    const V state = list.complement ? rho[v] + kappa_ref : none;
    store<T, N>(s.state_log + v * N, state);
    c[v] = state, exact[v] = V{}, removed[v] = V{};
  }
  if (list.lanes) {
    dense_weights<E, kLanes>(p, g, list, kappa, S, s);
    return combine_weights<E, kLanes>(p, g, list, s);
  }
  for (int64_t i = 0; i < list.n0; ++i) {
    const V at = splat<T, N>(T(list.key[i] - chunk_first));
    SB_EACH (v, NQ) c[v] = max_lanes(c[v], at <= edge[v] ? score(load<T, N>(S + i * kLanes + v * N)) : none);
  }
  for (int64_t i = list.n0; i < list.n01; ++i)
    SB_EACH (v, NQ) c[v] = max_lanes(c[v], score(load<T, N>(S + i * kLanes + v * N)));
  for (int64_t i = list.n01; i < list.n; ++i) {
    const V at = splat<T, N>(T(list.key[i] - chunk_first));
    SB_EACH (v, NQ) c[v] = max_lanes(c[v], at <= edge[v] ? rho[v] + kappa(list.key[i]) : none);
  }

  // 3. Weights, into S for listed keys and behind them for the rest.
  SB_EACH (v, NQ) store<T, N>(s.c + v * N, c[v]);
  state_weights<T, kLanes>(g.rho, kappa_ref, s.c, s.state_log, s.weight);
  SB_EACH (v, NQ) a[v] = load<T, N>(s.weight + v * N);
  if (list.complement) decay_of_keys<T>(kappa, kappa_ref, list.key, list.n0, list.n01, s.decay);
  for (int64_t begin = 0; begin < list.n; begin += kShort) {
    const int64_t end = begin + kShort < list.n ? begin + kShort : list.n;
    V sum[NQ] = {}, taken[NQ] = {};
    int64_t i = begin;
    for (; i < list.n0 && i < end; ++i) {
      const V at = splat<T, N>(T(list.key[i] - chunk_first));
      SB_EACH (v, NQ) {
        const int64_t o = i * kLanes + v * N;
        const V weight = at <= edge[v] ? exp2v<N>(score(load<T, N>(S + o)) - c[v]) : V{};
        sum[v] += weight;
        store<T, N>(s.S + o, weight);
      }
    }
    const int64_t end01 = list.n01 < end ? list.n01 : end;
    if (list.complement)
      for (; i < end01; ++i)
        SB_EACH (v, NQ) {
          const int64_t o = i * kLanes + v * N;
          const V weight = exp2v<N>(score(load<T, N>(S + o)) - c[v]);
          const V u = a[v] * s.decay[i] * kernel_of(quadratic, load<T, N>(s.L + o));
          sum[v] += weight;
          taken[v] += u;
          store<T, N>(s.S + o, weight - u);
        }
    else
      for (; i < end01; ++i)
        SB_EACH (v, NQ) {
          const int64_t o = i * kLanes + v * N;
          const V weight = exp2v<N>(score(load<T, N>(S + o)) - c[v]);
          sum[v] += weight;
          store<T, N>(s.S + o, weight);
        }
    for (; i < end; ++i) {
      const V at = splat<T, N>(T(list.key[i] - chunk_first));
      const T kj = kappa(list.key[i]);
      SB_EACH (v, NQ) {
        const V u = exp2v<N>((rho[v] - c[v]) + kj) * kernel_of(quadratic, load<T, N>(s.L + i * kLanes + v * N));
        const V weight = at <= edge[v] ? u : V{};
        sum[v] += weight;
        store<T, N>(s.S + i * kLanes + v * N, weight);
      }
    }
    SB_EACH (v, NQ) exact[v] += sum[v], removed[v] += taken[v];
  }
  SB_EACH (v, NQ) {
    store<T, N>(s.exact + v * N, exact[v]);
    store<T, N>(s.removed + v * N, removed[v]);
  }

  combine_weights<E, kLanes>(p, g, list, s);
}

// Every query has its own list: lanes are keys. All queries of the group take one step before any takes the next: their
// lists overlap, and what one has read of K, or of V, is still in the first level of cache for its neighbour.
template <class E, int kLanes>
SB_INLINE void forward_single(const AttentionParams& p, const Group<E, kLanes>& g, const LogScales<SumOf<E>>& kappa,
                              SumOf<E> kappa_ref, ForwardScratch<E, kLanes>& s) {
  typedef SumOf<E> T;
  constexpr int N = kWidth<T>;
  const bool quadratic = p.low_rank == LowRank::kQuadratic;
  const auto for_each_query = [&](const auto& visit) __attribute__((always_inline)) {
    for (int lane = 0; lane < kLanes; ++lane)
      if (g.query[lane] >= 0)
        visit(lane, s.lists[lane], s.S + lane * p.max_pairs, s.L + lane * p.max_pairs, s.decay + lane * p.max_pairs);
  };
  // Where the scores of a query are: kept, or where its weights are going to be.
  const auto scores_of = [&](int lane, T* W) __attribute__((always_inline)) {
    const KeptScores<T> kept = kept_scores<T, 1>(p, g.b, g.h, g.first_slot + lane, s.lists[lane].n01);
    return kept.data ? kept.data : W;
  };

  // 1. S = q.k of the listed keys.
  for_each_query([&](int lane, KeyList& list, T* W, T*, T*) {
    collect_pairs(p, g.b, g.h, g.first_slot + lane, g.first_slot + lane, list);
    scores_of_query<E>(p, g.q[lane], list.n01, listed<E>(p.k, g.b, g.kv, list.key), s.qT, scores_of(lane, W));
  });

  // 2. x.y where L is needed, and the stabiliser. The exponent is kappa_j relative to the state's (a common factor then
  // follows), or rho + kappa_j.
  T* x = s.xT;
  for_each_query([&](int lane, const KeyList& list, T* W, T* L, T* exponent) {
    const T* S = scores_of(lane, W);
    const int64_t l_begin = first_mapped(list), l_count = p.low_rank == LowRank::kNone ? 0 : list.n - l_begin;
    if (l_count) {
      for (int64_t i = 0; i < p.map_pad; ++i) x[i] = i < p.rank ? g.x[lane][i] : T(0);
      dot_rows<T>(l_count, listed<T>(p.y, g.b, g.kv, list.key + l_begin), x, p.map_pad, L);
      for (int64_t i = l_begin; i < list.n01; ++i) exponent[i - l_begin] = kappa(list.key[i]) - kappa_ref;
      for (int64_t i = list.n01; i < list.n; ++i) exponent[i - l_begin] = g.rho[lane] + kappa(list.key[i]);
    }
    T c = list.complement ? g.rho[lane] + kappa_ref : T(-1e30);
    s.state_log[lane] = c;
    for (int64_t i = 0; i < list.n01; ++i) c = S[i] > c ? S[i] : c;
    for (int64_t i = list.n01 - l_begin; i < l_count; ++i) c = exponent[i] > c ? exponent[i] : c;
    for (int64_t i = list.n01; i < list.n; ++i) exponent[i - l_begin] = (g.rho[lane] - c) + kappa(list.key[i]);
    s.c[lane] = c;
  });

  // 3. Weights, into W.
  state_weights<T, kLanes>(g.rho, kappa_ref, s.c, s.state_log, s.weight);
  for_each_query([&](int lane, const KeyList& list, T* W, T* L, const T* exponent) {
    const int64_t l_begin = first_mapped(list), l_count = p.low_rank == LowRank::kNone ? 0 : list.n - l_begin;
    const T a = s.weight[lane], c = s.c[lane], *S = scores_of(lane, W);
    for (int64_t i = 0; i < list.n01; i += N) store<T, N>(W + i, exp2v<N>(load<T, N>(S + i) - c));
    T exact = sum_short<T>(W, list.n01);
    for (int64_t i = 0; i < l_count; i += N)
      store<T, N>(L + i, exp2v<N>(load<T, N>(exponent + i)) * kernel_of(quadratic, load<T, N>(L + i)));
    s.removed[lane] = a * sum_short<T>(L, list.n01 - l_begin);
    for (int64_t i = l_begin; i < list.n01; ++i) W[i] -= a * L[i - l_begin];
    exact += sum_short<T>(L + list.n01 - l_begin, l_count - (list.n01 - l_begin));
    for (int64_t i = list.n01; i < list.n; ++i) W[i] = L[i - l_begin];
    s.exact[lane] = exact;
  });

  // 4. O = W V.
  for_each_query([&](int lane, const KeyList& list, const T* W, T*, T*) {
    combine_rows<E>(list.n, W, listed<E>(p.v, g.b, g.kv, list.key), p.value_pad, s.O + lane * p.value_pad);
  });
}

// One group: pairs, then the state's part, then the common normaliser.
template <class E, int kLanes, bool kShared>
void forward_group(const AttentionParams& p, const Tile<E, kLanes>& tile, ForwardScratch<E, kLanes>& s,
                   Upcoming<E, kLanes, false>& upcoming) {
  typedef SumOf<E> T;
  constexpr int N = kLanes < kWidth<T> ? kLanes : kWidth<T>;
  const Group<E, kLanes>& g = tile.g;
  const bool mapped = p.low_rank != LowRank::kNone;
  const auto kappa = log_scales<T>(p.kappa, g.b, g.kv);
  const State<T> state = mapped ? state_slot<T>(p, p.state, g.b * p.kv_heads + g.kv, g.slot) : State<T>{};
  const T kappa_ref = mapped ? *state.kappa_ref : T(0);
  if constexpr (kShared) {
    queries_in_lanes<E, kLanes>(p, g, s.qT);
    if (mapped) transpose_rows<T, kLanes>(g.x, p.rank, T(1), s.xT);
    forward_shared<E, kLanes>(p, g, tile.list, kappa, kappa_ref, s, upcoming);
  } else {
    for (int lane = 0; lane < kLanes; ++lane)
      s.c[lane] = s.state_log[lane] = T(-1e30), s.weight[lane] = s.exact[lane] = s.removed[lane] = T(0);
    forward_single<E, kLanes>(p, g, kappa, kappa_ref, s);
    if (mapped) transpose_rows<T, kLanes>(g.x, p.rank, T(1), s.xT);
  }

  // 5. The complement: F(x) H and F(x).hz in each query's own scale.
  T total[kLanes];
  bool any = false;
  for (int lane = 0; lane < kLanes; ++lane) total[lane] = T(0), any |= !(s.state_log[lane] <= T(-1e29));
  if (any) {
    expand_features<T, kLanes>(p.low_rank, p.rank, s.xT, s.weight, s.F);
    for (int v = 0; v < kLanes; v += N)
      for (int64_t begin = 0; begin < p.features; begin += kShort) {
        typename Vec<T, N>::type sum{};
        for (int64_t f = begin; f < p.features && f < begin + kShort; ++f)
          sum += load<T, N>(s.F + f * kLanes + v) * state.hz[f];
        store<T, N>(total + v, load<T, N>(total + v) + sum);
      }
    gemm<T, kWidth<T>, true>(kLanes, p.value_pad, p.features, Strided<T>{s.F, 1, kLanes},
                             DenseRows<const T>{state.H, p.value_pad}, DenseRows<T>{s.O, p.value_pad});
  }

  // 6. One normaliser. In exact arithmetic the complement's weight is not negative: where rounding made it so, the
  // bound den >= exact weight holds. A row without weight is zero; one that holds a NaN stays NaN.
  T den[kLanes], log_den[kLanes];
  bool skip[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    den[lane] = T(1), skip[lane] = lane >= g.lanes || g.query[lane] < 0;
    if (skip[lane]) continue;
    const T complement = total[lane] - s.removed[lane];
    den[lane] = s.exact[lane] + (complement < T(0) ? T(0) : complement);
    if (!(s.removed[lane] > T(p.cancelling) * den[lane])) continue;
    if (p.cancelled) {
      p.cancelled[(g.b * p.q_heads + g.h) * p.q_tokens + g.query[lane]] = 1;
      skip[lane] = true;
      continue;
    }
    if constexpr (sizeof(T) == sizeof(double))
      s.c[lane] =
          forward_direct<T, kLanes>(p, g, lane, kShared ? tile.list : s.lists[lane], s.direct, s.direct + p.head_pad,
                                    s.direct + p.head_pad + p.map_pad, &den[lane], s.O + lane * p.value_pad);
  }
  log2_lanes<T, kLanes>(den, log_den);
  T* lse = static_cast<T*>(p.lse) + (g.b * p.q_heads + g.h) * p.q_tokens;
  for (int lane = 0; lane < g.lanes; ++lane) {
    if (skip[lane]) continue;
    constexpr int NV = kWidth<T>;
    E* out = p.out.at<E>(g.b, g.h, g.query[lane]);
    const T *O = s.O + lane * p.value_pad, d = den[lane];
    lse[g.query[lane]] = d == T(0) ? -T(__builtin_inf()) : T(0.69314718055994530942) * (s.c[lane] + log_den[lane]);
    // Divided, not multiplied with the rounded 1 / den: that error would be the same in every element and add up in
    // dO.o.
    if (d > T(1e-30) && d < T(1e30)) {
      const T inverse = T(1) / d;
      for (int64_t e = 0; e < p.value_pad; e += NV)
        store_narrow<E, NV>(out + e, divide<T, NV>(load<T, NV>(O + e), d, inverse));
    } else {
      for (int64_t e = 0; e < p.value_pad; e += NV)
        store_narrow<E, NV>(out + e, d == T(0) ? typename Vec<T, NV>::type{} : load<T, NV>(O + e) / d);
    }
  }
}

template <class E, int kLanes, bool kShared>
SB_INLINE void plan_forward(const AttentionParams& p, Arena& arena, ForwardScratch<E, kLanes>& s) {
  typedef SumOf<E> T;
  s.qT = arena.take<StepOf<E>>(p.head_pad * kLanes);
  s.W = arena.take<StepOf<E>>(kPaired<E> ? p.max_pairs * kLanes : 0);
  s.xT = arena.take<T>(p.map_pad * kLanes);
  s.S = arena.take<T>(p.max_pairs * kLanes);
  s.L = arena.take<T>(p.max_pairs * kLanes);
  s.F = arena.take<T>(p.features_pad() * kLanes);
  s.O = arena.take<T>(p.value_pad * kLanes);
  const int64_t lists = kShared ? 0 : kLanes;
  for (int64_t i = 0; i < lists; ++i) s.lists[i].key = arena.take<int32_t>(p.max_pairs);
  s.decay = arena.take<T>(p.max_pairs * (kShared ? 1 : kLanes));
  s.direct = arena.take<T>(p.head_pad + p.map_pad + p.max_pairs);
}

template <class E, int kLanes, bool kShared, bool kDense>
struct ForwardVisitor {
  static constexpr bool kLists = true;
  const AttentionParams& p;
  ForwardScratch<E, kLanes> s;
  Upcoming<E, kLanes, false> upcoming;
  DenseLists<kDense> lists{};
  void operator()(Tile<E, kLanes>& tile, const Tile<E, kLanes>* next) {
    if constexpr (kDense) collect_dense<E, kLanes>(p, tile, lists.lanes);
    if constexpr (kShared) upcoming.look_ahead(tile, next);
    forward_group<E, kLanes, kShared>(p, tile, s, upcoming);
  }
};

template <class E, int kLanes, bool kShared, bool kDense = false>
int64_t forward_unit_of(const AttentionParams& p, int64_t b, int64_t h, int64_t unit, void* scratch,
                        const void* zero_row) {
  Arena arena{static_cast<char*>(scratch), 0};
  ForwardVisitor<E, kLanes, kShared, kDense> visitor{p, {}, Upcoming<E, kLanes, false>(p)};
  plan_forward<E, kLanes, kShared>(p, arena, visitor.s);
  Tile<E, kLanes> tile[2];
  plan_tiles<E, kLanes>(p, arena, tile);
  if (!scratch) return arena.used;
  for_each_group<E, kLanes, kShared && !kDense>(p, b, h, unit, zero_row, tile, visitor);
  return arena.used;
}

// Forward of the queries of one unit. With scratch == nullptr it only returns the bytes of scratch it needs.
template <class E>
int64_t forward_unit(const AttentionParams& p, int64_t b, int64_t h, int64_t unit, void* scratch,
                     const void* zero_row) {
  if (p.block_q == 1) {
    const auto dense = [&] { return forward_unit_of<E, 16, true, true>(p, b, h, unit, scratch, zero_row); };
    const auto single = [&] { return forward_unit_of<E, 16, false>(p, b, h, unit, scratch, zero_row); };
    if (scratch) return p.is_dense(p.rows[b]) ? dense() : single();
    const int64_t of_dense = dense(), of_single = single();
    return of_dense > of_single ? of_dense : of_single;
  }
  if (p.block_q <= 8) return forward_unit_of<E, 8, true>(p, b, h, unit, scratch, zero_row);
  if (p.block_q < 32) return forward_unit_of<E, 16, true>(p, b, h, unit, scratch, zero_row);
  return forward_unit_of<E, 32, true>(p, b, h, unit, scratch, zero_row);
}
