// The key side of routing: every run of keys as one key (docs/algorithm.md, section 3). A warp per run.
#pragma once
#include "../math/routing.h"
#include "low_rank.cuh"
#include "route_block.cuh"
#include "route_groups.cuh"

namespace sb::cuda {

inline constexpr int64_t kTopSegment = 512;  // keys whose largest log masses are found together

// The keys of a head's lists, or all that there are.
SB_DEVICE int64_t keys_of(const RoutingParams& p, int64_t h) {
  const int64_t own = p.head_keys ? int64_t(load(p.head_keys + h)) : p.keys;
  return own < p.keys ? own : p.keys;
}

// Whether the search of a row looks at means at all. Rows that have few runs take all of them.
SB_DEVICE bool needs_runs(const RoutingParams& p, int64_t length) {
  return p.block_k > 1 || ceil_div(length, kLeaf) > candidate_blocks(p.keys);
}

// Columns of a run.
struct RunColumns {
  int64_t square, y, kappa, mean_square, count;
  SB_DEVICE explicit RunColumns(const RoutingParams& p)
      : square(p.head_dim),
        y(square + 1),
        kappa(y + (p.has_low_rank() ? p.rank : 0)),
        mean_square(kappa + 1),
        count(mean_square + 1) {}
};

SB_DEVICE int64_t routed_cluster(const RoutingParams& p, int64_t head, int64_t j) {
  const int32_t c = load(p.cluster + head * p.k_tokens + j);
  return c < 0 ? 0 : c >= p.rank ? p.rank - 1 : c;
}
SB_DEVICE float routed_log_mass(const RoutingParams& p, int64_t head, int64_t j) {
  const float log = load(static_cast<const float*>(p.log_mass) + head * p.k_tokens + j) * float(kLog2e);
  const float limit = float(p.cluster_limit);
  return log > limit ? limit : log < -limit ? -limit : log;
}
// Log scale of a key; that of a cluster's key counts from the largest of the cluster.
SB_DEVICE float routed_kappa(const RoutingParams& p, const RouteRow& row, int64_t j) {
  if (!p.has_clusters()) return MapRow<float, float>(p.y_map, row.b, row.kv, j).log();
  const float top = load(p.cluster_top + row.head * p.rank + routed_cluster(p, row.head, j));
  return routed_log_mass(p, row.head, j) - top;
}

// -------------------- the largest log mass of every cluster

SB_KERNEL route_segment_tops(RoutingParams p) {
  const int64_t segments = ceil_div(p.k_tokens, kTopSegment);
  const auto log = shared_array<float>(0);
  const auto cluster = shared_array<int32_t>(kTopSegment * int64_t(sizeof(float)));
  for_each_task(p.batch * p.kv_heads * segments, [&](int64_t task) {
    const RouteRow row(p, task / segments);
    const int64_t begin = task % segments * kTopSegment;
    for (int64_t i = thread_index(); i < kTopSegment; i += kRouteThreads) {
      const bool is_valid = row.is_valid(begin + i);
      cluster.set(i, is_valid ? int32_t(routed_cluster(p, row.head, row.first + begin + i)) : -1);
      log.set(i, is_valid ? routed_log_mass(p, row.head, row.first + begin + i) : 0.0f);
    }
    sync_block();
    for (int64_t c = thread_index(); c < p.rank; c += kRouteThreads) {
      float top = float(kLowestLog);
      for (int64_t i = 0; i < kTopSegment; ++i)
        if (cluster.get(i) == c) top = larger(top, log.get(i));
      store(p.segment_top + task * p.rank + c, top);
    }
    sync_block();
  });
}

SB_DEVICE void route_cluster_top(const RoutingParams& p, int64_t at) {
  const int64_t segments = ceil_div(p.k_tokens, kTopSegment), head = at / p.rank, c = at % p.rank;
  float top = float(kLowestLog);
  for (int64_t s = 0; s < segments; ++s) top = larger(top, load(p.segment_top + (head * segments + s) * p.rank + c));
  store(p.cluster_top + at, top);
}

// -------------------- runs

// The run of p.fine_keys keys from `begin` on, at most a warp of them.
template <class E>
SB_DEVICE void write_fine_run(const RoutingParams& p, const RouteRow& row, int64_t begin, float* run) {
  if (p.has_groups()) return write_groups_of_keys<E>(p, row, begin, run);
  const RunColumns at(p);
  const int lane = lane_index();
  const int64_t j = row.first + begin + lane;
  const bool is_valid = lane < p.fine_keys && row.is_valid(begin + lane), is_first = lane == 0;
  const float total = warp_sum(is_valid ? 1.0f : 0.0f);
  if (is_first) store(run + at.count, total);
  if (total == 0.0f) return;
  const E* key = p.k.at<const E>(row.b, row.kv, is_valid ? j : row.first);
  float squares = 0, square_of_mean = 0;
  for (int64_t e = 0; e < p.head_dim; ++e) {
    const float value = is_valid ? float(widened(load(key + e))) : 0.0f, mean = warp_sum(value) / total;
    squares += value * value, square_of_mean += mean * mean;
    if (is_first) store(run + e, mean);
  }
  const float mean_square = warp_sum(squares) / total, spread = mean_square - square_of_mean;
  if (is_first) {
    store(run + at.mean_square, mean_square);
    store(run + at.square, p.block_k == 1 ? square_of_mean : spread > 0.0f ? spread : 0.0f);
  }
  if (!p.has_low_rank()) return;
  const float power = p.low_rank == LowRank::kQuadratic ? float(QuadraticKernel::kDegree) : 1.0f;
  const float kappa = is_valid ? routed_kappa(p, row, j) : float(kLowestLog), largest = warp_max(kappa);
  const float weight = is_valid ? exp2_of((kappa - largest) / power) : 0.0f, sum = warp_sum(weight);
  if (p.has_clusters()) {
    const int64_t own = is_valid ? routed_cluster(p, row.head, j) : -1;
    for (int64_t c = 0; c < p.rank; ++c) {
      const float share = warp_sum(own == c ? weight : 0.0f) / sum;
      if (is_first) store(run + at.y + c, share);
    }
  } else {
    const MapRow<float, float> y(p.y_map, row.b, row.kv, is_valid ? j : row.first);
    for (int64_t a = 0; a < p.rank; ++a) {
      const float mean = warp_sum(is_valid ? weight * y(a) : 0.0f) / sum;
      if (is_first) store(run + at.y + a, mean);
    }
  }
  if (is_first) store(run + at.kappa, largest + power * log2_of(sum / total));
}

template <class E>
SB_KERNEL route_fine_runs(RoutingParams p) {
  const int64_t runs = p.batch * p.kv_heads * p.fine_runs;
  for_each_task(ceil_div(runs, kRouteWarps), [&](int64_t task) {
    const int64_t run = task * kRouteWarps + warp_index();
    if (run >= runs) return;
    const RouteRow row(p, run / p.fine_runs);
    const int64_t begin = run % p.fine_runs * p.fine_keys;
    if (begin < row.length && needs_runs(p, row.length)) write_fine_run<E>(p, row, begin, p.fine + run * p.run_width);
  });
}

// A run of runs, which are at most a warp of them: means weighted by the keys behind them.
SB_DEVICE void write_coarse_run(const RoutingParams& p, const RouteRow& row, int64_t coarse, float* run) {
  if (p.has_groups()) return write_groups_of_runs(p, row, coarse, run);
  const RunColumns at(p);
  const int lane = lane_index();
  const int64_t of_run = p.coarse_keys / p.fine_keys, fine = coarse * of_run + lane;
  const bool exists = lane < of_run && fine * p.fine_keys < row.length, is_first = lane == 0;
  const float* from = p.fine + (row.head * p.fine_runs + (exists ? fine : coarse * of_run)) * p.run_width;
  const float count = exists ? load(from + at.count) : 0.0f, total = warp_sum(count);
  if (is_first) store(run + at.count, total);
  if (total == 0.0f) return;
  float square_of_mean = 0;
  for (int64_t e = 0; e < p.head_dim; ++e) {
    const float mean = warp_sum(count > 0.0f ? count * load(from + e) : 0.0f) / total;
    square_of_mean += mean * mean;
    if (is_first) store(run + e, mean);
  }
  const float mean_square = warp_sum(count > 0.0f ? count * load(from + at.mean_square) : 0.0f) / total,
              spread = mean_square - square_of_mean;
  if (is_first) {
    store(run + at.mean_square, mean_square);
    store(run + at.square, p.block_k == 1 ? square_of_mean : spread > 0.0f ? spread : 0.0f);
  }
  if (!p.has_low_rank()) return;
  const float power = p.low_rank == LowRank::kQuadratic ? float(QuadraticKernel::kDegree) : 1.0f;
  const float kappa = count > 0.0f ? load(from + at.kappa) : float(kLowestLog), largest = warp_max(kappa);
  const float weight = count > 0.0f ? count * exp2_of((kappa - largest) / power) : 0.0f, sum = warp_sum(weight);
  for (int64_t a = 0; a < p.rank; ++a) {
    const float mean = warp_sum(count > 0.0f ? weight * load(from + at.y + a) : 0.0f) / sum;
    if (is_first) store(run + at.y + a, mean);
  }
  if (is_first) store(run + at.kappa, largest + power * log2_of(sum / total));
}

SB_KERNEL route_coarse_runs(RoutingParams p) {
  const int64_t runs = p.batch * p.kv_heads * p.coarse_runs;
  for_each_task(ceil_div(runs, kRouteWarps), [&](int64_t task) {
    const int64_t run = task * kRouteWarps + warp_index();
    if (run >= runs) return;
    const RouteRow row(p, run / p.coarse_runs);
    const int64_t coarse = run % p.coarse_runs;
    const bool is_wanted = p.block_k > 1 || row.length >= kLongRow;
    if (is_wanted && coarse * p.coarse_keys < row.length && needs_runs(p, row.length))
      write_coarse_run(p, row, coarse, p.coarse + run * p.run_width);
  });
}

SB_KERNEL route_cluster_tops(RoutingParams p) {
  for_each_element(p.batch * p.kv_heads * p.rank, [&](int64_t at) { route_cluster_top(p, at); });
}

}  // namespace sb::cuda
