// States (docs/algorithm.md, sections 2 and 4): sums over segments of keys, then their prefix sums, in a fixed order.
#pragma once
#include "low_rank.cuh"

namespace sb::cuda {

inline constexpr int kStateThreads = 128;
inline constexpr int64_t kFeatureTile = 64;  // features that one block sums

template <class T>
SB_DEVICE T* state_of(const ForwardParams& p, int64_t head, int64_t slot) {
  return static_cast<T*>(p.kv_state) + (head * p.slots + slot) * p.slot_size;
}

// A segment's keys in [begin, end), and which of them are not ignored.
struct Segment {
  int64_t b, kv, head, slot, begin, end;
  const uint8_t* mask;
  SB_DEVICE Segment(const ForwardParams& p, int64_t task) : head(task / (p.slots - 1)), slot(task % (p.slots - 1)) {
    b = head / p.kv_heads, kv = head % p.kv_heads;
    const RowRange range = load(p.rows + b);
    begin = range.k_first + slot * p.segment;
    end = begin + p.segment < range.k_end ? begin + p.segment : range.k_end;
    mask = p.k_mask ? p.k_mask + b * p.k_tokens : nullptr;
  }
  SB_DEVICE bool is_valid(int64_t j) const { return !(mask && load(mask + j)); }
};

// Whether nobody reads the states of a head.
SB_DEVICE bool is_unwanted(const ForwardParams& p, int64_t head) {
  return p.only_flagged && !load(p.any_flagged + head);
}

// The largest log mass of every cluster: a thread per cluster.
template <class M, class T>
SB_KERNEL cluster_logs(ForwardParams p) {
  for_each_element(p.batch * p.kv_heads * p.rank, [&](int64_t at) {
    const int64_t head = at / p.rank, c = at % p.rank, b = head / p.kv_heads;
    if (is_unwanted(p, head)) return;
    const RowRange range = load(p.rows + b);
    T top = T(kLowestLog);
    for (int64_t j = range.k_first; j < range.k_end; ++j) {
      if (p.k_mask && load(p.k_mask + b * p.k_tokens + j)) continue;
      if (cluster_of(p, head, j) == c) top = larger(top, log_mass_of<M, T>(p, head, j));
    }
    store(static_cast<T*>(p.cluster_log) + at, top);
  });
}

// Sums by cluster: a thread per column, which no other thread touches.
template <class E, class T>
SB_KERNEL cluster_segments(ForwardParams p) {
  typedef AccType<E> M;
  for_each_task(p.batch * p.kv_heads * (p.slots - 1), [&](int64_t task) {
    const Segment s(p, task);
    if (is_unwanted(p, s.head)) return;
    T* state = state_of<T>(p, s.head, s.slot + 1);
    const int64_t columns = p.value_pad + 1;
    for (int64_t e = thread_index(); e < columns; e += block_threads()) {
      for (int64_t c = 0; c < p.rank; ++c) store(state + c * columns + e, T(0));
      for (int64_t j = s.begin; j < s.end; ++j) {
        if (!s.is_valid(j)) continue;
        const int64_t c = cluster_of(p, s.head, j);
        const T weight =
            exp2_of(log_mass_of<M, T>(p, s.head, j) - load(static_cast<const T*>(p.cluster_log) + s.head * p.rank + c));
        const T value = e < p.value_pad ? T(widened(load(p.v.at<const E>(s.b, s.kv, j) + e))) : T(1);
        store(state + c * columns + e, load(state + c * columns + e) + weight * value);
      }
    }
    if (thread_index() == 0) store(static_cast<T*>(p.segment_log) + s.head * p.slots + s.slot + 1, T(0));
  });
}

// Sums of features: a block per segment and kFeatureTile features. Features of kChunk keys lie in shared memory as
// [feature][key], and every thread sums entries of the state over them.
template <class E, class T>
SB_KERNEL feature_segments(ForwardParams p) {
  typedef AccType<E> M;
  const int64_t tiles = ceil_div(p.features, kFeatureTile), columns = p.value_pad + 1;
  const auto features = shared_array<T>(0);
  const auto warp_tops = shared_array<T>(kFeatureTile * kChunk * int64_t(sizeof(T)));
  const auto valid = shared_array<int32_t>((kFeatureTile * kChunk + kStateThreads / kWarp) * int64_t(sizeof(T)));
  const int thread = thread_index();
  for_each_task(p.batch * p.kv_heads * (p.slots - 1) * tiles, [&](int64_t task) {
    const Segment s(p, task / tiles);
    if (is_unwanted(p, s.head)) return;
    const int64_t first = task % tiles * kFeatureTile,
                  count = first + kFeatureTile < p.features ? kFeatureTile : p.features - first;
    T* state = state_of<T>(p, s.head, s.slot + 1);

    // 1. The largest kappa.
    T top = T(kLowestLog);
    for (int64_t j = s.begin + thread; j < s.end; j += kStateThreads)
      if (s.is_valid(j)) top = larger(top, MapRow<M, T>(p.y_map, s.b, s.kv, j).log());
    top = warp_max(top);
    if (lane_index() == 0) warp_tops.set(warp_index(), top);
    sync_block();
    for (int w = 0; w < kStateThreads / kWarp; ++w) top = larger(top, warp_tops.get(w));
    if (thread == 0 && first == 0) store(static_cast<T*>(p.segment_log) + s.head * p.slots + s.slot + 1, top);

    // 2. kChunk keys at a time: exp(kappa - top) F(y), then sums.
    for (int64_t x = thread; x < count * columns; x += kStateThreads) store(state + first * columns + x, T(0));
    for (int64_t begin = s.begin; begin < s.end; begin += kChunk) {
      if (thread < kChunk) {
        const int64_t j = begin + thread;
        const bool is_valid = j < s.end && s.is_valid(j);
        valid.set(thread, is_valid);
        if (is_valid) {
          const MapRow<M, T> y(p.y_map, s.b, s.kv, j);
          const T weight = exp2_of(y.log() - top);
          visit_low_rank(p.low_rank, [&](auto kernel) SB_INLINE_LAMBDA {
            kernel.expand(p.rank, weight, y, [&](int64_t f, T value) {
              if (f >= first && f < first + count) features.set((f - first) * kChunk + thread, value);
            });
          });
        }
      }
      sync_block();
      for (int64_t x = thread; x < count * columns; x += kStateThreads) {
        const int64_t f = x / columns, e = x % columns;
        T sum = load(state + first * columns + x);
        for (int i = 0; i < kChunk; ++i) {
          if (!valid.get(i)) continue;
          const T value = e < p.value_pad ? T(widened(load(p.v.at<const E>(s.b, s.kv, begin + i) + e))) : T(1);
          sum += features.get(f * kChunk + i) * value;
        }
        store(state + first * columns + x, sum);
      }
      sync_block();
    }
    sync_block();
  });
}

// Prefix sums relative to the largest kappa so far: a thread per entry walks the segments in order.
template <class T>
SB_KERNEL state_prefixes(ForwardParams p) {
  const int64_t size = p.slot_size;
  for_each_element(p.batch * p.kv_heads * size, [&](int64_t at) {
    const int64_t head = at / size, x = at % size;
    if (is_unwanted(p, head)) return;
    T sum = T(0), log = T(kLowestLog);
    for (int64_t slot = 0; slot < p.slots; ++slot) {
      T* entry = state_of<T>(p, head, slot) + x;
      if (slot > 0) {
        const T of_segment = load(static_cast<const T*>(p.segment_log) + head * p.slots + slot);
        if (of_segment > T(kNoKeyLog)) {
          const T top = larger(log, of_segment);
          sum = sum * exp2_of(log - top) + load(entry) * exp2_of(of_segment - top);
          log = top;
        }
      }
      store(entry, sum);
      if (x == 0) store(static_cast<T*>(p.state_log) + head * p.slots + slot, log);
    }
  });
}

}  // namespace sb::cuda
