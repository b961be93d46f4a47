// The states' share of the backward pass, on the side of the keys.

// Sums the heads of a group and the units: what the keys of chunk c see is in slot c + 1 (causal: every later unit), or
// in slot 0.
template <class T>
void backward_scan(const AttentionParams& p, int64_t b, int64_t kv) {
  const int64_t group = p.q_heads / p.kv_heads, size = p.features * p.value_pad + p.features_pad();
  const int64_t first = b * p.q_heads + kv * group;
  for (int64_t h = 1; h < group; ++h)
    for (int64_t u = 0; u < p.units; ++u) {
      const State<T> to = d_state_slot<T>(p, first, u), from = d_state_slot<T>(p, first + h, u);
      for (int64_t i = 0; i < size; ++i) to.H[i] += from.H[i];
    }
  if (!p.is_causal) {
    const State<T> to = d_state_slot<T>(p, first, 0);
    for (int64_t u = 1; u < p.units; ++u) {
      const State<T> from = d_state_slot<T>(p, first, u);
      for (int64_t i = 0; i < size; ++i) to.H[i] += from.H[i];
    }
    return;
  }
  for (int64_t u = p.units - 2; u > 0; --u) {
    const State<T> to = d_state_slot<T>(p, first, u), from = d_state_slot<T>(p, first, u + 1);
    const T decay = exp2s<T>(*state_slot<T>(p, p.state, b * p.kv_heads + kv, u).kappa_ref -
                             *state_slot<T>(p, p.state, b * p.kv_heads + kv, u + 1).kappa_ref);
    for (int64_t i = 0; i < size; ++i) to.H[i] += from.H[i] * decay;
  }
}

// The state's part of the gradients of 64 keys, and the end of their coordinates' gradient.
template <class E>
int64_t backward_keys(const AttentionParams& p, int64_t b, int64_t kv, int64_t chunk, void* scratch,
                      const void* zero_row) {
  typedef SumOf<E> T;
  constexpr int N = kWidth<T>, L = int(kChunk);
  Arena arena{static_cast<char*>(scratch), 0};
  T* yT = arena.take<T>(p.map_pad * L);
  T* dyT = arena.take<T>((p.map_pad + 1) * L);
  StepOf<E>* vT = arena.take<StepOf<E>>(p.value_pad * L);
  T* wide = arena.take<T>(kPaired<E> ? p.value_pad * L : 0);
  T* F = arena.take<T>(p.features_pad() * L);
  T* gF = arena.take<T>(p.features_pad() * L);
  T* spare = arena.take<T>(p.head_pad > p.value_pad ? p.head_pad : p.value_pad);
  T* pairs = arena.take<T>(p.map_pad * L);
  if (!scratch) return arena.used;
  const RowRange& range = p.rows[b];
  const int64_t slot = p.is_causal ? chunk + 1 : 0, group = p.q_heads / p.kv_heads;
  const State<T> R = d_state_slot<T>(p, b * p.q_heads + kv * group, slot);
  KeyChunk<E> keys;
  keys.gather(p, zero_row, b, kv, range.k_first + chunk * kChunk,
              *state_slot<T>(p, p.state, b * p.kv_heads + kv, p.is_causal ? slot : p.slots - 1).kappa_ref);
  for (int64_t i = 0; i < (p.map_pad + 1) * L; ++i) dyT[i] = T(0);
  for (int64_t i = 0; i < p.head_pad || i < p.value_pad; ++i) spare[i] = T(0);
  transpose_rows<T, L>(keys.y, p.rank, T(1), yT);
  if (p.uses_state) {
    transpose_steps<E, L>(keys.v, p.value_pad, vT);
    expand_features<T, L>(p.low_rank, p.rank, yT, keys.weight, F);
    T* dv[L];
    for (int i = 0; i < L; ++i) dv[i] = keys.valid[i] ? p.dv.at<T>(b, kv, keys.key[i]) : spare;
    gemm<T, N, true>(L, p.value_pad, p.features, Strided<T>{F, 1, L}, DenseRows<const T>{R.H, p.value_pad},
                     PointedRows<T>{dv});
    gemm<T, N, false>(p.features, L, p.value_pad, Strided<T>{R.H, p.value_pad, 1},
                      DenseRows<const T>{widen_steps<E, L>(vT, p.value_pad, wide), L}, DenseRows<T>{gF, L});
    for (int64_t f = 0; f < p.features; ++f)
      for (int i = 0; i < L; i += N) store<T, N>(gF + f * L + i, load<T, N>(gF + f * L + i) + R.hz[f]);
    chain_features<T, L>(p.low_rank, p.rank, yT, keys.weight, gF, dyT);
  }

  // What the pairs added, and the log scale's gradient behind the coordinates'.
  const bool quadratic = p.low_rank == LowRank::kQuadratic;
  const int64_t columns = p.rank + quadratic;
  const T* dy[L];
  for (int i = 0; i < L; ++i)
    dy[i] = keys.valid[i] ? p.dy.at<const T>(b, kv, keys.key[i]) : static_cast<const T*>(zero_row);
  transpose_rows<T, L>(dy, columns, T(1), pairs);
  for (int64_t at = 0; at < columns * L; at += N) store<T, N>(dyT + at, load<T, N>(dyT + at) + load<T, N>(pairs + at));
  finish_log_gradient<T, L>(p.low_rank, p.rank, yT, dyT, dyT + p.rank * L);

  const T* weight = weight_of_head<T>(p, p.key_weight, b, kv, p.kv_heads);
  if (weight) {
    T* dk[L];
    for (int i = 0; i < L; ++i) dk[i] = keys.valid[i] ? p.dk.at<T>(b, kv, keys.key[i]) : spare;
    gemm<T, N, true>(L, p.head_pad, p.rank + 1, Strided<T>{dyT, 1, L}, DenseRows<const T>{weight, p.head_pad},
                     PointedRows<T>{dk});
  }
  for (int i = 0; i < L && !weight; ++i) {
    if (!keys.valid[i]) continue;
    T* d_map = p.d_key_map.at<T>(b, kv, keys.key[i]);
    for (int64_t a = 0; a <= p.rank; ++a) d_map[a] = dyT[a * L + i];
  }
  return arena.used;
}
