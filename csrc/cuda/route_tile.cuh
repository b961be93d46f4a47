// What routing on tensor cores makes once for all lists (numbers of keys and of runs, rows in parts of 16 bits), its
// products, and the largest scores in the registers of a warp.
#pragma once
#include "matrix.h"
#include "route_runs.cuh"

namespace sb::cuda {

inline constexpr int kRouteDepth = 32;  // columns of rows that two products take: a lane reads eight neighbours
inline constexpr int kRouteParts = 3;   // of bfloat16, which hold all digits of a float32

// What scores need of a row, a key or a run, beside its products: 32 rows lie side by side.
class RowNumbers {
 public:
  // |k|^2; the log scale; then y, or of a cluster's key its squared distance from the representative. Behind those of
  // a run: how many keys it has. Of a group of a run: its variance, and how many keys it has.
  static constexpr int64_t kSquare = 0, kKappa = 1, kRest = 2, kApart = kRest;
  static SB_DEVICE RowNumbers of_keys(const RoutingParams& p, int64_t head) {
    return {p.key_numbers + head * p.fine_runs * p.key_columns() * kWarp, p.key_columns()};
  }
  static SB_DEVICE RowNumbers of_runs(const RoutingParams& p, int level, int64_t head) {
    const int64_t runs = level ? p.coarse_runs : p.fine_runs;
    return {p.run_numbers[level] + head * ceil_div(runs * p.groups_of_run(), kWarp) * p.run_columns() * kWarp,
            p.run_columns()};
  }
  SB_DEVICE RowNumbers(float* data, int64_t columns) : columns(columns), data(data) {}
  SB_DEVICE float get(uint32_t row, int64_t column) const { return load(at(row, column)); }
  // Of the 32 rows from 32 `block` on: that of row i is `column` times 32 and i behind it.
  SB_DEVICE const float* rows(uint32_t block) const { return data + block * (columns * kWarp); }
  SB_DEVICE float count(uint32_t row) const { return get(row, columns - 1); }
  SB_DEVICE void set(uint32_t row, int64_t column, float value) const { store(at(row, column), value); }

 private:
  SB_DEVICE float* at(uint32_t row, int64_t column) const {
    return data + (row / kWarp * columns + column) * kWarp + row % kWarp;
  }
  const int64_t columns;
  float* const data;
};

// -------------------- made once

// By a warp: the keys of a leaf. What keys that are ignored hold is not read.
template <class E>
SB_DEVICE void write_key_numbers(const RoutingParams& p, const RouteRow& row, int64_t begin) {
  const int64_t key = begin + lane_index(), j = row.first + key;
  const RowNumbers numbers = RowNumbers::of_keys(p, row.head);
  const bool is_valid = row.is_valid(key);
  const E* of = p.k.at<const E>(row.b, row.kv, is_valid ? j : 0);
  const float* representative = nullptr;
  if (p.has_clusters() && is_valid)
    representative = static_cast<const float*>(p.given_representatives) +
                     (row.head * p.rank + routed_cluster(p, row.head, j)) * p.head_dim;
  float square = 0, apart = 0;
  for (int64_t e = 0; is_valid && e < p.head_dim; e += 8) {
    const FourWords eight = load(reinterpret_cast<const FourWords*>(of + e));
    SB_UNROLL
    for (int i = 0; i < 8; ++i) {
      const float value = i % 2 ? high_of(eight.at[i / 2], E{}) : low_of(eight.at[i / 2], E{});
      square += value * value;
      if (!representative) continue;
      const float distance = value - load(representative + e + i);
      apart += distance * distance;
    }
  }
  numbers.set(uint32_t(key), RowNumbers::kSquare, square);
  numbers.set(uint32_t(key), RowNumbers::kKappa, p.has_low_rank() && is_valid ? routed_kappa(p, row, j) : 0.0f);
  if (p.has_clusters()) {
    numbers.set(uint32_t(key), RowNumbers::kApart, apart);
  } else if (p.has_low_rank()) {
    const MapRow<float, float> y(p.y_map, row.b, row.kv, is_valid ? j : row.first);
    for (int64_t a = 0; a < p.rank; ++a) numbers.set(uint32_t(key), RowNumbers::kRest + a, is_valid ? y(a) : 0.0f);
  }
}

template <class E>
SB_KERNEL route_key_numbers(RoutingParams p) {
  const int64_t leaves = p.batch * p.kv_heads * p.fine_runs;
  for_each_task(ceil_div(leaves, kRouteWarps), [&](int64_t task) {
    const int64_t leaf = task * kRouteWarps + warp_index();
    if (leaf >= leaves) return;
    const RouteRow row(p, leaf / p.fine_runs);
    const int64_t begin = leaf % p.fine_runs * kLeaf;
    if (begin < row.length) write_key_numbers<E>(p, row, begin);
  });
}

// By a warp: a row of floats in parts.
SB_DEVICE void write_parts(const float* from, int64_t width, Bfloat16* to) {
  for (int64_t e = 2 * lane_index(); e < width; e += 2 * kWarp) {
    uint32_t parts[kRouteParts];
    split(load(from + e), load(from + e + 1), parts, Bfloat16{});
    for (int i = 0; i < kRouteParts; ++i) store(reinterpret_cast<uint32_t*>(to + i * width + e), parts[i]);
  }
}

SB_DEVICE void write_run_parts(const RoutingParams& p, int level, int64_t at) {
  const int64_t runs = level ? p.coarse_runs : p.fine_runs, run = at % runs;
  const RouteRow row(p, at / runs);
  const bool is_wanted = level == 0 || p.block_k > 1 || row.length >= kLongRow;
  if (!is_wanted || run * (level ? p.coarse_keys : p.fine_keys) >= row.length || !needs_runs(p, row.length)) return;
  const RunColumns from(p);
  const RowNumbers numbers = RowNumbers::of_runs(p, level, row.head);
  const float* mean = (level ? p.coarse : p.fine) + at * p.run_width;
  if (p.has_groups()) {
    const GroupColumns of(p);
    for (int64_t g = 0; g < 2; ++g, mean += of.width) {
      const auto to = uint32_t(2 * run + g);
      const float keys = load(mean + of.count);
      if (lane_index() == 0) numbers.set(to, p.run_columns() - 1, keys);
      if (keys == 0.0f && g == 0) return;  // neither has any
      write_parts(mean, p.head_dim, p.run_parts[level] + (2 * at + g) * kRouteParts * p.head_dim);
      if (lane_index() == 0) numbers.set(to, RowNumbers::kSquare, load(mean + of.spread));
    }
    return;
  }
  const float count = load(mean + from.count);
  if (lane_index() == 0) numbers.set(uint32_t(run), p.run_columns() - 1, count);
  if (count == 0.0f) return;
  write_parts(mean, p.head_dim, p.run_parts[level] + at * kRouteParts * p.head_dim);
  if (lane_index() == 0) {
    numbers.set(uint32_t(run), RowNumbers::kSquare, load(mean + from.square));
    if (p.has_low_rank()) numbers.set(uint32_t(run), RowNumbers::kKappa, load(mean + from.kappa));
  }
  if (!p.has_low_rank()) return;
  for (int64_t a = lane_index(); a < p.rank; a += kWarp)
    numbers.set(uint32_t(run), RowNumbers::kRest + a, load(mean + from.y + a));
}

// Means of runs, those of long rows and per query also of coarse ones, and representatives; a warp each.
SB_KERNEL route_parts(RoutingParams p) {
  const int64_t heads = p.batch * p.kv_heads, fine = heads * p.fine_runs,
                runs = fine + (p.run_parts[1] ? heads * p.coarse_runs : 0),
                rows = runs + (p.has_clusters() ? heads * p.rank : 0);
  for_each_task(ceil_div(rows, kRouteWarps), [&](int64_t task) {
    const int64_t at = task * kRouteWarps + warp_index();
    if (at >= rows) return;
    if (at >= runs)
      write_parts(static_cast<const float*>(p.given_representatives) + (at - runs) * p.head_dim, p.head_dim,
                  p.cluster_parts + (at - runs) * kRouteParts * p.head_dim);
    else
      write_run_parts(p, at < fine ? 0 : 1, at < fine ? at : at - fine);
  });
}

// -------------------- products

// Four pools as the left operand, in rows of 16: pool r % 4 in row r, its part r / 4; the last four rows are zeros.
class PoolOperand {
 public:
  static constexpr int kUnit = 8;  // columns that lie in kCopyBytes
  static constexpr uint32_t kNoRow = 0xffffffff;
  static SB_HD int64_t bytes(int64_t width) { return ceil_div(width, kRouteDepth) * 2 * kWarp * kCopyBytes; }
  SB_DEVICE PoolOperand(int64_t offset) : words(shared_array<FourWords>(offset)) {}

  // By all threads of a block. pool(g, e): of pool g; zero for e >= width.
  template <class Part, class Pool>
  SB_DEVICE void write(int64_t width, const Pool& pool) const {
    const int g = lane_index() / 4, t = lane_index() % 4;
    for (int64_t step = warp_index(); step < 2 * ceil_div(width, kRouteDepth); step += kRouteWarps) {
      const int64_t e = column(step, t);
      uint32_t low[kRouteParts], high[kRouteParts];
      split(pool(g % 4, e), pool(g % 4, e + 1), low, Part{});
      split(pool(g % 4, e + 2), pool(g % 4, e + 3), high, Part{});
      const bool is_third = g < 4;  // this lane has the first part, and the third eight rows below
      words.set(step * kWarp + lane_index(), FourWords{{is_third ? low[0] : low[1], is_third ? low[2] : 0,
                                                        is_third ? high[0] : high[1], is_third ? high[2] : 0}});
    }
  }

  // Products with 32 rows of `width` columns, each a sum of kOfRow parts that follow one another. row(i): where row i
  // begins, in kCopyBytes behind `from`, or kNoRow for zeros. Of this lane's pool with rows 8 n + kept_row() for n = 0,
  // .., 3.
  template <int kOfRow, class Part, class Row>
  SB_DEVICE void multiply(int width, const void* from, const Row& row, float (&product)[4]) const {
    const int g = lane_index() / 4, t = lane_index() % 4, units = width / kUnit;
    float sum[4][4];
    uint32_t begin[4];
    SB_UNROLL
    for (int n = 0; n < 4; ++n) {
      begin[n] = row(8 * n + g);
      SB_UNROLL
      for (int i = 0; i < 4; ++i) sum[n][i] = 0;
    }
    SB_NO_UNROLL
    for (int part = kOfRow - 1; part >= 0; --part) {
      SB_NO_UNROLL
      for (int unit = t; unit - t < units; unit += kRouteDepth / kUnit) {
        FourWords right[4];
        SB_UNROLL
        for (int n = 0; n < 4; ++n)
          right[n] = begin[n] != kNoRow && unit < units
                         ? load(static_cast<const FourWords*>(from) + begin[n] + (part * units + unit))
                         : FourWords{{0, 0, 0, 0}};
        SB_UNROLL
        for (int s = 0; s < 2; ++s) {
          const FourWords left = words.get(((unit - t) / 2 + s) * kWarp + lane_index());
          SB_UNROLL
          for (int n = 0; n < 4; ++n) multiply_add(sum[n], left.at, right[n].at[2 * s], right[n].at[2 * s + 1], Part{});
        }
      }
    }
    // Lanes of rows 0 to 3 have two parts of a pool, those of rows 4 to 7 the third. Each gets the whole of one row.
    SB_UNROLL
    for (int n = 0; n < 4; ++n) {
      const float others = shuffle_xor(g < 4 ? sum[n][1] + sum[n][3] : sum[n][0], kWarp / 2);
      product[n] = g < 4 ? sum[n][0] + (sum[n][2] + others) : others + sum[n][1];
    }
  }
  static SB_DEVICE int pool() { return lane_index() / 4 % 4; }
  static SB_DEVICE int kept_row() { return lane_index() % 4 * 2 + lane_index() / 16; }

 private:
  // Columns 2t, 2t + 1, 2t + 8 and 2t + 9 of two products are four neighbours each, and the second's follow the
  // first's.
  static SB_DEVICE int64_t column(int64_t step, int t) { return step / 2 * kRouteDepth + 8 * t + step % 2 * 4; }
  const Shared<FourWords> words;
};

// -------------------- choosing by a warp

// Takes the n largest of the keys that a warp holds, position 32 i + lane in key[i] for i < rows: ties go to the
// lowest, kNever is never taken. Calls take(order, i, key) in the lane and for the i of every one, in the order of
// positions, and returns their number.
template <int kRows, class Take>
SB_DEVICE int32_t take_top_of_warp(const int32_t (&key)[kRows], int rows, int64_t n, const Take& take) {
  constexpr int kUnit = 4;  // rows are looked at by fours
  const auto count = [&](const auto& is_counted) {
    int32_t hits = 0;
    SB_UNROLL
    for (int unit = 0; unit < kRows; unit += kUnit) {
      if (unit >= rows) continue;
      SB_UNROLL
      for (int i = unit; i < unit + kUnit; ++i) hits += is_counted(key[i]) ? 1 : 0;
    }
    return warp_total(hits);
  };
  if (n <= 0) return 0;
  // At least n keys are >= low, fewer are > high; or all that count are wanted.
  int32_t low = kNever + 1, high = 0x7fffffff, hits = count([&](int32_t k) { return k >= low; });
  while (hits > n && low < high) {
    const auto middle = int32_t(uint32_t(low) + (uint32_t(high) - uint32_t(low) + 1) / 2);
    const int32_t above = count([&](int32_t k) { return k >= middle; });
    if (above >= n)
      low = middle, hits = above;
    else
      high = middle - 1;
  }
  // Some keys that equal `low` may be too many.
  int32_t ties = hits > n ? int32_t(n) - count([&](int32_t k) { return k > low; }) : hits;
  const uint32_t before = (uint32_t(1) << lane_index()) - 1;
  int32_t taken = 0;
  SB_UNROLL
  for (int i = 0; i < kRows; ++i) {
    if (i >= rows) continue;
    const uint32_t equal = ballot(key[i] == low);
    const bool is_taken = key[i] > low || (key[i] == low && bits_set(equal & before) < ties);
    const uint32_t all = ballot(is_taken);
    if (is_taken) take(taken + bits_set(all & before), i, key[i]);
    taken += bits_set(all), ties -= bits_set(equal);
  }
  return taken;
}

// By a warp: in place of `count` keys and their names in global memory the n largest, in their order, ties to the
// first; returns how many they are. What does not fit into registers comes in turn, behind the best of what came
// before, which take the first places. n is at most half of what registers hold. next_key and next_name: working memory
// for n of each.
template <int kRows>
SB_DEVICE int32_t take_in_turn(int32_t* key, int32_t* name, int count, int64_t n, int32_t* next_key,
                               int32_t* next_name) {
  const int lane = lane_index();
  int begin = 0, taken = 0;
  SB_NO_UNROLL
  do {
    const int room = kRows * kWarp - taken, more = count - begin < room ? count - begin : room, all = taken + more,
              skipped = begin - taken;
    const auto place = [&](int i) { return i * kWarp + lane + (i * kWarp + lane < taken ? 0 : skipped); };
    int32_t own[kRows];
    SB_UNROLL
    for (int i = 0; i < kRows; ++i) own[i] = i * kWarp + lane < all ? load(key + place(i)) : kNever;
    taken = take_top_of_warp(own, int(ceil_div(all, kWarp)), n, [&](int32_t order, int i, int32_t of) {
      store(next_key + order, of), store(next_name + order, load(name + place(i)));
    });
    sync_warp();
    for (int i = lane; i < taken; i += kWarp) store(key + i, load(next_key + i)), store(name + i, load(next_name + i));
    sync_warp();
    begin += more;
  } while (begin < count);
  return taken;
}

}  // namespace sb::cuda
