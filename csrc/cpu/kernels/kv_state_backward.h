// Gradients that reach keys and values through the states.
#pragma once
#include "cluster_state.h"

namespace sb::SB_ISA {

// Sums the states' gradients over the query heads of kv, into the first of them, and over units: that of the keys of
// chunk c is in slot c + 1 (every later unit), or in slot 0 without a causal edge.
template <class T>
void backward_scan(const AttentionParams& p, int64_t b, int64_t kv) {
  if (p.has_clusters()) scan_representatives<T>(p, b, kv);
  if (!p.uses_kv_state) return;
  const int64_t q_per_kv = p.q_heads / p.kv_heads, size = p.kv_state_size(), first = b * p.q_heads + kv * q_per_kv;
  const auto add = [&](int64_t from_row, int64_t from_unit, int64_t to_unit, T decay) {
    const KVState<T> from = d_kv_state_slot<T>(p, from_row, from_unit), to = d_kv_state_slot<T>(p, first, to_unit);
    for (int64_t i = 0; i < size; ++i) to.H[i] += from.H[i] * decay;
  };
  for (int64_t h = 1; h < q_per_kv; ++h)
    for (int64_t u = 0; u < p.units; ++u) add(first + h, u, u, T(1));
  for (int64_t u = 1; u < p.units && !p.is_causal; ++u) add(first, u, 0, T(1));
  const auto kappa_ref = [&](int64_t slot) { return *kv_state_slot<T>(p, b * p.kv_heads + kv, slot).kappa_ref; };
  for (int64_t u = p.units - 2; u > 0 && p.is_causal; --u) {
    const T decay = exp2s<T>(kappa_ref(u) - kappa_ref(u + 1));
    if (!centre_moves<T>(p, b, kv, u + 1)) {
      add(first, u + 1, u, decay);
      continue;
    }
    const KVState<T> later = d_kv_state_slot<T>(p, first, u + 1), here = d_kv_state_slot<T>(p, first, u);
    for_each_moved<T>(p, b, kv, u + 1, [&](int64_t to, int64_t from, T factor) {
      add_state_row(p, here, from, later, to, factor * decay);
    });
  }
}

// Adds the state's part to dk and dv of a chunk of keys, and finishes dy and dkappa: writes them, or their product with
// the projection's weights to dk. Keys that enter a later state wait for its chunk.
template <class E>
int64_t backward_keys(const AttentionParams& p, int64_t b, int64_t kv, int64_t chunk, void* scratch,
                      const void* zero_row) {
  typedef AccType<E> T;
  constexpr int N = kWidth<T>, L = int(kChunk);
  if (p.has_clusters()) {
    if (zero_row) cluster_state_gradients<E>(p, b, kv, chunk);
    return 0;
  }
  Arena arena{static_cast<char*>(scratch), 0};
  T* yT = arena.take<T>(p.map_pad * L);
  T* dyT = arena.take<T>((p.map_pad + 1) * L);
  StepOf<E>* vT = arena.take<StepOf<E>>(p.value_pad * L);
  T* wide = arena.take<T>(kPaired<E> ? p.value_pad * L : 0);
  T* F = arena.take<T>(p.features_pad() * L);
  T* gF = arena.take<T>(p.features_pad() * L);
  T* spare = arena.take<T>(p.head_pad > p.value_pad ? p.head_pad : p.value_pad);
  T* listed = arena.take<T>(p.map_pad * L);
  if (!scratch) return arena.used;
  const RowRange& range = p.rows[b];
  const int64_t slot = p.is_causal ? chunk + 1 : 0, q_per_kv = p.q_heads / p.kv_heads;
  const KVState<T> d_state = d_kv_state_slot<T>(p, b * p.q_heads + kv * q_per_kv, slot);
  const T kappa_ref = *kv_state_slot<T>(p, b * p.kv_heads + kv, p.is_causal ? slot : p.slots - 1).kappa_ref;
  const T* centre = p.uses_kv_state ? centre_of_slot<T>(p, b, kv, slot) : nullptr;
  KeyChunk<E> keys;
  const auto finish = [&]() {
    for (int64_t i = 0; i < (p.map_pad + 1) * L; ++i) dyT[i] = T(0);
    for (int64_t i = 0; i < p.head_pad || i < p.value_pad; ++i) spare[i] = T(0);
    transpose_rows<T, L>(keys.y, p.rank, T(1), yT);
    if (centre) subtract_centre<T, L>(p.rank, centre, yT);
    if (p.uses_kv_state) {
      transpose_steps<E, L>(keys.v, p.value_pad, vT);
      expand_features<T, L>(p.low_rank, p.rank, yT, keys.weight, F);
      T* dv[L];
      for (int i = 0; i < L; ++i) dv[i] = keys.valid[i] ? p.dv.at<T>(b, kv, keys.key[i]) : spare;
      gemm<T, N, true>(L, p.value_pad, p.features, Strided<T>{F, 1, L}, DenseRows<const T>{d_state.H, p.value_pad},
                       PointedRows<T>{dv});
      gemm<T, N, false>(p.features, L, p.value_pad, Strided<T>{d_state.H, p.value_pad, 1},
                        DenseRows<const T>{widen_steps<E, L>(vT, p.value_pad, wide), L}, DenseRows<T>{gF, L});
      for (int64_t f = 0; f < p.features; ++f)
        for (int i = 0; i < L; i += N) store<T, N>(gF + f * L + i, load<T, N>(gF + f * L + i) + d_state.hz[f]);
      chain_features<T, L>(p.low_rank, p.rank, yT, keys.weight, gF, dyT);
    }

    // The part that the scatter of listed keys left in dy, then the log scale's gradient behind the coordinates'.
    const int64_t columns = gradient_rows(p.low_rank, p.rank);
    const T* dy[L];
    for (int i = 0; i < L; ++i)
      dy[i] = keys.valid[i] ? p.dy.at<const T>(b, kv, keys.key[i]) : static_cast<const T*>(zero_row);
    transpose_rows<T, L>(dy, columns, T(1), listed);
    if (centre) {  // about it, the state's part has coordinates of its own
      log_gradient<T, L>(p.low_rank, p.rank, yT, dyT, dyT + p.rank * L);
      transpose_rows<T, L>(keys.y, p.rank, T(1), yT);
      log_gradient<T, L>(p.low_rank, p.rank, yT, listed, listed + p.rank * L);
    }
    for (int64_t at = 0; at < columns * L; at += N)
      store<T, N>(dyT + at, load<T, N>(dyT + at) + load<T, N>(listed + at));
    if (!centre) log_gradient<T, L>(p.low_rank, p.rank, yT, dyT, dyT + p.rank * L);

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
  };
  keys.gather(p, zero_row, b, kv, range.k_first + chunk * kChunk, chunk * kChunk / p.segment, true, kappa_ref);
  finish();
  const KeyRange late = p.is_causal ? late_keys(p, b, kv, slot) : KeyRange{nullptr, 0};
  for (int64_t i = 0; i < late.n; i += kChunk) {
    keys.gather(p, zero_row, b, kv, {late.key + i, late.n - i}, kappa_ref);
    finish();
  }
  return arena.used;
}

}  // namespace sb::SB_ISA
