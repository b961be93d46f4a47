// Routing per query with two pools: the keys of a run in two groups, around the key that is farthest from the run's
// mean and around the one that is farthest from that. Rows of a panel here: the mean of a group, its variance, and the
// number of its keys. Second groups lie behind the lanes of all first ones, and a run that has keys has some in its
// first group.
#pragma once
#include "route_panel.h"

namespace sb::SB_ISA {

inline constexpr int kPairedSupers = kLeaf / 2;  // superblocks of a panel
inline constexpr int kMostPoints = 2 * kBranch;  // a superblock's: the groups of its blocks
inline constexpr float kLargestSpread = 1e38f;

// Rows of numbers that stand for `weight` keys each, which are `spread` apart (0: keys themselves).
struct Points {
  const float* row[kMostPoints];
  float weight[kMostPoints], spread[kMostPoints];
  int n = 0;
  SB_INLINE void add(const float* of, float keys, float apart) { row[n] = of, weight[n] = keys, spread[n++] = apart; }
};

// `width`: of a row with the zeros that end it, a multiple of kPad.
SB_INLINE float squared_distance(const float* a, const float* b, int64_t width) {
  RouteVec sum{};
  for (int64_t e = 0; e < width; e += kRouteWidth) {
    const RouteVec apart = load_lanes(a + e) - load_lanes(b + e);
    sum += apart * apart;
  }
  return sum_lanes<float, kRouteWidth>(sum);
}

// Writes the mean of some of the points, weight[i] of point i, and returns what they weigh.
SB_INLINE float write_mean(const Points& points, const float* weight, int64_t width, float* mean) {
  float count = 0;
  for (int i = 0; i < points.n; ++i) count += weight[i];
  const float share = count > 0 ? 1 / count : 0.0f;
  for (int64_t e = 0; e < width; e += kRouteWidth) {
    RouteVec sum{};
    for (int i = 0; i < points.n; ++i)
      if (weight[i] > 0) sum += weight[i] * load_lanes(points.row[i] + e);
    store<float, kRouteWidth>(mean + e, sum * share);
  }
  return count;
}
// Finite, unless it is no number: a query of zeros must not make it one.
SB_INLINE float spread_around(const Points& points, const float* weight, float count, int64_t width,
                              const float* mean) {
  float sum = 0;
  for (int i = 0; i < points.n; ++i)
    if (weight[i] > 0) sum += weight[i] / count * (points.spread[i] + squared_distance(points.row[i], mean, width));
  return sum > kLargestSpread ? kLargestSpread : sum;
}

// Writes the two groups of the points to lanes `lane` and `second` of a panel of `lanes`, and their means, `width`
// wide, to `means`, one behind the other; adds them to `groups`.
SB_INLINE void write_groups(const RouteParams& p, const Points& points, int64_t width, float* means, float* panel,
                            int64_t lanes, int64_t lane, int64_t second, Points* groups) {
  const auto farthest = [&](const float* from, float* distance) {
    int best = 0;
    for (int i = 0; i < points.n; ++i) {
      distance[i] = points.weight[i] > 0 ? squared_distance(points.row[i], from, width) : -1.0f;
      // The first one that has keys to begin with: a distance may be no number.
      if (points.weight[i] > 0 && (points.weight[best] == 0 || distance[i] > distance[best])) best = i;
    }
    return best;
  };
  float weight[2][kMostPoints], distance[2][kMostPoints];
  write_mean(points, points.weight, width, means);
  const int pole = farthest(means, distance[0]), other = farthest(points.row[pole], distance[0]);
  farthest(points.row[other], distance[1]);
  for (int i = 0; i < points.n; ++i) {
    const bool is_first = i == pole || !(distance[0][i] > distance[1][i]);
    weight[0][i] = is_first ? points.weight[i] : 0.0f, weight[1][i] = is_first ? 0.0f : points.weight[i];
  }
  for (int g = 0; g < 2; ++g) {
    float *const mean = means + g * width, *const to = panel + (g ? second : lane);
    const float count = write_mean(points, weight[g], width, mean),
                spread = spread_around(points, weight[g], count, width, mean);
    for (int64_t e = 0; e < p.head_dim; ++e) to[e * lanes] = mean[e];
    to[p.head_dim * lanes] = spread;
    to[(p.head_dim + 1) * lanes] = count;
    if (groups) groups->add(mean, count, spread);
  }
}

// Fills what routing looks at of the kBranch^2 keys from position `first` on: the panel of their blocks, and their
// lanes of the superblocks' panels at `supers`. Masked keys are not read. Scratch: kMostPoints + 2 rows.
SB_INLINE void group_panels(const RouteParams& p, int64_t b, int64_t kv, int64_t first, const float* zero_row,
                            float* blocks, float* supers, float* scratch) {
  const RowRange& range = p.rows[b];
  Points of_super;
  for (int block = 0; block < kBranch; ++block) {
    Points keys;
    for (int i = 0; i < kBranch; ++i) {
      const int64_t j = range.k_first + first + block * kBranch + i;
      const bool valid = j < range.k_end && !(p.k_mask && p.k_mask[b * p.k_tokens + j]);
      keys.add(valid ? p.k.at<const float>(b, kv, j) : zero_row, valid ? 1.0f : 0.0f, 0);
    }
    write_groups(p, keys, p.head_pad, scratch + 2 * block * p.head_pad, blocks, kMostPoints, block, kBranch + block,
                 &of_super);
  }
  // The first groups of all blocks, then the second ones.
  Points ordered;
  for (int g = 0; g < 2; ++g)
    for (int i = g; i < of_super.n; i += 2) ordered.add(of_super.row[i], of_super.weight[i], of_super.spread[i]);
  const int64_t super = first / (kBranch * kBranch), lane = super % kPairedSupers;
  float* panel = supers + super / kPairedSupers * p.panel_rows * kLeaf;
  float* means = scratch + kMostPoints * p.head_pad;
  write_groups(p, ordered, p.head_pad, means, panel, kLeaf, lane, kPairedSupers + lane, nullptr);
}

// log2 of x in [1, 2^23), exactly the exponent where x is a power of two.
SB_INLINE BlockVec log2_from_one(BlockVec x) {
  // x = m 2^n with m in [sqrt(1/2), sqrt(2)): the bits of sqrt(1/2) are subtracted before the exponent is read. Then
  // ln(m) = 2 atanh(t), and t is at most .172.
  const auto bits = (BlockInts)x;
  const BlockInts n = (bits - 0x3f3504f3) >> 23;
  const auto m = (BlockVec)(bits - (n << 23));
  const BlockVec t = (m - 1.0f) / (m + 1.0f), t2 = t * t;
  BlockVec sum = t2 * (1.0f / 9) + 1.0f / 7;
  sum = sum * t2 + 1.0f / 5, sum = sum * t2 + 1.0f / 3, sum = sum * t2 + 1.0f;
  return __builtin_convertvector(n, BlockVec) + sum * t * float(2 * kLog2e);
}

// log2(m 2^a + n 2^b), where m is not zero: runs whose keys weigh the same have exactly equal scores. What overflows
// stays infinite, and what is no number stays that.
SB_INLINE BlockVec log2_of_sum(BlockVec m, BlockVec a, BlockVec n, BlockVec b) {
  b = n > BlockVec{} ? b : a;
  const BlockVec top = max_lanes(a, b), lowest = splat<float, kBlockWidth>(-126.0f);
  const auto weight = [&](BlockVec of) SB_INLINE_LAMBDA {
    const BlockVec rest = of - top;  // no number where both are infinite
    return exp2v<kBlockWidth>(rest > lowest ? rest : of == top ? BlockVec{} : lowest);
  };
  const BlockVec sum = top + log2_from_one(m * weight(a) + n * weight(b));
  return a == a ? b == b ? sum : b : a;
}

}  // namespace sb::SB_ISA
