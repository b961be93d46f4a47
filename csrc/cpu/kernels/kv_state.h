// States of the low-rank part: H = sum_j exp(kappa_j - kappa_ref) F(y_j) (x) v_j and
// hz = sum_j exp(kappa_j - kappa_ref) F(y_j), over the keys before a segment, with y about the head's centre.
#pragma once
#include "arena.h"
#include "features.h"
#include "gemm.h"
#include "held_keys.h"

namespace sb::SB_ISA {

template <class T>
struct KVState {
  T *H, *hz, *kappa_ref;
};
template <class T>
SB_INLINE KVState<T> kv_state_slot(const AttentionParams& p, int64_t row, int64_t slot) {
  T* H = static_cast<T*>(p.kv_state) + (row * p.slots + slot) * p.slot_size;
  return {H, H + p.features * p.value_pad, H + p.features * p.value_pad + p.features_pad()};
}

// The gradient of a state, summed over the queries of unit `unit` of head `row` = (b, h), in the same layout.
template <class T>
SB_INLINE KVState<T> d_kv_state_slot(const AttentionParams& p, int64_t row, int64_t unit) {
  T* H = static_cast<T*>(p.d_kv_state) + (row * p.units + unit) * p.slot_size;
  return {H, H + p.features * p.value_pad, nullptr};
}

// Up to kChunk keys of one head in lanes. Ignored keys point at a zero row, with weight exactly 0; so has a key that no
// state holds.
template <class E>
struct KeyChunk {
  typedef AccType<E> T;
  static constexpr int L = int(kChunk);
  const E* v[L];
  const T* y[L];
  T weight[L];
  int64_t key[L];
  bool valid[L];

  // The keys of a segment from `first` on that are in the state of its slot. With `also_held` those are valid too that
  // are in no state.
  SB_INLINE void gather(const AttentionParams& p, const void* zero_row, int64_t b, int64_t h, int64_t first,
                        int64_t segment, bool also_held, T kappa_ref) {
    const RowRange& range = p.rows[b];
    const auto kappa = log_scales<T>(p.kappa, b, h);
    for (int i = 0; i < L; ++i) {
      const int64_t j = first + i;
      key[i] = j;
      valid[i] = j < range.k_end && !(p.k_mask && p.k_mask[b * p.k_tokens + j]);
      bool counts = valid[i];
      if (p.held && counts) {
        const int64_t slot = slot_of_key(p, b, h, j, segment);
        counts = slot == segment + 1, valid[i] = counts || (also_held && slot == kNeverEnters);
      }
      point(p, zero_row, b, h, i, counts ? kappa(j) - kappa_ref : T(-1e30));
    }
    finish();
  }
  // Of the given keys as many as fit.
  SB_INLINE void gather(const AttentionParams& p, const void* zero_row, int64_t b, int64_t h, const KeyRange& keys,
                        T kappa_ref) {
    const auto kappa = log_scales<T>(p.kappa, b, h);
    for (int i = 0; i < L; ++i) {
      valid[i] = i < keys.n;
      key[i] = valid[i] ? keys.key[i] : 0;
      point(p, zero_row, b, h, i, valid[i] ? kappa(key[i]) - kappa_ref : T(-1e30));
    }
    finish();
  }

 private:
  SB_INLINE void point(const AttentionParams& p, const void* zero_row, int64_t b, int64_t h, int i, T log) {
    v[i] = valid[i] ? p.v.at<const E>(b, h, key[i]) : static_cast<const E*>(zero_row);
    y[i] = valid[i] ? p.y.at<const T>(b, h, key[i]) : static_cast<const T*>(zero_row);
    weight[i] = log;
  }
  SB_INLINE void finish() {
    constexpr int N = kWidth<T>;
    for (int i = 0; i < L; i += N) store<T, N>(weight + i, exp2v<N>(load<T, N>(weight + i)));
  }
};

// Sets kappa_ref of every slot: the maximum of kappa over the keys of its state, or of the last one's without a causal
// edge.
template <class T>
void kv_state_references(const AttentionParams& p, int64_t b, int64_t h) {
  if (p.has_clusters()) {  // each counts from its own
    for (int64_t slot = 0; slot < p.slots; ++slot) *kv_state_slot<T>(p, b * p.kv_heads + h, slot).kappa_ref = T(0);
    return;
  }
  const RowRange& range = p.rows[b];
  const auto kappa = log_scales<T>(p.kappa, b, h);
  T running = T(-1e30);
  for (int64_t slot = 0; slot < p.slots; ++slot) {
    const KeyRange late = late_keys(p, b, h, slot);
    for (int64_t i = 0; i < late.n; ++i) running = kappa(late.key[i]) > running ? kappa(late.key[i]) : running;
    *kv_state_slot<T>(p, b * p.kv_heads + h, slot).kappa_ref = running;
    const int64_t begin = range.k_first + slot * p.segment;
    const int64_t end = begin + p.segment < range.k_end ? begin + p.segment : range.k_end;
    for (int64_t j = begin; j < end; ++j) {
      if (p.k_mask && p.k_mask[b * p.k_tokens + j]) continue;
      if (slot_of_key(p, b, h, j, slot) == slot + 1 && kappa(j) > running) running = kappa(j);
    }
  }
  if (!p.is_causal)
    for (int64_t slot = 0; slot < p.slots; ++slot) *kv_state_slot<T>(p, b * p.kv_heads + h, slot).kappa_ref = running;
}

// Sets slot segment + 1 to the sum over the keys that enter it: the segment's own and late ones.
template <class E>
int64_t kv_state_segment(const AttentionParams& p, int64_t b, int64_t h, int64_t segment, void* scratch,
                         const void* zero_row) {
  typedef AccType<E> T;
  constexpr int N = kWidth<T>;
  Arena arena{static_cast<char*>(scratch), 0};
  T* z = arena.take<T>(p.map_pad * kChunk);         // [rank][key]
  T* F = arena.take<T>(p.features_pad() * kChunk);  // [features][key]
  T* wide = arena.take<T>(kPaired<E> ? p.value_pad * kChunk : 0);
  if (!scratch) return arena.used;
  const RowRange& range = p.rows[b];
  const KVState<T> s = kv_state_slot<T>(p, b * p.kv_heads + h, segment + 1);
  for (int64_t i = 0; i < p.kv_state_size(); ++i) s.H[i] = T(0);
  const T* centre = centre_of_slot<T>(p, b, h, segment + 1);
  KeyChunk<E> keys;
  const auto add = [&]() {
    transpose_rows<T, int(kChunk)>(keys.y, p.rank, T(1), z);
    if (centre) subtract_centre<T, int(kChunk)>(p.rank, centre, z);
    expand_features<T, int(kChunk)>(p.low_rank, p.rank, z, keys.weight, F);
    const T* v[kChunk];
    for (int i = 0; i < int(kChunk); ++i) v[i] = widen_row_of<E>(keys.v[i], p.value_pad, wide + i * p.value_pad);
    gemm<T, N, true>(p.features, p.value_pad, kChunk, Strided<T>{F, kChunk, 1}, PointedRows<const T>{v},
                     DenseRows<T>{s.H, p.value_pad});
    for (int64_t f = 0; f < p.features; f += N) {  // as many sums over lanes at once as there are lanes
      Vector<T, N> sum[N]{};
      for (int64_t of = 0; of < N && f + of < p.features; ++of)
        for (int i = 0; i < int(kChunk); i += N) sum[of] += load<T, N>(F + (f + of) * kChunk + i);
      fold_rows<T, N>(sum);
      store<T, N>(s.hz + f, load<T, N>(s.hz + f) + sum[0]);
    }
  };
  const int64_t begin = range.k_first + segment * p.segment;
  for (int64_t first = begin; first < begin + p.segment && first < range.k_end; first += kChunk) {
    keys.gather(p, zero_row, b, h, first, segment, false, *s.kappa_ref);
    add();
  }
  const KeyRange late = late_keys(p, b, h, segment + 1);
  for (int64_t i = 0; i < late.n; i += kChunk) {
    keys.gather(p, zero_row, b, h, {late.key + i, late.n - i}, *s.kappa_ref);
    add();
  }
  return arena.used;
}

// Whether the centre of `slot` differs from that of the slot before.
template <class T>
SB_INLINE bool centre_moves(const AttentionParams& p, int64_t b, int64_t kv, int64_t slot) {
  if (!p.centre || p.centre_slots == 1) return false;
  const T* here = static_cast<const T*>(p.centre) + ((b * p.kv_heads + kv) * p.slots + slot) * p.map_pad;
  const T* before = here - p.map_pad;
  bool moves = false;
  for (int64_t a = 0; a < p.rank; ++a) moves |= here[a] != before[a];
  return moves;
}
// The rows of a state about the centre of `slot` as sums of factor times rows about that of the slot before.
template <class T, class Visit>
SB_INLINE void for_each_moved(const AttentionParams& p, int64_t b, int64_t kv, int64_t slot, const Visit& visit) {
  const T* here = static_cast<const T*>(p.centre) + ((b * p.kv_heads + kv) * p.slots + slot) * p.map_pad;
  const auto delta = [&](int64_t a) SB_INLINE_LAMBDA { return here[a] - here[a - p.map_pad]; };
  visit_low_rank(p.low_rank, [&](auto kernel) SB_INLINE_LAMBDA { kernel.move_centre(p.rank, delta, visit); });
}
// Row `to` of a state or its gradient += factor times row `from` of another.
template <class T>
SB_INLINE void add_state_row(const AttentionParams& p, const KVState<T>& target, int64_t to, const KVState<T>& source,
                             int64_t from, T factor) {
  T* H = target.H + to * p.value_pad;
  const T* other = source.H + from * p.value_pad;
  for (int64_t e = 0; e < p.value_pad; ++e) H[e] += other[e] * factor;
  target.hz[to] += source.hz[from] * factor;
}

// Turns the segments' own sums into prefix sums, each relative to its own kappa_ref.
template <class T>
void kv_state_scan(const AttentionParams& p, int64_t b, int64_t h) {
  const int64_t row = b * p.kv_heads + h, size = p.kv_state_size();
  const KVState<T> first = kv_state_slot<T>(p, row, 0);
  for (int64_t i = 0; i < size; ++i) first.H[i] = T(0);
  for (int64_t slot = 1; slot < p.slots; ++slot) {
    const KVState<T> before = kv_state_slot<T>(p, row, slot - 1), here = kv_state_slot<T>(p, row, slot);
    const T decay = exp2s<T>(*before.kappa_ref - *here.kappa_ref);
    if (!centre_moves<T>(p, b, h, slot)) {
      for (int64_t i = 0; i < size; ++i) here.H[i] += before.H[i] * decay;
      continue;
    }
    for_each_moved<T>(p, b, h, slot, [&](int64_t to, int64_t from, T factor) {
      add_state_row(p, here, to, before, from, factor * decay);
    });
  }
}

// exp(kappa_j - kappa_ref) of entries [begin, end) of a list.
template <class T>
SB_INLINE void decay_of_keys(const LogScales<T>& kappa, T kappa_ref, const int32_t* key, int64_t begin, int64_t end,
                             T* decay) {
  constexpr int N = kWidth<T>;
  for (int64_t i = begin; i < end; ++i) decay[i] = kappa(key[i]) - kappa_ref;
  for (int64_t i = begin; i < end; i += N) store<T, N>(decay + i, exp2v<N>(load<T, N>(decay + i)));
}

// exp(rho + kappa_ref - log) of each lane, 0 where kv_state_log says that no state is used. The exponent is formed in
// double: its error would scale a query's whole complement against its exact part. It is limited, which matters to
// queries alone that are computed again: a state far above lse, of which nothing is left when the lists are taken back.
template <class T, int kLanes>
SB_INLINE void kv_state_weights(const T* rho, T kappa_ref, const T* log, const T* kv_state_log, T* weight) {
  constexpr int N = kLaneWidth<double, kLanes>;
  constexpr double kMost = sizeof(T) == sizeof(double) ? 900 : 100;
  double exponent[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    const double log_weight = double(rho[lane]) + double(kappa_ref) - double(log[lane]);
    exponent[lane] = kv_state_log[lane] <= T(-1e29) ? -1e30 : log_weight > kMost ? kMost : log_weight;
  }
  for (int lane = 0; lane < kLanes; lane += N) {
    const auto power = exp2v<N>(load<double, N>(exponent + lane));
    SB_EACH (i, N) weight[lane + i] = T(power[i]);
  }
}

// An upper bound of what F(x).hz sums in absolute value, for queries in lanes whose F is scaled by `weight`; squared.
// `alpha` is root(x.centre), null without a centre. Zero where all terms have one sign, since nothing cancels then.
template <class T, int kLanes>
SB_INLINE void squared_terms(const AttentionParams& p, const T* xT, const T* alpha, const T* hz, const T* weight,
                             double* squares) {
  constexpr int N = kWidth<T>, NL = kLaneWidth<T, kLanes>;
  Vector<T, N> sum{};
  for (int64_t f = 0; f < p.features_pad(); f += N) sum += load<T, N>(hz + f) * load<T, N>(hz + f);
  const double of_state = double(sum_lanes<T, N>(sum));
  T norm[kLanes] = {};
  visit_low_rank(p.low_rank, [&](auto kernel) SB_INLINE_LAMBDA {
    if constexpr (kernel.kHasSigns)
      for (int v = 0; v < kLanes; v += NL) {
        Vector<T, NL> s{};
        for (int64_t a = 0; a < p.rank; ++a) s += load<T, NL>(xT + a * kLanes + v) * load<T, NL>(xT + a * kLanes + v);
        Vector<T, NL> n = kernel.norm_of_features(s);
        if (alpha) n += load<T, NL>(alpha + v) * load<T, NL>(alpha + v) - T(1);
        store<T, NL>(norm + v, n);
      }
  });
  for (int lane = 0; lane < kLanes; ++lane)
    squares[lane] = double(weight[lane] * norm[lane]) * double(weight[lane] * norm[lane]) * of_state;
}

// Whether a query's weight `den` drowns in rounding: of the L that is taken back from the state, or, in float32, of the
// terms of F(x).hz. Where L overflows, den is NaN. A call that sums by key is of such queries alone. Not for lists with
// a bitmask, which take nothing back: their NaN is the result, and to the second pass all their keys would be listed.
template <class T>
SB_INLINE bool is_beyond_bound(const AttentionParams& p, T removed, T den, double squared_terms) {
  if (!p.has_low_rank()) return false;
  if (p.sums_by_key || removed > T(p.fallback_bound) * den || removed > T(1e37)) return true;
  return p.needs_again && !(squared_terms <= kTermsBound * kTermsBound * double(den) * double(den));
}

}  // namespace sb::SB_ISA
