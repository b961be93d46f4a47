// Clusters of the keys of each key/value head (docs/algorithm.md, section 2): the nearest centre of every key, one
// representative key per cluster, and what a key weighs beside it.
#pragma once
#include <type_traits>

#include "clusters_of_segment.cuh"
#include "nearest_centres.cuh"

namespace sb::cuda {

template <class E>
using NearestCentres = std::conditional_t<std::is_same_v<E, double>, NearestByThreads, NearestByTiles>;

// Shared memory of a segment of keys: what finds their centres, the keys' a.k to base 2, and their order by cluster.
template <class E>
struct KeysMemory {
  typedef AccType<E> T;
  static SB_HD int64_t bytes(const ClusteringParams& p) { return at_keys(p) + SortedKeys::bytes(p.clusters); }
  NearestCentres<E> nearest;
  Shared<T> log;
  SortedKeys keys;
  SB_DEVICE explicit KeysMemory(const ClusteringParams& p)
      : nearest(p), log(shared_array<T>(NearestCentres<E>::bytes(p))), keys(at_keys(p), p.clusters) {}

 private:
  static SB_HD int64_t at_keys(const ClusteringParams& p) {
    return NearestCentres<E>::bytes(p) + kSegment * int64_t(sizeof(T));
  }
};

// The cluster and a.k of the keys of a segment, k less the samples' mean, and of every cluster with a key there the
// largest a.k, the sum of the keys' weights relative to it and the weighted sum of the keys.
template <class E>
SB_KERNEL SB_THREADS_AND_BLOCKS(kClusterThreads, (std::is_same_v<E, double> ? 1 : 2)) cluster_keys(ClusteringParams p) {
  typedef AccType<E> T;
  KeysMemory<E> memory(p);
  const int64_t d = p.head_dim, segments = p.k_slots - 1;
  for_each_task(p.batch * p.kv_heads * segments, [&](int64_t task) {
    const int64_t head = task / segments, b = head / p.kv_heads, kv = head % p.kv_heads;
    const RowRange range = load(p.rows + b);
    const TokenSegment tokens(task % segments, kSegment, range.k_first, range.k_end,
                              p.k_mask ? p.k_mask + b * p.k_tokens : nullptr);
    if (tokens.begin >= tokens.end) return;
    if (load(p.valid_before + b * p.k_slots + segments) == 0) return;  // no samples
    memory.nearest.take(head);
    memory.keys.clear(tokens.end - tokens.begin);
    sync_block();
    memory.nearest.template find<E>(
        tokens.end - tokens.begin,
        [&](int64_t place) -> const E* {
          const int64_t j = tokens.begin + place;
          return tokens.is_valid(j) ? p.k.at<const E>(b, kv, j) : nullptr;
        },
        [&](int64_t place, int32_t c, T dot) {
          const int64_t at = head * p.k_tokens + tokens.begin + place;
          store(p.index + at, c), store(static_cast<T*>(p.log_mass) + at, dot);
          memory.keys.set_key(place, c), memory.log.set(place, dot * T(kLog2e));
        });

    memory.keys.sort();
    sum_by_cluster(
        memory.keys, p.clusters, memory.log, d,
        [&](int64_t place) { return p.k.at<const E>(b, kv, tokens.begin + place); },
        [&](int64_t c, T top, T mass, const T* sum, int64_t) {
          const int64_t at = task * p.clusters + c;
          if (lane_index() == 0) store(static_cast<T*>(p.top) + at, top), store(static_cast<T*>(p.mass) + at, mass);
          for (int m = 0; m < kColumns; ++m) {
            const int64_t e = lane_index() + m * kWarp;
            if (e < d) store(static_cast<T*>(p.sums) + at * d + e, sum[m]);
          }
        });
    sync_block();
  });
}

// Representatives from the sums of the segments, a warp per cluster, and a.b of each, b less the samples' mean.
template <class T>
SB_KERNEL cluster_representatives(ClusteringParams p) {
  const int64_t rows = p.batch * p.kv_heads * p.clusters, d = p.head_dim;
  for_each_task(ceil_div(rows, kClusterWarps), [&](int64_t task) {
    const int64_t row = task * kClusterWarps + warp_index();
    if (row >= rows) return;
    const int64_t head = row / p.clusters, b = head / p.kv_heads;
    const RowRange range = load(p.rows + b);
    const bool has_keys = p.k_slots > 1 && load(p.valid_before + (b + 1) * p.k_slots - 1) > 0;
    const int64_t segments = has_keys ? ceil_div(int64_t(range.k_end) - range.k_first, kSegment) : 0;
    const auto at_segment = [&](int64_t s) { return (head * (p.k_slots - 1) + s) * p.clusters + row % p.clusters; };
    const ClusterHead<T> kept(p, head);
    T top = -T(INFINITY), total = T(0), sum[kColumns];
    for (int64_t s = lane_index(); s < segments; s += kWarp)
      top = larger(top, load(static_cast<const T*>(p.top) + at_segment(s)));
    top = warp_max(top);
    for (int m = 0; m < kColumns; ++m) sum[m] = T(0);
    for (int64_t s = 0; s < segments; ++s) {
      const int64_t at = at_segment(s);
      const T mass = load(static_cast<const T*>(p.mass) + at);
      if (mass == T(0)) continue;
      const T share = exp2_of(load(static_cast<const T*>(p.top) + at) - top);
      total += share * mass;
      for (int m = 0; m < kColumns; ++m) {
        const int64_t e = lane_index() + m * kWarp;
        if (e < d) sum[m] += share * load(static_cast<const T*>(p.sums) + at * d + e);
      }
    }
    T dot = T(0);
    for (int m = 0; m < kColumns; ++m) {
      const int64_t e = lane_index() + m * kWarp;
      if (e >= d) break;
      const T value = total == T(0) ? T(0) : sum[m] / total;
      if (has_keys)  // else there is no mean
        dot += (value - load(kept.mean + e)) * load(kept.query_mean + e);
      store(static_cast<T*>(p.representatives) + row * d + e, value);
    }
    dot = warp_sum(dot);
    if (lane_index() == 0) store(static_cast<T*>(p.dots) + row, dot);
  });
}

// kappa = a.k - a.b; -1 and 0 for what is ignored.
template <class T>
SB_KERNEL cluster_log_masses(ClusteringParams p) {
  for_each_element(p.batch * p.kv_heads * p.k_tokens, [&](int64_t at) {
    const int64_t j = at % p.k_tokens, head = at / p.k_tokens, b = head / p.kv_heads;
    const RowRange range = load(p.rows + b);
    T* log = static_cast<T*>(p.log_mass) + at;
    if (j < range.k_first || j >= range.k_end || (p.k_mask && load(p.k_mask + b * p.k_tokens + j))) {
      store(p.index + at, int32_t(-1)), store(log, T(0));
      return;
    }
    store(log, load(log) - load(static_cast<const T*>(p.dots) + head * p.clusters + load(p.index + at)));
  });
}

}  // namespace sb::cuda
