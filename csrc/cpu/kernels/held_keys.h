// Keys that are held out of the states: what they weigh, by which csrc/cpu/held_keys.cpp chooses them, and look-ups.
#pragma once
#include "arena.h"
#include "features.h"
#include "transpose.h"

namespace sb::SB_ISA {

struct KeyRange {
  const int32_t* key;
  int64_t n;
};
// Ascending keys held out of a state.
SB_INLINE KeyRange held_keys(const AttentionParams& p, int64_t b, int64_t kv, int64_t slot) {
  if (!p.held) return {nullptr, 0};
  const int64_t* begin = p.held_begin + (b * p.kv_heads + kv) * (p.slots + 1) + slot;
  return {p.held + begin[0], begin[1] - begin[0]};
}
// Keys that enter a state later than the others of their segment.
SB_INLINE KeyRange late_keys(const AttentionParams& p, int64_t b, int64_t kv, int64_t slot) {
  if (!p.held) return {nullptr, 0};
  const int64_t* begin = p.late_begin + (b * p.kv_heads + kv) * (p.slots + 1) + slot;
  return {p.late + begin[0], begin[1] - begin[0]};
}
// The first slot whose state holds key j, which lies in `segment`.
SB_INLINE int64_t slot_of_key(const AttentionParams& p, int64_t b, int64_t kv, int64_t j, int64_t segment) {
  return p.held ? p.enters[(b * p.kv_heads + kv) * p.k_tokens + j] : segment + 1;
}

// Weights of the kChunk keys from `first` on, relative to 2^`reference`, which is the largest kappa; 0 for ignored
// ones.
template <class T>
struct WeighedKeys {
  static constexpr int L = int(kChunk), N = kWidth<T>;
  T weight[L], kappa[L], norm[L], reference = T(-1e30);
  int64_t count = 0;

  SB_INLINE WeighedKeys(const AttentionParams& p, int64_t b, int64_t kv, int64_t first, T* z, const void* zero_row) {
    const auto kappa_of = log_scales<T>(p.kappa, b, kv);
    const bool all = !p.k_mask && first + L <= p.rows[b].k_end;
    const T* y[L];
    bool valid[L];
    for (int i = 0; i < L; ++i) {
      const int64_t j = first + i;
      valid[i] = all || (j < p.rows[b].k_end && !(p.k_mask && p.k_mask[b * p.k_tokens + j]));
      y[i] = valid[i] ? p.y.at<const T>(b, kv, j) : static_cast<const T*>(zero_row);
      count += valid[i];
    }
    // In packed rows the log scale stands behind the coordinates and a column of ones.
    const bool packed = p.kappa.data == p.y.at<T>(0, 0, 0) + p.rank + 1;
    transpose_rows<T, L>(y, packed ? p.rank + 2 : p.rank, T(1), z);
    if (const T* centre = centre_of_slot<T>(p, b, kv, (first - p.rows[b].k_first) / p.segment + 1))
      subtract_centre<T, L>(p.rank, centre, z);
    for (int i = 0; i < L; ++i)
      kappa[i] = !valid[i] ? T(-1e30) : packed ? z[(p.rank + 1) * L + i] : kappa_of(first + i);
    auto most = load<T, N>(kappa);
    for (int i = N; i < L; i += N) most = max_lanes(most, load<T, N>(kappa + i));
    SB_EACH (i, N) reference = most[i] > reference ? most[i] : reference;
    if (count == 0) return;
    for (int i = 0; i < L; i += N) {
      Vector<T, N> square{};
      for (int64_t a = 0; a < p.rank; ++a) square += load<T, N>(z + a * L + i) * load<T, N>(z + a * L + i);
      const auto e = exp2v<N>(load<T, N>(kappa + i) - reference);
      visit_low_rank(p.low_rank, [&](auto kernel) SB_INLINE_LAMBDA {
        const auto size = kernel.norm_of_features(square);
        store<T, N>(norm + i, size), store<T, N>(weight + i, e * size);
      });
    }
  }
};

template <class T>
int64_t chunk_weights(const AttentionParams& p, int64_t b, int64_t kv, int64_t first, void* scratch,
                      const void* zero_row, ChunkWeights& weights) {
  constexpr int L = int(kChunk), N = kWidth<T>;
  Arena arena{static_cast<char*>(scratch), 0};
  T* z = arena.take<T>(p.map_pad * L);
  if (!scratch) return arena.used;
  const WeighedKeys<T> keys(p, b, kv, first, z, zero_row);
  weights = {-1e30, 0, keys.count};
  if (keys.count == 0) return arena.used;
  auto sum = load<T, N>(keys.weight), most = sum;
  for (int i = N; i < L; i += N) {
    const auto w = load<T, N>(keys.weight + i);
    sum += w, most = max_lanes(most, w);
  }
  T top = most[0];
  SB_EACH (i, N) top = most[i] > top ? most[i] : top;
  if (top == T(0)) return arena.used;  // features that are all zero weigh nothing
  weights.top = double(keys.reference) + __builtin_log2(double(top)), weights.mass = sum_lanes<T, N>(sum) / top;
  return arena.used;
}

// `in_state` is what the keys of the state weigh together, log2. A key can be held only if it has kHeldShare of that
// and of all keys of the chunk below it; in the first chunk some keys have to be below it (half of kLeastInState: equal
// ones are in neither count).
template <class T>
bool key_weights(const AttentionParams& p, int64_t b, int64_t kv, int64_t first, double in_state, void* scratch,
                 const void* zero_row, double* log) {
  constexpr int L = int(kChunk), N = kWidth<T>;
  Arena arena{static_cast<char*>(scratch), 0};
  const WeighedKeys<T> keys(p, b, kv, first, arena.take<T>(p.map_pad * L), zero_row);
  for (int i = 0; i < L; ++i)
    log[i] = keys.kappa[i] > T(-1e29) ? double(keys.kappa[i]) + __builtin_log2(double(keys.norm[i])) : -1e30;
  const double before = in_state - double(keys.reference);
  const T rest = before > 100 ? T(1e30) : exp2s<T>(T(before));
  const Vector<T, N> one = splat<T, N>(T(1));
  for (int i = 0; i < L; ++i) {
    const auto w = splat<T, N>(keys.weight[i]);
    Vector<T, N> below{}, count{};
    for (int j = 0; j < L; j += N) {
      const auto other = load<T, N>(keys.weight + j);
      below += other < w ? other : Vector<T, N>{}, count += other < w ? one : Vector<T, N>{};
    }
    const bool enough = in_state > -1e29 || sum_lanes<T, N>(count) >= T(kLeastInState / 2);
    if (enough && keys.weight[i] > T(0) && keys.weight[i] >= T(kHeldShare) * (rest + sum_lanes<T, N>(below)) * T(0.999))
      return true;
  }
  return false;
}

}  // namespace sb::SB_ISA
