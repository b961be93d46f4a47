// The key side of routing per query with two pools: the keys of a run in two groups, around the key that is farthest
// from the run's mean and around the one that is farthest from that. A run that has keys has some in its first group. A
// warp per run, a lane per point of it.
#pragma once
#include "../math/routing.h"
#include "route_block.cuh"

namespace sb::cuda {

// Keys of a row that count from its first one, and which of them are not ignored.
struct RouteRow {
  int32_t b, kv, head, first, length;
  const uint8_t* mask;
  SB_DEVICE RouteRow(const RoutingParams& p, int64_t head)
      : b(int32_t(head / p.kv_heads)), kv(int32_t(head % p.kv_heads)), head(int32_t(head)) {
    const RowRange range = load(p.rows + b);
    first = range.k_first, length = range.k_end - range.k_first;
    mask = p.k_mask ? p.k_mask + b * p.k_tokens + first : nullptr;
  }
  SB_DEVICE bool is_valid(int64_t key) const { return key < length && !(mask && load(mask + key)); }
};

// Columns of a group behind its mean: the variance of its keys, and their number.
struct GroupColumns {
  int64_t spread, count, width;
  SB_DEVICE explicit GroupColumns(const RoutingParams& p) : spread(p.head_dim), count(spread + 1), width(count + 1) {}
};

// Scores of groups are in base 2, for their sum.
SB_DEVICE float unit_of_score(const RoutingParams& p) { return p.has_groups() ? float(kLog2e) : 1.0f; }

// log2(m 2^a + n 2^b), where m is not zero: runs whose keys weigh the same have exactly equal scores. What overflows
// stays infinite, and what is no number stays that.
SB_DEVICE float log2_of_sum(float m, float a, float n, float b) {
  if (!(n > 0.0f)) b = a;
  if (a != a || b != b) return a + b;
  const float top = a > b ? a : b;
  const auto weight = [&](float of) { return of == top ? 1.0f : exp2_of(of - top); };
  return top + log2_of(m * weight(a) + n * weight(b));
}

// Points of a run, one of every lane below `n`, which stands for `weight` keys that are `spread` apart. value(i, e): of
// point i, read by all lanes, each for columns of its own, and only where the point has keys.
template <class Value>
class RunPoints {
 public:
  SB_DEVICE RunPoints(const RoutingParams& p, int n, float weight, float spread, const Value& value)
      : p(p), n(n), weight(lane < n ? weight : 0.0f), spread(lane < n ? spread : 0.0f), value(value) {}

  // Writes both groups to `run`.
  SB_DEVICE void write_groups(float* run) const {
    const GroupColumns at(p);
    if (warp_sum(weight) == 0.0f) {
      if (lane == 0) store(run + at.count, 0.0f), store(run + at.width + at.count, 0.0f);
      return;
    }
    write_mean(weight, run);
    const int pole = farthest(distances(run));
    const float from_pole = distances(pole);
    const float from_other = distances(farthest(from_pole));
    const bool is_first = lane == pole || !(from_pole > from_other);
    write_group(is_first ? weight : 0.0f, run), write_group(is_first ? 0.0f : weight, run + at.width);
  }

 private:
  // Squared distances of this lane's point from a row, which every lane reads its own columns of, or from a point.
  SB_DEVICE float distances(const float* from) const {
    return distances_from([&](int64_t e) { return load(from + e); });
  }
  SB_DEVICE float distances(int point) const {
    return distances_from([&](int64_t e) { return value(point, e); });
  }
  template <class From>
  SB_DEVICE float distances_from(const From& from) const {
    float own = 0;
    for (int i = 0; i < n; ++i) {
      if (shuffle_from(weight, i) == 0.0f) continue;
      float sum = 0;
      for (int64_t e = lane; e < p.head_dim; e += kWarp) {
        const float apart = value(i, e) - from(e);
        sum += apart * apart;
      }
      sum = warp_sum(sum);
      if (lane == i) own = sum;
    }
    return own;
  }
  SB_DEVICE int farthest(float distance) const {
    const float largest = warp_max(weight > 0.0f ? distance : -1.0f);
    const uint32_t found = ballot(weight > 0.0f && !(distance < largest));
    return found ? bits_set((found & (~found + 1)) - 1) : 0;
  }
  // Returns what the points weigh, and this lane's of it is `weights`.
  SB_DEVICE float write_mean(float weights, float* run) const {
    const float count = warp_sum(weights), share = count > 0.0f ? 1.0f / count : 0.0f;
    for (int64_t first = 0; first < p.head_dim; first += kWarp) {
      const int64_t e = first + lane;
      float sum = 0;
      for (int i = 0; i < n; ++i) {
        const float of = shuffle_from(weights, i);
        if (of > 0.0f && e < p.head_dim) sum += of * value(i, e);
      }
      if (e < p.head_dim) store(run + e, sum * share);
    }
    return count;
  }
  SB_DEVICE void write_group(float weights, float* run) const {
    const GroupColumns at(p);
    const float count = write_mean(weights, run), distance = distances(run),
                apart = warp_sum(weights > 0.0f ? weights / count * (spread + distance) : 0.0f);
    if (lane > 0) return;
    // Finite, unless it is no number: a query of zeros must not make it one.
    store(run + at.spread, apart > kLargestSpread ? kLargestSpread : apart), store(run + at.count, count);
  }

  static constexpr float kLargestSpread = 1e38f;
  const RoutingParams& p;
  const int lane = lane_index();
  const int n;
  const float weight, spread;
  const Value& value;
};

// The run of kBranch keys from `begin` on.
template <class E>
SB_DEVICE void write_groups_of_keys(const RoutingParams& p, const RouteRow& row, int64_t begin, float* run) {
  const auto value = [&](int i, int64_t e) {
    return float(widened(load(p.k.at<const E>(row.b, row.kv, row.first + begin + i) + e)));
  };
  const bool has_key = lane_index() < kBranch && row.is_valid(begin + lane_index());
  RunPoints(p, kBranch, has_key ? 1.0f : 0.0f, 0.0f, value).write_groups(run);
}

// The run of kBranch runs: its points are their groups, the first ones of all and then the second ones.
SB_DEVICE void write_groups_of_runs(const RoutingParams& p, const RouteRow& row, int64_t coarse, float* run) {
  const GroupColumns at(p);
  const auto group = [&](int i) {
    return p.fine + (row.head * p.fine_runs + coarse * kBranch + i % kBranch) * p.run_width + i / kBranch * at.width;
  };
  const auto value = [&](int i, int64_t e) { return load(group(i) + e); };
  const int lane = lane_index();
  const bool exists = lane < 2 * kBranch && (coarse * kBranch + lane % kBranch) * kBranch < row.length;
  const float count = exists ? load(group(lane) + at.count) : 0.0f;
  RunPoints(p, 2 * kBranch, count, count > 0.0f ? load(group(lane) + at.spread) : 0.0f, value).write_groups(run);
}

}  // namespace sb::cuda
