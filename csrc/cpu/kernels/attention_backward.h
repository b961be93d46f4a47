// The backward pass (algorithm note, section 6): scores are those that the forward pass kept, or computed again; with
// the saved log-sum-exp P = exp(s - lse), U = L exp(-lse), g = dO.v - delta.
//   listed pair:       ds = P g    (and, where the state holds its L, the weight is P - U and dL falls by g)
//   pair not listed:   dL = g exp(-lse)
// lse and out are rounded, and what they are off by is the same for every pair of a query, where the terms of its
// gradient cancel. So the weights are summed again, together with the weighted sum of dO.v - dO.out: one division
// makes the weights sum to one and delta their mean.
// Pairs are scattered to dk, dv, dy tile after tile: the order of every sum is the order of the queries, for any number
// of threads.

// Step 3: the state's part of the sums, then what makes the weights sum to one and delta their mean. As in the forward
// pass the complement's weight is not negative.
template <class E, int kLanes>
SB_INLINE bool balance_group(const AttentionParams& p, const State<SumOf<E>>& state, BackwardScratch<E, kLanes>& s) {
  typedef SumOf<E> T;
  constexpr int N = kLanes < kWidth<T> ? kLanes : kWidth<T>, NQ = kLanes / N;
  typedef typename Vec<T, N>::type V;
  bool any = false;
  for (int lane = 0; lane < kLanes; ++lane) any |= !(s.state_log[lane] <= T(-1e29));
  V total[NQ] = {}, slope[NQ];
  SB_EACH (v, NQ) slope[v] = load<T, N>(s.slope + v * N);
  if (any) {
    expand_features<T, kLanes>(p.low_rank, p.rank, s.xT, s.weight, s.F);
    gemm<T, N, false>(p.features, kLanes, p.value_pad, Strided<T>{state.H, p.value_pad, 1},
                      DenseRows<const T>{widen_steps<E, kLanes>(s.gT, p.value_pad, s.wide), kLanes},
                      DenseRows<T>{s.gF, kLanes});
    for (int64_t begin = 0; begin < p.features; begin += kShort) {
      V sum[NQ] = {}, moment[NQ] = {};
      for (int64_t f = begin; f < p.features && f < begin + kShort; ++f)
        SB_EACH (v, NQ) {
          const V F = load<T, N>(s.F + f * kLanes + v * N);
          const V g = load<T, N>(s.gF + f * kLanes + v * N) - load<T, N>(s.delta + v * N) * state.hz[f];
          store<T, N>(s.gF + f * kLanes + v * N, g);
          sum[v] += F * state.hz[f], moment[v] += F * g;
        }
      SB_EACH (v, NQ) total[v] += sum[v], slope[v] += moment[v];
    }
  }
  SB_EACH (v, NQ) {
    const V complement = total[v] - load<T, N>(s.removed + v * N), exact = load<T, N>(s.exact + v * N);
    const V den = exact + (complement < T(0) ? V{} : complement);
    const V inverse = den == T(0) ? V{} : T(1) / den;
    store<T, N>(s.den + v * N, den);
    store<T, N>(s.inverse + v * N, inverse);
    store<T, N>(s.correction + v * N, slope[v] * inverse - load<T, N>(s.d_lse + v * N));
  }
  return any;
}

// A lane whose complement is rounding (kCancelling): it leaves the state and the record's U, and is balanced with its
// complement summed directly. Element i of the record's arrays of this lane is at i * stride.
template <class T, int kLanes>
void balance_direct(const AttentionParams& p, const Group<T, kLanes>& g, int lane, int64_t stride, T* ds, T* w, T* dt,
                    T* net, BackwardScratch<T, kLanes>& s, PairRecord<T>& r) {
  DirectQuery<T>& q = r.direct[r.directs++];
  const RowRange& range = p.rows[g.b];
  q.b = g.b, q.kv = g.kv, q.end = p.is_causal ? g.chunk_first - range.k_first : range.k_end - range.k_first;
  q.key = r.key + r.n0, q.listed = r.n01 - r.n0, q.x = g.x[lane], q.d_out = s.d_out[lane];
  q.log = g.rho[lane] - s.lse[lane], q.delta = s.delta[lane];
  direct_row<T>(p, q.x, q.z);
  for (int64_t i = 0; i < r.n01; ++i) net[i * stride] = ds[i * stride];
  for (int64_t i = r.l_begin; i < r.n01; ++i) dt[(i - r.l_begin) * stride] = T(0);
  T den = s.exact[lane], slope = T(0);
  for (int64_t i = 0; i < r.n; ++i) slope += net[i * stride] * w[i * stride];
  direct_sums<T>(p, q, &den, &slope);
  s.inverse[lane] = q.inverse = den == T(0) ? T(0) : T(1) / den;
  s.correction[lane] = slope * q.inverse - s.d_lse[lane];
  q.delta += s.correction[lane];
  s.weight[lane] = T(0);
  for (int64_t f = 0; f < p.features; ++f) s.F[f * kLanes + lane] = T(0);
}

// A lane that is evaluated elsewhere (p.cancelled) leaves the state and the record.
template <class E, int kLanes, class T>
void drop_lane(const AttentionParams& p, int lane, int64_t stride, T* ds, T* w, T* dt, T* net,
               BackwardScratch<E, kLanes>& s, const PairRecord<E>& r) {
  for (int64_t i = 0; i < r.n; ++i) net[i * stride] = w[i * stride] = T(0);
  for (int64_t i = 0; i < r.n01; ++i) ds[i * stride] = T(0);
  for (int64_t i = r.l_begin; i < r.n; ++i) dt[(i - r.l_begin) * stride] = T(0);
  s.inverse[lane] = s.correction[lane] = s.weight[lane] = T(0);
  for (int64_t f = 0; f < p.features; ++f) s.F[f * kLanes + lane] = T(0);
}

// dx of lanes whose complement was summed directly.
template <class T, int kLanes>
void direct_query_gradient(const AttentionParams& p, int lane, BackwardScratch<T, kLanes>& s, const DirectQuery<T>& q) {
  for (int64_t a = 0; a < p.map_pad; ++a) s.row[a] = T(0);
  direct_gradients<T>(p, q, 0, q.end, [&](const int32_t* key, int64_t n, const T*, const T* dt) {
    add_rows<T>(n, dt, listed<T>(p.y, q.b, q.kv, key), p.map_pad, s.row);
  });
  for (int64_t a = 0; a < p.rank + (p.low_rank == LowRank::kQuadratic); ++a) s.dX[a * kLanes + lane] += s.row[a];
}

// Step 6: dx through F(x) H, and the group's share of the states' gradient.
template <class E, int kLanes>
SB_INLINE void backward_state(const AttentionParams& p, const State<SumOf<E>>& state, const State<SumOf<E>>& d_state,
                              BackwardScratch<E, kLanes>& s) {
  typedef SumOf<E> T;
  constexpr int N = kLanes < kWidth<T> ? kLanes : kWidth<T>, NQ = kLanes / N;
  typedef typename Vec<T, N>::type V;
  V inverse[NQ], correction[NQ], delta[NQ];
  SB_EACH (v, NQ) {
    inverse[v] = load<T, N>(s.inverse + v * N), correction[v] = load<T, N>(s.correction + v * N);
    delta[v] = load<T, N>(s.delta + v * N) + correction[v];
    store<T, N>(s.weight + v * N, load<T, N>(s.weight + v * N) * inverse[v]);
  }
  for (int64_t begin = 0; begin < p.features; begin += N) {  // as many sums over lanes at once as there are lanes
    const int64_t count = p.features - begin < N ? p.features - begin : N;
    V sum[N]{};
    for (int64_t i = 0; i < count; ++i)
      SB_EACH (v, NQ) {
        const int64_t o = (begin + i) * kLanes + v * N;
        store<T, N>(s.gF + o, load<T, N>(s.gF + o) - correction[v] * state.hz[begin + i]);
        const V weighted = load<T, N>(s.F + o) * inverse[v];
        store<T, N>(s.F + o, weighted);
        sum[i] += weighted * delta[v];
      }
    fold_rows<T, N>(sum);
    store<T, N>(d_state.hz + begin, load<T, N>(d_state.hz + begin) - sum[0]);
  }
  chain_features<T, kLanes>(p.low_rank, p.rank, s.xT, s.weight, s.gF, s.dX);
  const T* d_out[kLanes];
  for (int lane = 0; lane < kLanes; ++lane)
    d_out[lane] = widen_row_of<E>(s.d_out[lane], p.value_pad, s.wide_rows + lane * p.value_pad);
  gemm<T, kWidth<T>, true>(p.features, p.value_pad, kLanes, Strided<T>{s.F, kLanes, 1}, PointedRows<const T>{d_out},
                           DenseRows<T>{d_state.H, p.value_pad});
}

// The group's own inputs: dO in lanes, delta = dO.o, lse in base 2 (a row without weight gets 1e30: every weight
// of it is then exactly 0).
template <class E, int kLanes, bool kShared>
SB_INLINE void backward_prepare(const AttentionParams& p, const Group<E, kLanes>& g, BackwardScratch<E, kLanes>& s) {
  typedef SumOf<E> T;
  for (int lane = 0; lane < kLanes; ++lane) {
    const int64_t i = g.query[lane];
    s.d_out[lane] = s.out[lane] = g.zero_row, s.lse[lane] = T(1e30), s.d_lse[lane] = T(0), s.state_log[lane] = T(-1e30);
    if (i < 0) continue;
    const int64_t at = (g.b * p.q_heads + g.h) * p.q_tokens + i;
    const T lse = static_cast<const T*>(p.lse)[at];
    if (lse == -T(__builtin_inf())) continue;
    s.d_out[lane] = p.d_out.at<const E>(g.b, g.h, i);
    s.out[lane] = p.out.at<const E>(g.b, g.h, i);
    s.d_lse[lane] = p.d_lse ? static_cast<const T*>(p.d_lse)[at] : T(0);
    s.lse[lane] = lse * T(1.44269504088896340736);
  }
  // delta is summed in the order of dO.v below: a query with a single key gets a gradient of exactly zero.
  transpose_steps<E, kLanes>(s.d_out, p.value_pad, s.gT);
  if constexpr (kShared) {
    dot_of_lanes<E, kLanes>(s.out, p.value_pad, s.gT, s.delta);
  } else {
    for (int lane = 0; lane < kLanes; ++lane)
      dot_rows<E>(1, PointedRows<const E>{s.out + lane}, s.d_out[lane], p.value_pad, s.delta + lane);
  }
}

template <class E, int kLanes, bool kShared>
void backward_group(const AttentionParams& p, const Tile<E, kLanes>& tile, BackwardScratch<E, kLanes>& s,
                    PairRecord<E>* records, Upcoming<E, kLanes, true>& upcoming) {
  typedef SumOf<E> T;
  const Group<E, kLanes>& g = tile.g;
  const bool mapped = p.low_rank != LowRank::kNone;
  const int64_t row = g.b * p.kv_heads + g.kv;
  const auto kappa = log_scales<T>(p.kappa, g.b, g.kv);
  const State<T> state = mapped ? state_slot<T>(p, p.state, row, g.slot) : State<T>{};
  const T kappa_ref = mapped ? *state.kappa_ref : T(0);
  backward_prepare<E, kLanes, kShared>(p, g, s);
  if (mapped) transpose_rows<T, kLanes>(g.x, p.rank, T(1), s.xT);
  for (int64_t a = 0; a < p.map_pad * kLanes; ++a) s.dX[a] = T(0);
  if constexpr (kShared) {
    weigh_shared<E, kLanes>(p, g, tile.list, kappa, kappa_ref, s, records[0], upcoming);
    for (int lane = 0; lane < kLanes; ++lane)
      records[0].q[lane] = g.q[lane], records[0].d_out[lane] = s.d_out[lane], records[0].x[lane] = g.x[lane];
  } else {
    for (int lane = 0; lane < kLanes; ++lane) {
      PairRecord<E>& r = records[lane];
      r.lanes = 1, r.directs = 0, r.n0 = r.n01 = r.n = r.l_begin = 0, r.first_key = INT64_MAX, r.last_key = -1;
      s.weight[lane] = s.exact[lane] = s.removed[lane] = s.slope[lane] = T(0);
    }
    weigh_single<E, kLanes>(p, g, kappa, kappa_ref, s, records);
  }
  const bool any = balance_group<E, kLanes>(p, state, s);
  int direct[kLanes], directs = 0;
  for (int lane = 0; lane < g.lanes; ++lane) {
    if (g.query[lane] < 0 || !(s.removed[lane] > T(p.cancelling) * s.den[lane])) continue;
    PairRecord<E>& r = records[kShared ? 0 : lane];
    const int64_t at = kShared ? lane : 0, stride = kShared ? kLanes : 1;
    T* net = s.net + (kShared ? lane : lane * p.max_pairs);
    T *P, *grad;
    if constexpr (kShared) {
      P = s.P + lane, grad = s.g + lane;
    } else {
      const LaneWeights<T> w = weights_of<E, kLanes>(p, s, lane, r);
      P = w.P, grad = w.g;
    }
    if (p.cancelled) {
      p.cancelled[(g.b * p.q_heads + g.h) * p.q_tokens + g.query[lane]] = 1;
      drop_lane<E, kLanes>(p, lane, stride, P, grad, r.dt + at, net, s, r);
      continue;
    }
    if constexpr (sizeof(T) == sizeof(double)) {
      direct[directs++] = lane;
      balance_direct<T, kLanes>(p, g, lane, stride, P, grad, r.dt + at, net, s, r);
    }
  }
  if constexpr (kShared)
    gradients_shared<E, kLanes>(p, g, s, records[0]);
  else
    for (int lane = 0; lane < kLanes; ++lane)
      if (g.query[lane] >= 0) gradients_single<E, kLanes>(p, g, lane, s, records[lane]);
  if constexpr (sizeof(T) == sizeof(double))
    for (int i = 0; i < directs; ++i)
      direct_query_gradient<T, kLanes>(p, direct[i], s, kShared ? records[0].direct[i] : records[direct[i]].direct[0]);
  if (mapped) {
    const int64_t unit = p.is_causal ? g.slot : g.first_slot / kQueriesPerUnit;
    if (any) backward_state<E, kLanes>(p, state, d_state_slot<T>(p, g.b * p.q_heads + g.h, unit), s);
    T d_rho[kLanes];
    finish_log_gradient<T, kLanes>(p.low_rank, p.rank, s.xT, s.dX, d_rho);
    const T* weight = weight_of_head<T>(p, p.query_weight, g.b, g.h, p.q_heads);
    if (weight) {
      T* dq[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) {
        const bool in_place = kShared && g.query[lane] >= 0;
        dq[lane] = in_place ? p.dq.at<T>(g.b, g.h, g.query[lane]) : s.dQ + lane * p.head_pad;
        s.dX[p.rank * kLanes + lane] = d_rho[lane];
      }
      gemm<T, kWidth<T>, true>(kLanes, p.head_pad, p.rank + 1, Strided<T>{s.dX, 1, kLanes},
                               DenseRows<const T>{weight, p.head_pad}, PointedRows<T>{dq});
    }
    for (int lane = 0; lane < g.lanes && !weight; ++lane) {
      if (g.query[lane] < 0) continue;
      T* d_map = p.d_query_map.at<T>(g.b, g.h, g.query[lane]);
      for (int64_t a = 0; a < p.rank; ++a) d_map[a] = s.dX[a * kLanes + lane];
      d_map[p.rank] = d_rho[lane];
    }
  }
  for (int lane = 0; lane < g.lanes && !kShared; ++lane) {
    if (g.query[lane] < 0) continue;
    T* dq = p.dq.at<T>(g.b, g.h, g.query[lane]);
    for (int64_t e = 0; e < p.head_pad; e += kWidth<T>)
      store<T, kWidth<T>>(dq + e, load<T, kWidth<T>>(s.dQ + lane * p.head_pad + e));
  }
}

template <class E, int kLanes>
SB_INLINE void plan_backward(const AttentionParams& p, Arena& arena, BackwardScratch<E, kLanes>& s) {
  typedef SumOf<E> T;
  typedef StepOf<E> S;
  s.qT = arena.take<S>(p.head_pad * kLanes);
  s.xT = arena.take<T>(p.map_pad * kLanes);
  s.gT = arena.take<S>(p.value_pad * kLanes);
  if constexpr (kPaired<E>) {
    s.wide = arena.take<T>(p.value_pad * kLanes);
    s.wide_rows = arena.take<T>(p.value_pad * kLanes);
    s.P = arena.take<T>(p.max_pairs * kLanes);
    s.g = arena.take<T>(p.max_pairs * kLanes);
    s.W = arena.take<S>(p.max_pairs * kLanes);
  }
  s.exponent = arena.take<T>(p.max_pairs);
  s.row = arena.take<T>(p.map_pad);
  s.F = arena.take<T>(p.features_pad() * kLanes);
  s.gF = arena.take<T>(p.features_pad() * kLanes);
  s.dQ = arena.take<T>(p.head_pad * kLanes);
  s.dX = arena.take<T>((p.rank < p.map_pad ? p.map_pad : p.rank + 1) * kLanes);
  s.net = arena.take<T>(p.max_pairs * kLanes);
}
template <class E>
SB_INLINE void plan_record(const AttentionParams& p, Arena& arena, int64_t lanes, PairRecord<E>& r) {
  typedef SumOf<E> T;
  r.key = arena.take<int32_t>(p.max_pairs);
  r.w = arena.take<E>(p.max_pairs * lanes);
  r.ds = arena.take<E>(p.max_pairs * lanes);
  r.dt = arena.take<T>(p.max_pairs * lanes);
  r.q = arena.take<const E*>(lanes);
  r.d_out = arena.take<const E*>(lanes);
  r.x = arena.take<const T*>(lanes);
  r.direct = arena.take<DirectQuery<T>>(lanes);
  T* z = arena.take<T>(lanes * p.map_pad);
  if (r.direct)
    for (int64_t i = 0; i < lanes; ++i) r.direct[i].z = z + i * p.map_pad;
}

// Backward of the groups of one unit. Records live in `store`, one slab of record_bytes per group; with keep == false
// every group reuses the first slab and is scattered at once, otherwise the caller scatters them later, in the order of
// units and groups, key range by key range.
template <class E, int kLanes, bool kShared, bool kDense>
struct BackwardVisitor {
  static constexpr bool kLists = true;
  static constexpr int kRecords = kShared ? 1 : kLanes;
  const AttentionParams& p;
  char* records;
  int64_t record_bytes, groups;
  bool keep;
  BackwardScratch<E, kLanes> s;
  BlockScatter<E> blocks;
  Upcoming<E, kLanes, true> upcoming;
  DenseLists<kDense> lists{};
  void operator()(Tile<E, kLanes>& tile, const Tile<E, kLanes>* next) {
    if constexpr (kDense) collect_dense<E, kLanes>(p, tile, lists.lanes);
    Arena arena{records + (keep ? groups * record_bytes : 0), 0};
    PairRecord<E>* r = arena.take<PairRecord<E>>(kRecords);
    for (int i = 0; i < kRecords; ++i) plan_record<E>(p, arena, kShared ? kLanes : 1, r[i]);
    if constexpr (kShared) upcoming.look_ahead(tile, next);
    backward_group<E, kLanes, kShared>(p, tile, s, r, upcoming);
    ++groups;
    if (keep) return;
    scatter(tile.g.b, tile.g.kv, r, 0, p.k_tokens);
  }
  SB_INLINE void scatter(int64_t b, int64_t kv, const PairRecord<E>* r, int64_t key_begin, int64_t key_end) {
    if constexpr (kShared)
      scatter_shared<E>(p, b, kv, r[0], key_begin, key_end);
    else
      scatter_single<E>(p, b, kv, r, kRecords, key_begin, key_end, blocks);
  }
};
template <class E, int kLanes>
struct CountVisitor {
  static constexpr bool kLists = false;
  int64_t groups;
  void operator()(const Tile<E, kLanes>&, const Tile<E, kLanes>*) { ++groups; }
};

template <class E, int kLanes, bool kShared, bool kDense = false>
void backward_unit_of(const AttentionParams& p, BackwardTask& task) {
  constexpr int kRecords = kShared ? 1 : kLanes;
  Arena size{nullptr, 0};
  PairRecord<E> unused;
  size.take<PairRecord<E>>(kRecords);
  for (int i = 0; i < kRecords; ++i) plan_record<E>(p, size, kShared ? kLanes : 1, unused);
  task.record_bytes = size.used;

  Arena arena{static_cast<char*>(task.scratch), 0};
  BackwardVisitor<E, kLanes, kShared, kDense> visitor{p,  static_cast<char*>(task.records), size.used, 0, task.keep, {},
                                                      {}, Upcoming<E, kLanes, true>(p)};
  plan_backward<E, kLanes>(p, arena, visitor.s);
  Tile<E, kLanes> tile[2];
  plan_tiles<E, kLanes>(p, arena, tile);
  if constexpr (!kShared) plan_block_scatter<E>(p, arena, visitor.blocks);
  task.scratch_bytes = arena.used;
  if (task.stage == BackwardTask::kMeasure) return;
  if (task.stage == BackwardTask::kCount) {
    CountVisitor<E, kLanes> count{0};
    for_each_group<E, kLanes, kShared && !kDense>(p, task.b, task.h, task.unit, task.zero_row, tile, count);
    task.groups = count.groups;
  } else if (task.stage == BackwardTask::kSpread || task.stage == BackwardTask::kScatter) {
    if (!kShared && task.stage == BackwardTask::kScatter) clear_block_scatter<E>(p, visitor.blocks);
    for (int64_t i = 0; i < task.groups; ++i) {
      const PairRecord<E>* r = reinterpret_cast<const PairRecord<E>*>(static_cast<char*>(task.records) + i * size.used);
      if (task.stage == BackwardTask::kScatter)
        visitor.scatter(task.b, p.kv_head(task.h), r, task.key_begin, task.key_end);
      else
        for (int record = 0; record < kRecords; ++record) spread_of_record<E>(r[record], task.pairs);
    }
  } else {
    if (p.low_rank != LowRank::kNone && p.uses_state) {
      const State<SumOf<E>> d = d_state_slot<SumOf<E>>(p, task.b * p.q_heads + task.h, task.unit);
      for (int64_t i = 0; i < p.slot_size; ++i) d.H[i] = 0;
    }
    if (!kShared && !task.keep) clear_block_scatter<E>(p, visitor.blocks);
    for_each_group<E, kLanes, kShared && !kDense>(p, task.b, task.h, task.unit, task.zero_row, tile, visitor);
    task.groups = visitor.groups;
  }
}

template <class E>
void backward_unit(const AttentionParams& p, BackwardTask& task) {
  if (p.block_q == 1) {
    const bool measure = task.stage == BackwardTask::kMeasure;
    BackwardTask of_dense = task;
    if (measure) backward_unit_of<E, kBackwardLanes, true, true>(p, of_dense);
    if (!measure && p.is_dense(p.rows[task.b])) return backward_unit_of<E, kBackwardLanes, true, true>(p, task);
    backward_unit_of<E, kBackwardLanes, false>(p, task);
    if (measure && of_dense.scratch_bytes > task.scratch_bytes) task.scratch_bytes = of_dense.scratch_bytes;
    if (measure && of_dense.record_bytes > task.record_bytes) task.record_bytes = of_dense.record_bytes;
    return;
  }
  if (p.block_q <= 8) return backward_unit_of<E, 8, true>(p, task);
  return backward_unit_of<E, kBackwardLanes, true>(p, task);
}
