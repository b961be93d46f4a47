// Pooled routing: a block of queries shares a list of single keys. One or more pools, each the mean of some of its
// queries, stand for a block.
#pragma once
#include "arena.h"
#include "features.h"
#include "gathered_rows.h"
#include "route_select.h"

namespace sb::SB_ISA {

// The first search for the smallest score taken starts here: most end near a thirtieth of the largest score.
constexpr int32_t kFirstGuess = 0x3d000000;  // 2^-5 in sortable form

struct PooledScratch {
  float *pool, *x, *s, *t;  // (4, d + 1), (4, r), (4, units), (4, units)
  float *row, *exponent;    // a mean query, its exponents of clusters
  int32_t *key, *chunk;     // sortable scores; runs of lanes to score
  int32_t *taken, *blocks;  // positions taken; kept candidate blocks
  int64_t units, bytes;
  int32_t guess[3] = {kFirstGuess, kFirstGuess, kFirstGuess};  // for the searches of take_top
  float rho[kGroup], inverse[kGroup];
  bool live[kGroup];
  int64_t near_begin[kGroup], near_end[kGroup];  // positions of the window that is always listed, past the sinks
  int64_t sinks[kGroup];                         // positions before it are always listed
  int64_t limit[kGroup];                         // candidates lie before it

  SB_INLINE PooledScratch(const RouteParams& p, void* memory) {
    const auto larger = [](int64_t a, int64_t b) { return a > b ? a : b; };
    const int64_t supers = ceil_div(p.k_tokens, kRouteSegment), leaves = ceil_div(p.k_tokens, kLeaf);
    const int64_t kept = candidate_blocks(p.keys);
    const int64_t short_leaves = leaves < kLongRow / kLeaf ? leaves : kLongRow / kLeaf,
                  tail = kGroup * p.block_q / kLeaf + 2;
    units = larger(larger(supers, short_leaves) + kLeaf, larger((2 * kept + 2) * kSuper, (kept + tail) * kLeaf));
    units = pad_to(units, kLeaf);
    Arena arena{static_cast<char*>(memory), 0};
    pool = arena.take<float>(kGroup * (p.head_dim + 1)), x = arena.take<float>(kGroup * (p.rank + 1));
    row = arena.take<float>(p.head_pad), exponent = arena.take<float>(pad_to(p.rank, kPad));
    s = arena.take<float>(kGroup * units), t = arena.take<float>(kGroup * units);
    key = arena.take<int32_t>(units), chunk = arena.take<int32_t>(units);
    taken = arena.take<int32_t>(units + kRouteWidth), blocks = arena.take<int32_t>(units + kRouteWidth);
    bytes = arena.used;
  }
};

// x and rho at a mean query: the weights of clusters relative to the largest, and its exponent.
SB_INLINE void pool_clusters(const RouteParams& p, int64_t b, int64_t h, const float* mean, PooledScratch& w, float* x,
                             float* rho) {
  const int64_t kv = h / (p.q_heads / p.kv_heads);
  const float* largest = p.largest.at<const float>(b, kv, 0);
  for (int64_t e = 0; e < p.head_pad; ++e) w.row[e] = e < p.head_dim ? mean[e] : 0.0f;
  dot_rows<float>(p.rank, DenseRows<const float>{p.representatives.at<const float>(b, kv, 0), p.representatives.row},
                  w.row, p.head_pad, w.exponent);
  float peak = -1e30f;
  for (int64_t c = 0; c < p.rank; ++c) {
    w.exponent[c] = largest[c] <= -1e29f ? -1e30f : w.exponent[c] + largest[c];
    peak = w.exponent[c] > peak ? w.exponent[c] : peak;
  }
  for (int64_t c = p.rank; c < pad_to(p.rank, kPad); ++c) w.exponent[c] = -1e30f;
  for (int64_t c = 0; c < pad_to(p.rank, kPad); c += kRouteWidth)
    store<float, kRouteWidth>(w.exponent + c, exp2v<kRouteWidth>(load_lanes(w.exponent + c) - peak));
  for (int64_t c = 0; c < p.rank; ++c) x[c] = w.exponent[c];
  *rho = peak;
}

// Mean and variance of the valid queries in slots [first, end) of head (b, h), scaled into base 2, and their mean x and
// rho, or with clusters x and rho at their mean. False where there are none.
SB_INLINE bool pool_queries(const RouteParams& p, int64_t b, int64_t h, int64_t first, int64_t end, PooledScratch& w,
                            float* mean, float* x, float* rho) {
  const float* rows[2 * kPool];
  int64_t slots[2 * kPool], n = 0;
  for (int64_t i = first; i < end; ++i) {
    if (p.q_mask && p.q_mask[b * p.q_tokens + i]) continue;
    rows[n] = p.q.at<const float>(b, h, i);
    slots[n++] = i;
  }
  if (n == 0) return false;
  for (int64_t i = end; i < 2 * end - first && i < p.q_tokens; ++i)  // the next pool, most likely
    fetch_row(p.q.at<const float>(b, h, i), p.head_pad);
  const float scale = p.scale * float(kLog2e), share = 1.0f / float(n);
  constexpr int NV = int(kPad) / kBlockWidth;  // independent sums
  BlockVec variance[NV]{};
  for (int64_t e = 0; e < p.head_pad; e += kPad) {
    BlockVec sum[NV]{};
    for (int64_t i = 0; i < n; ++i)
      SB_EACH (v, NV) sum[v] += load_lanes<kBlockWidth>(rows[i] + e + v * kBlockWidth);
    SB_EACH (v, NV) sum[v] *= share;
    for (int64_t i = 0; i < n; ++i)
      SB_EACH (v, NV) {
        const BlockVec apart = load_lanes<kBlockWidth>(rows[i] + e + v * kBlockWidth) - sum[v];
        variance[v] += apart * apart;
      }
    float center[kPad];
    SB_EACH (v, NV) store<float, kBlockWidth>(center + v * kBlockWidth, sum[v] * scale);
    for (int64_t i = 0; i < kPad && e + i < p.head_dim; ++i) mean[e + i] = center[i];
  }
  SB_UNROLL
  for (int v = 1; v < NV; ++v) variance[0] += variance[v];
  // variance / 4 in natural units, the product in base 2.
  mean[p.head_dim] = sum_lanes<float, kBlockWidth>(variance[0]) * (p.scale * scale * share * 0.25f / float(p.head_dim));
  if (!p.has_low_rank()) return true;
  if (p.has_clusters()) {
    pool_clusters(p, b, h, mean, w, x, rho);
    return true;
  }
  for (int64_t e = 0; e < p.rank; e += kPad) {  // rows are padded
    BlockVec sum[NV]{};
    for (int64_t i = 0; i < n; ++i)
      SB_EACH (v, NV) sum[v] += load_lanes<kBlockWidth>(p.x.at<const float>(b, h, slots[i]) + e + v * kBlockWidth);
    float center[kPad];
    SB_EACH (v, NV) store<float, kBlockWidth>(center + v * kBlockWidth, sum[v] * share);
    for (int64_t i = 0; i < kPad && e + i < p.rank; ++i) x[e + i] = center[i];
  }
  float sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += *p.rho.at<const float>(b, h, slots[i]);
  *rho = sum * share;
  return true;
}

// s and x.y of the kGroup pools with runs of kLanes tokens, which are keys or means.
template <int kLanes, bool kKeys>
SB_INLINE void score_runs(const RouteParams& p, const PooledScratch& w, const float* level, const int32_t* chunk,
                          int64_t chunks) {
  constexpr int N = kWidth<float>, NV = kLanes / N >= 2 ? 2 : 1;
  const int64_t rows = kKeys ? p.key_rows : p.panel_rows;
  for (int64_t c = 0; c < chunks; ++c) {
    const int64_t unit = int64_t(chunk[c]) * kLanes;
    const float* panel = level + unit / kLeaf * rows * kLeaf + unit % kLeaf;
    if (kKeys && p.has_clusters()) {
      const float* cluster = panel + (p.head_dim + 1) * kLeaf;
      for (int g = 0; g < kGroup; ++g)
        for (int64_t lane = 0; lane < kLanes; lane += N) {
          const RouteInts number = load_ints(cluster + lane);
          RouteVec t;
          SB_EACH (i, N) t[i] = w.x[g * (p.rank + 1) + number[i]];
          store<float, N>(w.t + g * w.units + c * kLanes + lane, t);
        }
    }
    for (int64_t column = 0; column < kLanes; column += NV * N) {
      micro<float, N, kGroup, NV, false>(0, column, p.head_dim + 1, Strided<float>{w.pool, p.head_dim + 1, 1},
                                         DenseRows<const float>{panel, kLeaf},
                                         DenseRows<float>{w.s + c * kLanes, w.units});
      if (p.has_low_rank() && !(kKeys && p.has_clusters()))
        micro<float, N, kGroup, NV, false>(0, column, p.rank, Strided<float>{w.x, p.rank + 1, 1},
                                           DenseRows<const float>{panel + (p.head_dim + 1) * kLeaf, kLeaf},
                                           DenseRows<float>{w.t + c * kLanes, w.units});
    }
  }
}

// Turns row g of s into scores: |2^(s - M) - L 2^-M|, or s - M without a low-rank part, where M is the largest exponent
// of eligible tokens; for keys with clusters the expected squared residual over the pool's queries.
// Tokens before `first`, at or past `limit`, in [near_begin, near_end) or with no key behind them
// are not eligible and get -inf. Sets w.inverse to 1 / (largest score); with kKeys the scores go to w.key instead, in
// sortable form.
template <int kLanes, bool kKeys>
SB_INLINE void residuals(const RouteParams& p, PooledScratch& w, const float* level, const int32_t* chunk,
                         int64_t chunks, int g, int64_t first, int64_t limit, int64_t near_begin, int64_t near_end) {
  const RouteVec never = splat<float, kRouteWidth>(-__builtin_inff());
  const int64_t rows = kKeys ? p.key_rows : p.panel_rows, kappa_row = (rows - 2) * kLeaf,
                count_row = (rows - 1) * kLeaf;
  float *s = w.s + g * w.units, *t = w.t + g * w.units;
  RouteVec top = splat<float, kRouteWidth>(-1e30f), best{};
  const auto each = [&](const auto& visit) SB_INLINE_LAMBDA {
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t begin = int64_t(chunk[c]) * kLanes;
      const float* panel = level + begin / kLeaf * rows * kLeaf + begin % kLeaf;
      for (int64_t lane = 0; lane < kLanes; lane += kRouteWidth) {
        const RouteInts unit = lane_numbers() + int32_t(begin + lane);
        RouteInts eligible = (unit < int32_t(limit)) & ((unit < int32_t(near_begin)) | (unit >= int32_t(near_end))) &
                             (load_lanes(panel + count_row + lane) > 0.0f);
        if (first > 0) eligible &= unit >= int32_t(first);
        visit(c * kLanes + lane, panel + kappa_row + lane, eligible);
      }
    }
  };
  const bool has_low_rank = p.has_low_rank();
  const RuntimeKernel kernel{p.low_rank};
  each([&](int64_t at, const float* kappa, RouteInts eligible) SB_INLINE_LAMBDA {
    RouteVec exponent = load_lanes(s + at);
    if (has_low_rank) exponent = max_lanes(exponent, load_lanes(kappa) + w.rho[g]);
    top = max_lanes(eligible ? exponent : top, top);  // what is no number is passed over
  });
  float largest = top[0];
  SB_UNROLL
  for (int i = 1; i < kRouteWidth; ++i) largest = top[i] > largest ? top[i] : largest;
  if (kKeys && p.has_clusters()) {
    const float variance = w.pool[g * (p.head_dim + 1) + p.head_dim] * float(4 / kLog2e);
    each([&](int64_t at, const float* kappa, RouteInts eligible) SB_INLINE_LAMBDA {
      const RouteVec e = exp2v<kRouteWidth>(load_lanes(s + at) - largest),
                     L = exp2v<kRouteWidth>(load_lanes(kappa) + (w.rho[g] - largest)) * load_lanes(t + at);
      const RouteVec rest = e - L;
      store_ints(w.key + at, sortable(eligible ? rest * rest + e * e * (variance * load_lanes(kappa - kLeaf)) : never));
    });
    return;
  }
  each([&](int64_t at, const float* kappa, RouteInts eligible) SB_INLINE_LAMBDA {
    RouteVec score = load_lanes(s + at) - largest;
    if (has_low_rank) {
      const RouteVec L =
          exp2v<kRouteWidth>(load_lanes(kappa) + (w.rho[g] - largest)) * kernel.value(load_lanes(t + at));
      score = (RouteVec)((RouteInts)(exp2v<kRouteWidth>(score) - L) & 0x7fffffff);
      best = max_lanes(eligible ? score : best, best);
    }
    const RouteVec allowed = eligible ? score : never;
    if constexpr (kKeys)
      store_ints(w.key + at, sortable(allowed));
    else
      store<float, kRouteWidth>(s + at, allowed);
  });
  float most = 0;
  SB_EACH (i, kRouteWidth) most = best[i] > most ? best[i] : most;
  w.inverse[g] = most > 0 ? 1.0f / most : 1.0f;
}

// Turns row g of s into the keys' squared residuals, and sets w.inverse to 1 / (the pool's whole weight)^2, by which
// those of several pools are comparable. Keys at or past `limit`, or masked, count for nothing.
SB_INLINE void squared_residuals(const RouteParams& p, PooledScratch& w, const float* level, const int32_t* chunk,
                                 int64_t chunks, int g, int64_t limit) {
  const int64_t kappa_row = (p.key_rows - 2) * kLeaf, count_row = (p.key_rows - 1) * kLeaf;
  float *s = w.s + g * w.units, *t = w.t + g * w.units;
  const auto each = [&](const auto& visit) SB_INLINE_LAMBDA {
    for (int64_t c = 0; c < chunks; ++c) {
      const float* panel = level + int64_t(chunk[c]) * p.key_rows * kLeaf;
      for (int64_t lane = 0; lane < kLeaf; lane += kRouteWidth) {
        const RouteInts unit = lane_numbers() + int32_t(int64_t(chunk[c]) * kLeaf + lane);
        const RouteInts seen = (unit < int32_t(limit)) & (load_lanes(panel + count_row + lane) > 0.0f);
        visit(c * kLeaf + lane, panel + kappa_row + lane, seen);
      }
    }
  };
  const bool has_low_rank = p.has_low_rank();
  RouteVec top = splat<float, kRouteWidth>(-1e30f), weight{};
  each([&](int64_t at, const float* kappa, RouteInts seen) SB_INLINE_LAMBDA {
    RouteVec exponent = load_lanes(s + at);
    if (has_low_rank) exponent = max_lanes(exponent, load_lanes(kappa) + w.rho[g]);
    top = max_lanes(seen ? exponent : top, top);
  });
  float largest = top[0];
  SB_UNROLL
  for (int i = 1; i < kRouteWidth; ++i) largest = top[i] > largest ? top[i] : largest;
  const RuntimeKernel kernel{p.low_rank};
  const float variance = w.pool[g * (p.head_dim + 1) + p.head_dim] * float(4 / kLog2e);
  each([&](int64_t at, const float* kappa, RouteInts seen) SB_INLINE_LAMBDA {
    const RouteVec e = seen ? exp2v<kRouteWidth>(load_lanes(s + at) - largest) : RouteVec{};
    weight += e;
    RouteVec rest = e, spread{};
    if (has_low_rank) {
      const RouteVec x = load_lanes(t + at);
      rest -= exp2v<kRouteWidth>(load_lanes(kappa) + (w.rho[g] - largest)) * (p.has_clusters() ? x : kernel.value(x));
      if (p.has_clusters()) spread = e * e * (variance * load_lanes(kappa - kLeaf));
    }
    store<float, kRouteWidth>(s + at, seen ? rest * rest + spread : RouteVec{});
  });
  const float total = sum_lanes<float, kRouteWidth>(weight);
  w.inverse[g] = total > 0 ? 1.0f / (total * total) : 0.0f;
}

// Writes to w.key, in sortable form, what squared_residuals left of the live pools [g, g + p.pools), relative and
// summed. Tokens are eligible as in residuals.
SB_INLINE void sum_residuals(const RouteParams& p, PooledScratch& w, const float* level, const int32_t* chunk,
                             int64_t chunks, int g, int64_t first, int64_t limit, int64_t near_begin,
                             int64_t near_end) {
  const RouteVec never = splat<float, kRouteWidth>(-__builtin_inff());
  for (int64_t c = 0; c < chunks; ++c) {
    const float* count = level + (int64_t(chunk[c]) + 1) * p.key_rows * kLeaf - kLeaf;
    for (int64_t lane = 0; lane < kLeaf; lane += kRouteWidth) {
      const RouteInts unit = lane_numbers() + int32_t(int64_t(chunk[c]) * kLeaf + lane);
      const RouteInts eligible = (unit >= int32_t(first)) & (unit < int32_t(limit)) &
                                 ((unit < int32_t(near_begin)) | (unit >= int32_t(near_end))) &
                                 (load_lanes(count + lane) > 0.0f);
      RouteVec sum{};
      for (int64_t i = g; i < g + p.pools; ++i)
        if (w.live[i]) sum += load_lanes(w.s + i * w.units + c * kLeaf + lane) * w.inverse[i];
      store_ints(w.key + c * kLeaf + lane, sortable(eligible ? sum : never));
    }
  }
}

// Writes the n best tokens of the runs for the whole group. A token's score is the largest over the pools, each
// relative to the pool's own largest; the causal form uses those of the first block only.
template <int kLanes>
SB_INLINE int64_t shared_top(const RouteParams& p, PooledScratch& w, const float* level, const int32_t* chunk,
                             int64_t chunks, int64_t limit, int64_t n, int32_t* out) {
  score_runs<kLanes, false>(p, w, level, chunk, chunks);
  RouteVec factor[kGroup];
  int rows[kGroup], used = 0;
  for (int g = 0; g < kGroup; ++g) {
    if (!w.live[g] || (p.is_causal && used > 0 && g / p.pools != rows[0] / p.pools)) continue;
    residuals<kLanes, false>(p, w, level, chunk, chunks, g, 0, limit, 0, 0);
    rows[used] = g, factor[used++] = splat<float, kRouteWidth>(w.inverse[g]);
  }
  for (int64_t i = 0; i < chunks * kLanes; i += kRouteWidth) {
    const auto of_pool = [&](int r) { return sortable(load_lanes(w.s + rows[r] * w.units + i) * factor[r]); };
    RouteInts score = of_pool(0);
    for (int r = 1; r < used; ++r) score = max_lanes(of_pool(r), score);
    store_ints(w.key + i, score);
  }
  const int64_t taken = take_top(w.key, chunks * kLanes, n, out, w.guess[kLanes == kSuper ? 1 : 0]);
  for (int64_t i = 0; i < taken; ++i) out[i] = chunk[out[i] / kLanes] * kLanes + out[i] % kLanes;
  return taken;
}

// The candidates of a causal block that starts at `position` lie before this: its window, which holds the block's own
// keys, begins here.
SB_INLINE int64_t candidates_end(const RouteParams& p, int64_t position, int64_t length) {
  return clamp_to(position - (p.window > p.block_q ? p.window - p.block_q : 0), 0, length);
}

// Sets the sinks, the window and the limit of query block g, whose queries are [slot, end); query i stands at position
// i + shift.
SB_INLINE void place_window(const RouteParams& p, const RowRange& range, int64_t slot, int64_t end, int64_t shift,
                            int64_t g, PooledScratch& w) {
  const int64_t length = int64_t(range.k_end) - range.k_first;
  w.sinks[g] = p.sinks < length ? p.sinks : length, w.limit[g] = length;
  w.near_begin[g] = w.near_end[g] = 0;
  if (p.is_causal) {
    w.near_begin[g] = w.limit[g] = candidates_end(p, slot + shift, length);
    w.near_end[g] = clamp_to(end + shift, 0, length);
    if (w.sinks[g] > w.near_end[g]) w.sinks[g] = w.near_end[g];
  } else if (p.window > 0) {  // around the block's centre, shifted to lie behind the sinks and inside the row
    const int64_t queries = int64_t(range.q_end) - range.q_first;
    const int64_t centre = (2 * (slot - range.q_first) + p.block_q) * length / (2 * queries);
    const int64_t begin = centre - p.window / 2, last = length - p.window;
    w.near_begin[g] = begin < last ? begin : last;
    if (w.near_begin[g] < w.sinks[g]) w.near_begin[g] = w.sinks[g];
    w.near_end[g] = w.near_begin[g] + p.window < length ? w.near_begin[g] + p.window : length;
  } else if (p.q_tokens == p.k_tokens) {  // the queries are the keys: the block's own ones
    w.near_begin[g] = clamp_to(slot + shift, 0, length), w.near_end[g] = clamp_to(end + shift, 0, length);
  }
  if (w.near_begin[g] < w.sinks[g]) w.near_begin[g] = w.sinks[g];
  if (w.near_end[g] < w.near_begin[g]) w.near_end[g] = w.near_begin[g];
}

// The lists of the query blocks of one group.
inline void route_pooled(const RouteParams& p, int64_t b, int64_t h, int64_t group, const float* panels,
                         PooledScratch& w) {
  const RowRange& range = p.rows[b];
  const int64_t length = int64_t(range.k_end) - range.k_first,
                shift = (p.is_causal ? range.offset : 0) - int64_t(range.k_first);

  // 1. Pools: p.pools of them for each query block.
  const int pools = int(p.pools), blocks_here = kGroup / pools;
  bool live[kGroup];  // query blocks with a valid query
  int first_live = -1, last_live = -1;
  for (int t = 0; t < blocks_here; ++t) {
    const int64_t slot = range.q_first + (group * blocks_here + t) * p.block_q;
    const int64_t end = slot + p.block_q < range.q_end ? slot + p.block_q : range.q_end;
    int64_t pool_first = slot, pool_end = end > slot ? end : slot, size = p.block_q / pools;
    if (p.is_causal) {
      while (pool_first < pool_end && p.q_mask && p.q_mask[b * p.q_tokens + pool_first]) ++pool_first;
      if (pool_first < pool_end) {
        pool_end = pool_first + 1;
        pool_first = pool_end - kPool, size = kPool / pools;
      }
    }
    live[t] = false;
    for (int g = t * pools; g < (t + 1) * pools; ++g, pool_first += size) {
      float *mean = w.pool + g * (p.head_dim + 1), *x = w.x + g * (p.rank + 1);
      const int64_t from = pool_first > range.q_first ? pool_first : range.q_first,
                    to = pool_first + size < pool_end ? pool_first + size : pool_end;
      w.rho[g] = 0;
      w.live[g] = pool_queries(p, b, h, from, to, w, mean, x, &w.rho[g]);
      if (!w.live[g]) {
        for (int64_t e = 0; e <= p.head_dim; ++e) mean[e] = 0;
        for (int64_t e = 0; e <= p.rank; ++e) x[e] = 0;
      }
      live[t] |= w.live[g];
    }
    if (!live[t]) continue;
    place_window(p, range, slot, end, shift, t, w);
    if (first_live < 0) first_live = t;
    last_live = t;
  }
  if (first_live < 0) return;

  // 2. Candidate blocks: the best of those complete before the window of the group's first block (of all, without a
  // causal edge), in long rows within the best superblocks.
  const int64_t group_end =
      p.is_causal ? candidates_end(p, range.q_first + group * blocks_here * p.block_q + shift, length) : length;
  const int64_t complete = p.is_causal ? group_end / kLeaf : ceil_div(length, kLeaf), kept = candidate_blocks(p.keys);
  const auto all_runs = [&](int64_t tokens) {  // of kLeaf tokens
    for (int64_t run = 0; run * kLeaf < tokens; ++run) w.chunk[run] = int32_t(run);
    return ceil_div(tokens, kLeaf);
  };
  int64_t blocks = 0;
  if (complete <= kept) {
    for (; blocks < complete; ++blocks) w.blocks[blocks] = int32_t(blocks);
  } else if (length >= kLongRow) {
    const int64_t supers = p.is_causal ? group_end / kRouteSegment : ceil_div(length, kRouteSegment);
    const int64_t runs = all_runs(supers);
    int64_t taken =
        runs > 0 ? shared_top<kLeaf>(p, w, panels + p.level_offset[2], w.chunk, runs, supers, 2 * kept, w.blocks) : 0;
    for (int64_t i = 0; i < taken; ++i) w.chunk[i] = w.blocks[i];
    if (supers * kSuper < complete) w.chunk[taken++] = int32_t(supers);
    blocks = shared_top<kSuper>(p, w, panels + p.level_offset[1], w.chunk, taken, complete, kept, w.blocks);
  } else {
    blocks = shared_top<kLeaf>(p, w, panels + p.level_offset[1], w.chunk, all_runs(complete), complete, kept, w.blocks);
  }
  for (int64_t block = complete; block * kLeaf < w.limit[last_live]; ++block) w.blocks[blocks++] = int32_t(block);

  // 3. The sinks and the window, and the best of the candidates' keys.
  score_runs<kLeaf, true>(p, w, panels, w.blocks, blocks);
  for (int t = first_live; t <= last_live; ++t) {
    if (!live[t]) continue;
    if (pools == 1) {
      residuals<kLeaf, true>(p, w, panels, w.blocks, blocks, t, w.sinks[t], w.limit[t], w.near_begin[t], w.near_end[t]);
    } else {
      const int g = t * pools;
      for (int i = g; i < g + pools; ++i)
        if (w.live[i]) squared_residuals(p, w, panels, w.blocks, blocks, i, w.limit[t]);
      sum_residuals(p, w, panels, w.blocks, blocks, g, w.sinks[t], w.limit[t], w.near_begin[t], w.near_end[t]);
    }
    const uint8_t* mask = p.k_mask ? p.k_mask + b * p.k_tokens + range.k_first : nullptr;
    int64_t always = w.sinks[t] + w.near_end[t] - w.near_begin[t];
    for (int64_t j = 0; mask && j < w.sinks[t]; ++j) always -= mask[j] != 0;
    for (int64_t j = w.near_begin[t]; mask && j < w.near_end[t]; ++j) always -= mask[j] != 0;
    const int64_t taken = take_top(w.key, blocks * kLeaf, keys_of(p, h) - always, w.taken, w.guess[2]);
    if (blocks > 0 && w.blocks[blocks - 1] >= blocks)  // the blocks are not 0, 1, ...
      for (int64_t i = 0; i < taken; ++i)
        w.taken[i] = w.blocks[uint32_t(w.taken[i]) / kLeaf] * kLeaf + uint32_t(w.taken[i]) % kLeaf;
    // Ascending: the sinks, then the window between the candidates before and after it.
    const int64_t list = (b * p.q_heads + h) * p.blocks + group * blocks_here + t;
    int32_t* out = p.index + list * p.capacity;
    int64_t n = 0;
    const auto append = [&](int64_t begin, int64_t end) SB_INLINE_LAMBDA {
      for (int64_t j = begin; !mask && j < end; ++j) out[n + j - begin] = int32_t(j);
      if (!mask && begin < end) n += end - begin;
      for (int64_t j = begin; mask && j < end; ++j)
        if (!mask[j]) out[n++] = int32_t(j);
    };
    const int64_t before = lower_bound_key(w.taken, 0, taken, w.near_begin[t]);
    append(0, w.sinks[t]);
    for (int64_t i = 0; i < before; ++i) out[n + i] = w.taken[i];
    n += before;
    append(w.near_begin[t], w.near_end[t]);
    for (int64_t i = before; i < taken; ++i) out[n + i - before] = w.taken[i];
    p.count[list] = int32_t(taken + always);
  }
}

}  // namespace sb::SB_ISA
