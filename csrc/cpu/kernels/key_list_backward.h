// What the backward pass does with the pairs of a group (attention_backward.h has the steps): weights and dO.v, and,
// once they are balanced, their gradients.

template <class E, int kLanes>
struct BackwardScratch {
  typedef SumOf<E> T;
  StepOf<E>*qT, *gT;             // [d][lanes], dO as [dv][lanes], in steps
  StepOf<E>* W;                  // weights [pairs][lanes] in steps
  const T* wide_gT;              // dO as [dv][lanes]
  T *wide, *wide_rows;           // room for it, and for dO as [lanes][dv]
  T *P, *g, *xT;                 // [pairs][lanes] twice, [map][lanes]
  T *exponent, *row, *net;       // [pairs], one row of the single form, weights before they are rescaled [pairs][lanes]
  T *F, *gF, *dQ, *dX;           // [features][lanes] twice, [lanes][d], [map][lanes]
  T lse[kLanes], d_lse[kLanes];  // log2 lse, dlse
  T delta[kLanes];               // dO.o, then delta - dlse
  T state_log[kLanes];           // log2 scale of the state, or -1e30
  T exact[kLanes], removed[kLanes], slope[kLanes];     // sums of P, of U taken back, and of weight (dO.v - dO.o)
  T correction[kLanes], inverse[kLanes], den[kLanes];  // delta - dO.o - dlse; 1 / sum of weights, and that sum
  T weight[kLanes];                                    // exp of the state's log scale - lse
  const E *d_out[kLanes], *out[kLanes];
};

// Step 2 of a dense list: P, which is zero where a query does not list the key, dU/dt, zero where it does, and g.
template <class E, int kLanes>
SB_INLINE void weigh_dense(const AttentionParams& p, const Group<E, kLanes>& g, const KeyList& list,
                           const LogScales<SumOf<E>>& kappa, const SumOf<E>* S, BackwardScratch<E, kLanes>& s,
                           PairRecord<E>& r) {
  typedef SumOf<E> T;
  constexpr int N = kLanes < kWidth<T> ? kLanes : kWidth<T>, NQ = kLanes / N;
  typedef typename Vec<T, N>::type V;
  const bool quadratic = p.low_rank == LowRank::kQuadratic;
  const ScoreFactor<E> score(p);
  for (int v = 0; v < NQ; ++v) {
    const V lse = load<T, N>(s.lse + v * N), delta = load<T, N>(s.delta + v * N);
    V exact{}, slope{};
    for (int64_t begin = 0; begin < list.n; begin += kShort) {
      V sum{}, moment{};
      for (int64_t i = begin; i < list.n && i < begin + kShort; ++i) {
        const int64_t o = i * kLanes + v * N;
        const DenseKey<E, kLanes, N> key(g, list, kappa, score, S, i, v);
        const V grad = load<T, N>(s.g + o) - delta;
        const V e = exp2v<N>(key.exponent - lse), t = load<T, N>(r.dt + o), half = t * T(0.5) + T(1);
        const V P = key.listed ? e : V{}, weight = key.listed ? e : e * kernel_of(quadratic, t);
        store<T, N>(r.dt + o, key.listed ? V{} : quadratic ? e * half : e);
        sum += weight, moment += weight * grad;
        store<T, N>(s.P + o, P), store<T, N>(s.net + o, weight), store<T, N>(s.g + o, grad);
      }
      exact += sum, slope += moment;
    }
    store<T, N>(s.exact + v * N, exact), store<T, N>(s.removed + v * N, V{}), store<T, N>(s.slope + v * N, slope);
  }
}

// Steps 1 and 2 for queries that share a list: P, U and g before they are rescaled.
template <class E, int kLanes>
SB_INLINE void weigh_shared(const AttentionParams& p, const Group<E, kLanes>& g, const KeyList& list,
                            const LogScales<SumOf<E>>& kappa, SumOf<E> kappa_ref, BackwardScratch<E, kLanes>& s,
                            PairRecord<E>& r, Upcoming<E, kLanes, true>& upcoming) {
  typedef SumOf<E> T;
  constexpr int N = kLanes < kWidth<T> ? kLanes : kWidth<T>, NQ = kLanes / N;
  typedef typename Vec<T, N>::type V;
  const bool quadratic = p.low_rank == LowRank::kQuadratic;
  for (int64_t i = 0; i < list.n; ++i) r.key[i] = list.key[i];
  const int64_t chunk_first = g.chunk_first;
  const int64_t l_begin = first_mapped(list);
  r.lanes = kLanes, r.directs = 0, r.n0 = list.n0, r.n01 = list.n01, r.n = list.n, r.l_begin = l_begin;
  r.first_key = first_key(list), r.last_key = last_key(list);
  const auto k = listed<E>(p.k, g.b, g.kv, list.key), v_rows = listed<E>(p.v, g.b, g.kv, list.key);
  const ScoreFactor<E> score(p);
  if constexpr (!kPaired<E>) s.P = r.ds, s.g = r.w;  // what becomes of them has the same type
  T *const P = s.P, *const grad_of = s.g;

  // 1. S and x.y as in the forward pass, S from there where it was kept, and dP = V dO.
  const KeptScores<T> kept = kept_scores<T, kLanes>(p, g.b, g.h, g.first_slot, list.n01);
  const T* const S = kept.data ? kept.data : P;
  const int64_t stride = kept.stride, dots = (kept.data ? 0 : list.n01) + list.n;
  const int64_t per_slice = upcoming.left() * kSliceRows<T, kLanes> / (dots + 1) + 1;
  if (!kept.data) {
    queries_in_lanes<E, kLanes>(p, g, s.qT);
    dot_lanes<E, N, kLanes>(list.n01, p.head_dim, k, s.qT, P, upcoming, per_slice);
  }
  if (p.low_rank != LowRank::kNone) {
    const auto y = listed<T>(p.y, g.b, g.kv, list.key + l_begin);
    gemm<T, N, false>(list.n - l_begin, kLanes, p.rank, AcrossRows<decltype(y)>{y}, DenseRows<const T>{s.xT, kLanes},
                      DenseRows<T>{r.dt, kLanes});
  }
  dot_lanes<E, N, kLanes>(list.n, p.value_pad, v_rows, s.gT, grad_of, upcoming, per_slice);
  upcoming.fetch(upcoming.left());

  // 2. P, dP - dO.o into g, dU/dt into dt and the weight into net, with their sums in short chains.
  V rho[NQ], edge[NQ], lse[NQ], delta[NQ], a[NQ], exact[NQ], removed[NQ], slope[NQ];
  SB_EACH (v, NQ) {
    rho[v] = load<T, N>(g.rho + v * N), edge[v] = load<T, N>(g.edge + v * N);
    lse[v] = load<T, N>(s.lse + v * N), delta[v] = load<T, N>(s.delta + v * N);
    const V state = list.complement ? rho[v] + kappa_ref : splat<T, N>(T(-1e30));
    store<T, N>(s.state_log + v * N, state);
    exact[v] = removed[v] = slope[v] = V{};
  }
  state_weights<T, kLanes>(g.rho, kappa_ref, s.lse, s.state_log, s.weight);
  SB_EACH (v, NQ) a[v] = load<T, N>(s.weight + v * N);
  if (list.lanes) return weigh_dense<E, kLanes>(p, g, list, kappa, S, s, r);
  if (list.complement) decay_of_keys<T>(kappa, kappa_ref, list.key, list.n0, list.n01, s.exponent);
  for (int64_t begin = 0; begin < list.n; begin += kShort) {
    const int64_t end = begin + kShort < list.n ? begin + kShort : list.n;
    V sum[NQ] = {}, taken[NQ] = {}, moment[NQ] = {};
    int64_t i = begin;
    for (; i < list.n0 && i < end; ++i) {
      const V at = splat<T, N>(T(list.key[i] - chunk_first));
      SB_EACH (v, NQ) {
        const int64_t o = i * kLanes + v * N;
        const V weight = at <= edge[v] ? exp2v<N>(score(load<T, N>(S + i * stride + v * N)) - lse[v]) : V{};
        const V grad = load<T, N>(grad_of + o) - delta[v];
        sum[v] += weight, moment[v] += weight * grad;
        store<T, N>(P + o, weight), store<T, N>(s.net + o, weight), store<T, N>(grad_of + o, grad);
      }
    }
    const int64_t end01 = list.n01 < end ? list.n01 : end;
    if (list.complement)
      for (; i < end01; ++i)
        SB_EACH (v, NQ) {
          const int64_t o = i * kLanes + v * N;
          const V weight = exp2v<N>(score(load<T, N>(S + i * stride + v * N)) - lse[v]),
                  grad = load<T, N>(grad_of + o) - delta[v];
          T* dt = r.dt + (i - l_begin) * kLanes + v * N;
          const V e = a[v] * s.exponent[i], t = load<T, N>(dt), slope_of_t = e * (t * T(0.5) + T(1));
          const V u = quadratic ? slope_of_t * (t * T(0.5) + T(1)) : e * t, net = weight - u;
          sum[v] += weight, taken[v] += u, moment[v] += net * grad;
          store<T, N>(dt, quadratic ? -slope_of_t : -e);
          store<T, N>(P + o, weight), store<T, N>(s.net + o, net), store<T, N>(grad_of + o, grad);
        }
    else
      for (; i < end01; ++i)
        SB_EACH (v, NQ) {
          const int64_t o = i * kLanes + v * N;
          const V weight = exp2v<N>(score(load<T, N>(S + i * stride + v * N)) - lse[v]),
                  grad = load<T, N>(grad_of + o) - delta[v];
          sum[v] += weight, moment[v] += weight * grad;
          store<T, N>(P + o, weight), store<T, N>(s.net + o, weight), store<T, N>(grad_of + o, grad);
        }
    for (; i < end; ++i) {
      const V at = splat<T, N>(T(list.key[i] - chunk_first));
      const T kj = kappa(list.key[i]);
      SB_EACH (v, NQ) {
        const int64_t o = i * kLanes + v * N;
        T* dt = r.dt + (i - l_begin) * kLanes + v * N;
        const V t = load<T, N>(dt), grad = load<T, N>(grad_of + o) - delta[v];
        const V e = at <= edge[v] ? exp2v<N>((rho[v] - lse[v]) + kj) : V{}, weight = e * kernel_of(quadratic, t);
        sum[v] += weight, moment[v] += weight * grad;
        store<T, N>(dt, quadratic ? e * (t * T(0.5) + T(1)) : e);
        store<T, N>(s.net + o, weight), store<T, N>(grad_of + o, grad);
      }
    }
    SB_EACH (v, NQ) exact[v] += sum[v], removed[v] += taken[v], slope[v] += moment[v];
  }
  SB_EACH (v, NQ) {
    store<T, N>(s.exact + v * N, exact[v]);
    store<T, N>(s.removed + v * N, removed[v]);
    store<T, N>(s.slope + v * N, slope[v]);
  }
}

// Steps 4 and 5: the record's w, ds and dt, then dq and dx.
template <class E, int kLanes>
SB_INLINE void gradients_shared(const AttentionParams& p, const Group<E, kLanes>& g, BackwardScratch<E, kLanes>& s,
                                PairRecord<E>& r) {
  typedef SumOf<E> T;
  constexpr int N = kLanes < kWidth<T> ? kLanes : kWidth<T>, NQ = kLanes / N;
  typedef typename Vec<T, N>::type V;
  V correction[NQ], inverse[NQ], scaled[NQ];
  SB_EACH (v, NQ) {
    correction[v] = load<T, N>(s.correction + v * N), inverse[v] = load<T, N>(s.inverse + v * N);
    scaled[v] = inverse[v] * T(p.scale);
  }
  const auto rescale = [&](int64_t begin, int64_t end, auto listed_pair, auto mapped_pair)
                           __attribute__((always_inline)) {
                             T* dt = r.dt - r.l_begin * kLanes;
                             for (int64_t o = begin * kLanes; o < end * kLanes; o += kLanes)
                               SB_EACH (v, NQ) {
                                 const int64_t at = o + v * N;
                                 const V grad = load<T, N>(s.g + at) - correction[v];
                                 if constexpr (listed_pair) {
                                   const V ds = load<T, N>(s.P + at) * grad * scaled[v];
                                   if constexpr (kPaired<E>) store<T, N>(s.P + at, ds);
                                   store_narrow<E, N>(r.ds + at, ds);
                                 }
                                 if constexpr (mapped_pair)
                                   store<T, N>(dt + at, load<T, N>(dt + at) * grad * inverse[v]);
                                 store_narrow<E, N>(r.w + at, load<T, N>(s.net + at) * inverse[v]);
                               }
                           };
  rescale(0, r.l_begin, Yes{}, No{});
  rescale(r.l_begin, r.n01, Yes{}, Yes{});
  rescale(r.n01, r.n, No{}, Yes{});
  T* dq[kLanes];
  for (int lane = 0; lane < kLanes; ++lane)
    dq[lane] = g.query[lane] < 0 ? s.dQ + lane * p.head_pad : p.dq.at<T>(g.b, g.h, g.query[lane]);
  const StepOf<E>* W;
  if constexpr (kPaired<E>)
    W = weight_steps<E, kLanes>(r.n01, s.P, s.W);
  else
    W = r.ds;
  combine_listed<E, false>(kLanes, p.head_pad, r.n01, W, listed<E>(p.k, g.b, g.kv, r.key), g.zero_row,
                           PointedRows<T>{dq});
  if (p.low_rank != LowRank::kNone) {  // with the column of ones of the quadratic kernel: the sum of dt
    const auto y = listed<T>(p.y, g.b, g.kv, r.key + r.l_begin);
    gemm<T, N, true>(p.rank + (p.low_rank == LowRank::kQuadratic), kLanes, r.n - r.l_begin, DownRows<decltype(y)>{y},
                     DenseRows<const T>{r.dt, kLanes}, DenseRows<T>{s.dX, kLanes});
  }
}

// Where P and dO.v - dO.o of one query with its own list are: in its record, or, where that is bfloat16, beside it.
template <class T>
struct LaneWeights {
  T *P, *g;
};
template <class E, int kLanes>
SB_INLINE LaneWeights<SumOf<E>> weights_of(const AttentionParams& p, const BackwardScratch<E, kLanes>& s, int lane,
                                           const PairRecord<E>& r) {
  if constexpr (kPaired<E>)
    return {s.P + lane * p.max_pairs, s.g + lane * p.max_pairs};
  else
    return {r.ds, r.w};
}

// The same steps for queries with lists of their own, a record each: lanes are keys, and all queries take one step
// before any takes the next, as in the forward pass.
template <class E, int kLanes>
SB_INLINE void weigh_single(const AttentionParams& p, const Group<E, kLanes>& g, const LogScales<SumOf<E>>& kappa,
                            SumOf<E> kappa_ref, BackwardScratch<E, kLanes>& s, PairRecord<E>* records) {
  typedef SumOf<E> T;
  constexpr int N = kWidth<T>;
  typedef typename Vec<T, N>::type V;
  const bool quadratic = p.low_rank == LowRank::kQuadratic;
  const auto for_each_query = [&](const auto& visit) __attribute__((always_inline)) {
    for (int lane = 0; lane < kLanes; ++lane)
      if (g.query[lane] >= 0) visit(lane, records[lane], weights_of<E, kLanes>(p, s, lane, records[lane]));
  };

  // 1. S, then dP = V dO.
  for_each_query([&](int lane, PairRecord<E>& r, const LaneWeights<T>& w) {
    KeyList list{r.key, 0, 0, 0, false};
    collect_pairs(p, g.b, g.h, g.first_slot + lane, g.first_slot + lane, list);
    r.n0 = list.n0, r.n01 = list.n01, r.n = list.n, r.l_begin = list.complement ? list.n0 : list.n01;
    r.first_key = first_key(list), r.last_key = last_key(list);
    r.q[0] = g.q[lane], r.d_out[0] = s.d_out[lane], r.x[0] = g.x[lane];
    s.state_log[lane] = list.complement ? g.rho[lane] + kappa_ref : T(-1e30);
    if (!kept_scores<T, 1>(p, g.b, g.h, g.first_slot + lane, r.n01).data)
      scores_of_query<E>(p, g.q[lane], r.n01, listed<E>(p.k, g.b, g.kv, r.key), s.qT, w.P);
  });
  for_each_query([&](int lane, PairRecord<E>& r, const LaneWeights<T>& w) {
    dot_rows<E>(r.n, listed<E>(p.v, g.b, g.kv, r.key), s.d_out[lane], p.value_pad, w.g);
  });
  state_weights<T, kLanes>(g.rho, kappa_ref, s.lse, s.state_log, s.weight);

  // 2. P into ds, dP - dO.o into w, dU/dt into dt and the weight into net.
  for_each_query([&](int lane, PairRecord<E>& r, const LaneWeights<T>& w) {
    const int64_t l_begin = r.l_begin, l_count = p.low_rank == LowRank::kNone ? 0 : r.n - l_begin;
    T *exponent = s.exponent, *net = s.net + lane * p.max_pairs;
    if (l_count) {
      T* x = s.row;
      for (int64_t a = 0; a < p.map_pad; ++a) x[a] = a < p.rank ? g.x[lane][a] : T(0);
      dot_rows<T>(l_count, listed<T>(p.y, g.b, g.kv, r.key + l_begin), x, p.map_pad, r.dt);
      for (int64_t i = l_begin; i < r.n01; ++i) exponent[i - l_begin] = kappa(r.key[i]) - kappa_ref;
      for (int64_t i = r.n01; i < r.n; ++i) exponent[i - l_begin] = (g.rho[lane] - s.lse[lane]) + kappa(r.key[i]);
    }
    const T a = s.weight[lane];
    const KeptScores<T> kept = kept_scores<T, 1>(p, g.b, g.h, g.first_slot + lane, r.n01);
    const T* S = kept.data ? kept.data : w.P;
    for (int64_t i = 0; i < r.n01; i += N) store<T, N>(w.P + i, exp2v<N>(load<T, N>(S + i) - s.lse[lane]));
    for (int64_t i = 0; i < l_count; i += N) {  // U in exponent, dU/dt in dt
      const V e = exp2v<N>(load<T, N>(exponent + i)), t = load<T, N>(r.dt + i);
      store<T, N>(r.dt + i, quadratic ? e * (t * T(0.5) + T(1)) : e);
      store<T, N>(exponent + i, e * kernel_of(quadratic, t));
    }
    for (int64_t i = 0; i < r.n01; ++i) net[i] = w.P[i];
    for (int64_t i = l_begin; i < r.n01; ++i) net[i] -= exponent[i - l_begin] *= a, r.dt[i - l_begin] *= -a;
    for (int64_t i = r.n01; i < r.n; ++i) net[i] = exponent[i - l_begin];
    for (int64_t i = 0; i < r.n; ++i) w.g[i] -= s.delta[lane];

    V moment = {};
    int64_t i = 0;
    for (; i + N <= r.n; i += N) moment += load<T, N>(net + i) * load<T, N>(w.g + i);
    T tail = T(0);
    for (; i < r.n; ++i) tail += net[i] * w.g[i];
    const int64_t taken = r.n01 - l_begin;
    s.slope[lane] = sum_lanes<T, N>(moment) + tail;
    s.removed[lane] = sum_short<T>(exponent, l_count ? taken : 0);
    s.exact[lane] = sum_short<T>(w.P, r.n01) + (l_count ? sum_short<T>(exponent + taken, l_count - taken) : T(0));
  });
}

template <class E, int kLanes>
SB_INLINE void gradients_single(const AttentionParams& p, const Group<E, kLanes>& g, int lane,
                                BackwardScratch<E, kLanes>& s, PairRecord<E>& r) {
  typedef SumOf<E> T;
  const bool quadratic = p.low_rank == LowRank::kQuadratic;
  const T correction = s.correction[lane], inverse = s.inverse[lane], scaled = inverse * T(p.scale);
  const T* net = s.net + lane * p.max_pairs;
  const LaneWeights<T> w = weights_of<E, kLanes>(p, s, lane, r);
  for (int64_t i = 0; i < r.n; ++i) w.g[i] -= correction;
  for (int64_t i = 0; i < r.n01; ++i) w.P[i] *= w.g[i] * scaled;
  const int64_t l_count = p.low_rank == LowRank::kNone ? 0 : r.n - r.l_begin;
  for (int64_t i = 0; i < l_count; ++i) r.dt[i] *= w.g[r.l_begin + i] * inverse;
  for (int64_t i = 0; i < r.n; ++i) w.g[i] = net[i] * inverse;
  combine_rows<E>(r.n01, w.P, listed<E>(p.k, g.b, g.kv, r.key), p.head_pad, s.dQ + lane * p.head_pad);
  if constexpr (kPaired<E>) {  // as the scatter reads them
    constexpr int N = kWidth<T>;
    for (int64_t i = 0; i < r.n01; i += N) store_narrow<E, N>(r.ds + i, load<T, N>(w.P + i));
    for (int64_t i = 0; i < r.n; i += N) store_narrow<E, N>(r.w + i, load<T, N>(w.g + i));
  }
  if (l_count == 0) return;
  combine_rows<T>(l_count, r.dt, listed<T>(p.y, g.b, g.kv, r.key + r.l_begin), p.map_pad, s.row);
  for (int64_t a = 0; a < p.rank + quadratic; ++a) s.dX[a * kLanes + lane] = s.row[a];
}
