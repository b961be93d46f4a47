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

// The weights of the kChunk keys from `first` on.
template <class T>
int64_t key_weights(const AttentionParams& p, int64_t b, int64_t kv, int64_t first, void* scratch, const void* zero_row,
                    ChunkWeights& weights) {
  constexpr int L = int(kChunk), N = kWidth<T>;
  Arena arena{static_cast<char*>(scratch), 0};
  T* z = arena.take<T>(p.map_pad * L);
  if (!scratch) return arena.used;
  const auto kappa = log_scales<T>(p.kappa, b, kv);
  const T* y[L];
  T scale[L], log[L], top = T(-1e30);
  for (int i = 0; i < L; ++i) {
    const int64_t j = first + i;
    const bool valid = j < p.rows[b].k_end && !(p.k_mask && p.k_mask[b * p.k_tokens + j]);
    y[i] = valid ? p.y.at<const T>(b, kv, j) : static_cast<const T*>(zero_row);
    scale[i] = valid ? kappa(j) : T(-1e30);
  }
  transpose_rows<T, L>(y, p.rank, T(1), z);
  for (int i = 0; i < L; i += N) {
    Vector<T, N> square{};
    for (int64_t a = 0; a < p.rank; ++a) square += load<T, N>(z + a * L + i) * load<T, N>(z + a * L + i);
    visit_low_rank(p.low_rank,
                   [&](auto kernel) SB_INLINE_LAMBDA { store<T, N>(log + i, kernel.square_of_features(square)); });
  }
  log2_lanes<T, L>(log, log);
  for (int i = 0; i < L; ++i) {
    log[i] = scale[i] + T(0.5) * log[i];
    weights.log[i] = log[i];
    top = log[i] > top ? log[i] : top;
  }
  Vector<T, N> sum{};
  for (int i = 0; i < L; i += N) sum += exp2v<N>(load<T, N>(log + i) - top);
  weights.top = top, weights.mass = sum_lanes<T, N>(sum);
  return arena.used;
}

}  // namespace sb::SB_ISA
