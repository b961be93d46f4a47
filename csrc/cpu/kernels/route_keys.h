// The key side of routing: panels of the keys, and of means of keys, of one key/value head.
#pragma once
#include "features.h"
#include "route_groups.h"
#include "route_sketch.h"
#include "transpose.h"

namespace sb::SB_ISA {

// L of a run is formed from the mean of its keys' features y 2^(kappa / power), written as a y and a kappa again; the
// power is the degree of K.
SB_INLINE float mean_power(LowRank kind) {
  return visit_low_rank(kind, [](auto kernel) SB_INLINE_LAMBDA { return float(kernel.kDegree); });
}

// Writes the mean of n lanes of `from`, weighted by the keys behind them, to the first lane of `to`.
SB_INLINE void merge_lanes(const RouteParams& p, const float* from, int64_t from_lanes, int64_t n, float* to,
                           int64_t to_lanes) {
  const int64_t y_row = p.head_dim + 1, count_row = p.panel_rows - 1;
  float total = 0, weight[kLeaf], u[kLeaf];
  for (int64_t i = 0; i < n; ++i) total += weight[i] = from[count_row * from_lanes + i];
  if (total == 0) {
    for (int64_t row = 0; row < p.panel_rows; ++row) to[row * to_lanes] = 0;
    return;
  }
  const auto weighted = [&](int64_t row, const float* by) {
    BlockVec sum{};
    for (int64_t i = 0; i < n; i += kBlockWidth)
      sum += load_lanes<kBlockWidth>(by + i) * load_lanes<kBlockWidth>(from + row * from_lanes + i);
    return sum_lanes<float, kBlockWidth>(sum);
  };
  for (int64_t row = 0; row < y_row; ++row) to[row * to_lanes] = weighted(row, weight) / total;
  to[count_row * to_lanes] = total;
  if (!p.has_low_rank()) return;
  const float power = mean_power(p.low_rank);
  const float* kappa = from + (count_row - 1) * from_lanes;
  float largest = -1e30f, sum = 0;
  for (int64_t i = 0; i < n; ++i)
    if (weight[i] > 0 && kappa[i] > largest) largest = kappa[i];
  for (int64_t i = 0; i < n; ++i) u[i] = weight[i] > 0 ? (kappa[i] - largest) / power : -1e30f;
  for (int64_t i = 0; i < n; i += kBlockWidth)
    store<float, kBlockWidth>(u + i,
                              load_lanes<kBlockWidth>(weight + i) * exp2v<kBlockWidth>(load_lanes<kBlockWidth>(u + i)));
  for (int64_t i = 0; i < n; ++i) sum += u[i];
  for (int64_t row = y_row; row < count_row - 1; ++row) to[row * to_lanes] = weighted(row, u) / sum;
  to[(count_row - 1) * to_lanes] = largest + power * __builtin_log2f(sum / total);
}

// kLeaf keys as rows in memory. Masked keys point at a row of zeros and count 0.
struct KeyRows {
  const float *k[kLeaf], *y[kLeaf];
  float count[kLeaf], kappa[kLeaf];
  int32_t cluster[kLeaf];
};

// merge_lanes from n keys as rows, where sums go over whole vectors. `square` holds their |k|^2, whose mean is kept for
// finish_means; without it |mean|^2 is formed at once.
SB_INLINE void merge_rows(const RouteParams& p, const KeyRows& keys, int64_t first, int64_t n, const float* square,
                          float* to, int64_t to_lanes) {
  constexpr int NV = int(kPad) / kBlockWidth;  // independent sums
  const int64_t y_row = p.head_dim + 1, count_row = p.panel_rows - 1;
  const float *count = keys.count + first, *kappa = keys.kappa + first;
  const auto sum_of = [n](const float* values) {
    BlockVec sum{};
    for (int64_t i = 0; i < n; i += kBlockWidth) sum += load_lanes<kBlockWidth>(values + i);
    return sum_lanes<float, kBlockWidth>(sum);
  };
  const float total = sum_of(count);
  if (total == 0) {
    for (int64_t row = 0; row < p.panel_rows; ++row) to[row * to_lanes] = 0;
    return;
  }
  const auto means = [&](const float* const* rows, const float* weight, int64_t width, float divisor, float* target) {
    BlockVec squares[NV]{};
    for (int64_t e = 0; e < width; e += kPad) {
      BlockVec sum[NV]{};
      for (int64_t i = 0; i < n; ++i)
        SB_EACH (v, NV) sum[v] += weight[i] * load_lanes<kBlockWidth>(rows[i] + e + v * kBlockWidth);
      float mean[kPad];
      SB_EACH (v, NV) {
        sum[v] /= divisor, squares[v] += sum[v] * sum[v];
        store<float, kBlockWidth>(mean + v * kBlockWidth, sum[v]);
      }
      for (int64_t i = 0; i < kPad && e + i < width; ++i) target[(e + i) * to_lanes] = mean[i];
    }
    SB_UNROLL
    for (int v = 1; v < NV; ++v) squares[0] += squares[v];
    return sum_lanes<float, kBlockWidth>(squares[0]);
  };
  const float square_of_mean = means(keys.k + first, count, p.head_dim, total, to);  // rows of k end in zeros
  to[p.head_dim * to_lanes] = square ? sum_of(square) / total : square_of_mean;
  to[count_row * to_lanes] = total;
  if (!p.has_low_rank()) return;
  const float power = mean_power(p.low_rank);
  const BlockVec none = splat<float, kBlockWidth>(-1e30f);
  const auto present = [&](int64_t i, BlockVec v) {
    return load_lanes<kBlockWidth>(count + i) > BlockVec{} ? v : none;
  };
  BlockVec top = none;
  for (int64_t i = 0; i < n; i += kBlockWidth) top = max_lanes(top, present(i, load_lanes<kBlockWidth>(kappa + i)));
  float largest = top[0], u[kLeaf];
  SB_UNROLL
  for (int i = 1; i < kBlockWidth; ++i) largest = top[i] > largest ? top[i] : largest;
  for (int64_t i = 0; i < n; i += kBlockWidth)
    store<float, kBlockWidth>(u + i,
                              exp2v<kBlockWidth>(present(i, (load_lanes<kBlockWidth>(kappa + i) - largest) / power)));
  const float sum = sum_of(u);
  if (p.has_clusters()) {
    for (int64_t c = 0; c < p.rank; ++c) to[(y_row + c) * to_lanes] = 0;
    for (int64_t i = 0; i < n; ++i)
      if (count[i] > 0) to[(y_row + keys.cluster[first + i]) * to_lanes] += u[i] / sum;
  } else {
    means(keys.y + first, u, p.rank, sum, to + y_row * to_lanes);
  }
  to[(count_row - 1) * to_lanes] = largest + power * __builtin_log2f(sum / total);
}

// Replaces the mean of |k|^2 in `lanes` columns of a panel by |mean|^2, or with `spread` by their difference, the
// variance of the run.
SB_INLINE void finish_means(const RouteParams& p, float* panel, int64_t stride, int64_t lanes, bool spread) {
  float* square_row = panel + p.head_dim * stride;
  int64_t i = 0;
  for (; i + kBlockWidth <= lanes; i += kBlockWidth) {
    BlockVec part[4]{};
    for (int64_t e = 0; e < p.head_dim; ++e) {
      const BlockVec mean = load_lanes<kBlockWidth>(panel + e * stride + i);
      part[e % 4] += mean * mean;
    }
    const BlockVec square = (part[0] + part[1]) + (part[2] + part[3]),
                   rest = load_lanes<kBlockWidth>(square_row + i) - square;
    store<float, kBlockWidth>(square_row + i, !spread ? square : max_lanes(rest, BlockVec{}));
  }
  for (; i < lanes; ++i) {
    float part[4] = {};  // independent sums
    for (int64_t e = 0; e < p.head_dim; ++e) part[e % 4] += panel[e * stride + i] * panel[e * stride + i];
    const float square = (part[0] + part[1]) + (part[2] + part[3]), rest = square_row[i] - square;
    square_row[i] = !spread ? square : rest > 0 ? rest : 0.0f;
  }
}

// Fills a panel with the kLeaf keys from position `first` on. Masked keys are zero and count 0; their memory is not
// read.
SB_INLINE void key_panel(const RouteParams& p, int64_t b, int64_t kv, int64_t first, const float* zero_row,
                         KeyRows& keys, float* panel) {
  const RowRange& range = p.rows[b];
  const bool has_low_rank = p.has_low_rank(), has_clusters = p.has_clusters();
  const int32_t* cluster = has_clusters ? p.cluster + (b * p.kv_heads + kv) * p.k_tokens : nullptr;
  const auto kappa = log_scales<float>(p.kappa, b, kv);
  for (int i = 0; i < kLeaf; ++i) {
    const int64_t j = range.k_first + first + i;
    const bool valid = j < range.k_end && !(p.k_mask && p.k_mask[b * p.k_tokens + j]);
    keys.k[i] = valid ? p.k.at<const float>(b, kv, j) : zero_row;
    keys.cluster[i] = valid && has_clusters ? cluster[j] : 0;
    keys.y[i] = valid && has_low_rank && !has_clusters ? p.y.at<const float>(b, kv, j) : zero_row;
    keys.kappa[i] = valid && has_low_rank ? kappa(j) : 0.0f;
    keys.count[i] = valid ? 1.0f : 0.0f;
  }
  for (int i = 0; i < kLeaf; i += kRouteWidth)
    store<float, kRouteWidth>(panel + (p.key_rows - 1) * kLeaf + i, load_lanes(keys.count + i));
  transpose_rows<float, kLeaf>(keys.k, p.head_dim, 1.0f, panel);
  float* square_row = panel + p.head_dim * kLeaf;
  for (int i = 0; i < kLeaf; i += kRouteWidth) {
    RouteVec square{};
    for (int64_t e = 0; e < p.head_dim; ++e) {
      const RouteVec k = load_lanes(panel + e * kLeaf + i);
      square += k * k;
    }
    store<float, kRouteWidth>(square_row + i, square);
  }
  if (!p.has_low_rank()) return;
  float* y = square_row + kLeaf;
  if (has_clusters) {
    for (int i = 0; i < kLeaf; i += kRouteWidth) store_ints(y + i, load_ints(keys.cluster + i));
    for (int i = 0; i < kLeaf; ++i) {
      const float* representative = p.representatives.at<const float>(b, kv, keys.cluster[i]);
      RouteVec square{};
      for (int64_t e = 0; e < p.head_pad; e += kRouteWidth) {
        const RouteVec apart = load_lanes(keys.k[i] + e) - load_lanes(representative + e);
        square += apart * apart;
      }
      y[kLeaf + i] = sum_lanes<float, kRouteWidth>(square);
    }
  } else {
    transpose_rows<float, kLeaf>(keys.y, p.rank, 1.0f, y);
  }
  float* kappa_row = panel + (p.key_rows - 2) * kLeaf;
  for (int i = 0; i < kLeaf; i += kRouteWidth) store<float, kRouteWidth>(kappa_row + i, load_lanes(keys.kappa + i));
}

// Fills the panels of keys [segment * kRouteSegment, + kRouteSegment) of one key/value head, at every level. Scratch:
// as csrc/cpu/kernels.h has it.
inline void route_keys(const RouteParams& p, int64_t b, int64_t kv, int64_t segment, float* panels, float* scratch,
                       const float* zero_row) {
  const int64_t length = int64_t(p.rows[b].k_end) - p.rows[b].k_first, begin = segment * kRouteSegment;
  const int64_t end = length < begin + kRouteSegment ? length : begin + kRouteSegment,
                panel_size = p.panel_rows * kLeaf;
  KeyRows keys;
  if (p.block_k == 1) {
    // Only means that a search of this row looks at are formed.
    const bool has_blocks = ceil_div(length, kLeaf) > candidate_blocks(p.keys), has_supers = length >= kLongRow;
    for (int64_t first = begin; first < end; first += kLeaf) {
      const int64_t block = first / kLeaf;
      float* panel = panels + block * p.key_rows * kLeaf;
      float* mean = panels + p.level_offset[1] + block / kLeaf * panel_size + block % kLeaf;
      key_panel(p, b, kv, first, zero_row, keys, panel);
      if (!has_blocks) continue;
      merge_rows(p, keys, 0, kLeaf, nullptr, mean, kLeaf);
    }
    // Lanes of blocks past the row's end hold no key.
    if (!has_blocks) return;
    for (int64_t block = ceil_div(end, kLeaf); block < (begin + kRouteSegment) / kLeaf && end > begin; ++block)
      for (int64_t row = 0; row < p.panel_rows; ++row)
        panels[p.level_offset[1] + block / kLeaf * panel_size + row * kLeaf + block % kLeaf] = 0;
    if (end > begin && has_supers) {
      const int64_t first_block = begin / kLeaf;
      float* mean = panels + p.level_offset[2] + segment / kLeaf * panel_size + segment % kLeaf;
      merge_lanes(p, panels + p.level_offset[1] + first_block / kLeaf * panel_size + first_block % kLeaf, kLeaf, kSuper,
                  mean, kLeaf);
      finish_means(p, mean, kLeaf, 1, false);
    }
    return;
  }
  if (p.has_sketches()) {
    auto* panel = reinterpret_cast<SketchPanel*>(panels);
    for (int64_t first = begin; first < end; first += kBranch * kBranch)
      sketch_panel(p, b, kv, first, zero_row, scratch, panel[first / (kBranch * kBranch)]);
    return;
  }
  for (int64_t first = begin; first < end; first += kBranch * kBranch) {
    const int64_t super = first / (kBranch * kBranch);
    float* blocks = panels + super * p.panel_rows * kBranch * p.pools;
    if (p.has_groups()) {
      group_panels(p, b, kv, first, zero_row, blocks, panels + p.level_offset[1], scratch);
      continue;
    }
    for (int64_t half = 0; half < 2; ++half) {
      key_panel(p, b, kv, first + half * kLeaf, zero_row, keys, scratch);
      for (int64_t i = 0; i < kLeaf / kBranch; ++i)
        merge_rows(p, keys, i * kBranch, kBranch, scratch + p.head_dim * kLeaf + i * kBranch,
                   blocks + half * (kLeaf / kBranch) + i, kBranch);
    }
    float* mean = panels + p.level_offset[1] + super / kLeaf * panel_size + super % kLeaf;
    merge_lanes(p, blocks, kBranch, kBranch, mean, kLeaf);
    finish_means(p, mean, kLeaf, 1, true);
    finish_means(p, blocks, kBranch, kBranch, true);
  }
}

}  // namespace sb::SB_ISA
