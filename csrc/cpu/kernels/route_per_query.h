// Routing per query: a list of blocks of kBranch keys, and a window.
#pragma once
#include "arena.h"
#include "gemm.h"
#include "route_groups.h"
#include "route_select.h"

namespace sb::SB_ISA {

struct PerQueryScratch {
  float *query, *super_score;          // (16, d + 1), (16, lanes)
  int32_t *key, *candidate;            // sortable scores: (units), (16, 8 (kept + 2))
  int32_t *chosen, *taken;             // superblocks of the candidates (16, kept + 2); positions taken
  uint16_t* wanted;                    // (superblocks): bit q says whether query q looks inside
  int64_t units, lanes, width, bytes;  // lanes: of the superblocks' panels
  int32_t guess[2] = {};               // for the searches of take_top

  SB_INLINE PerQueryScratch(const RouteParams& p, void* memory) {
    const int64_t supers = ceil_div(p.k_tokens, kBranch * kBranch);
    units = pad_to(supers, kLeaf), lanes = pad_to(supers * p.pools, kLeaf);
    width = candidate_superblocks(p.keys, p.window, p.pools) + 2;
    Arena arena{static_cast<char*>(memory), 0};
    query = arena.take<float>(kRoutedQueries * (p.head_dim + 1)),
    super_score = arena.take<float>(kRoutedQueries * lanes);
    key = arena.take<int32_t>(units), candidate = arena.take<int32_t>(kRoutedQueries * width * kBranch);
    chosen = arena.take<int32_t>(kRoutedQueries * width),
    taken = arena.take<int32_t>((width + 1) * kBranch + units + kRouteWidth);
    wanted = arena.take<uint16_t>(units);
    bytes = arena.used;
  }
};

// Of kBlockWidth runs, from the scores and numbers of keys of their groups; second groups lie `second` behind the first
// ones.
template <int kPools>
SB_INLINE BlockVec score_of(const float* score, const float* keys, int64_t second) {
  const BlockVec first = load_lanes<kBlockWidth>(score);
  if constexpr (kPools == 2)
    return log2_of_sum(load_lanes<kBlockWidth>(keys), first, load_lanes<kBlockWidth>(keys + second),
                       load_lanes<kBlockWidth>(score + second));
  return first;
}

// The lists of kRoutedQueries queries.
template <int kPools>
inline void route_per_query(const RouteParams& p, int64_t b, int64_t h, int64_t group, const float* panels,
                            PerQueryScratch& w) {
  const RowRange& range = p.rows[b];
  const int64_t length = int64_t(range.k_end) - range.k_first, count = ceil_div(length, kBranch),
                panel_size = p.panel_rows * kLeaf;
  const int64_t shift = (p.is_causal ? range.offset : 0) - int64_t(range.k_first),
                sink_blocks = ceil_div(p.sinks, kBranch), routed = (keys_of(p, h) - p.window) / kBranch - sink_blocks;
  const int64_t kept = candidate_superblocks(p.keys, p.window, kPools), depth = p.head_dim + 1,
                all_supers = ceil_div(count, kBranch);
  constexpr int kSupersOfPanel = kLeaf / kPools, kBlockLanes = kBranch * kPools;
  // Logs of two groups are added in base 2.
  const float unit_of_score = kPools == 2 ? float(kLog2e) : 1.0f;
  int64_t low[kRoutedQueries], high[kRoutedQueries], supers[kRoutedQueries], lists[kRoutedQueries] = {};
  int64_t first[kRoutedQueries];  // blocks before it hold the sinks
  bool live[kRoutedQueries], choose = false;
  for (int64_t s = 0; s < all_supers; ++s) w.wanted[s] = 0;

  // 1. Scaled queries, windows [low, high) in blocks, blocks of sinks, superblocks that may be listed from.
  for (int r = 0; r < kRoutedQueries; ++r) {
    const int64_t slot = group * kRoutedQueries + r, i = range.q_first + slot;
    float* query = w.query + r * depth;
    live[r] = i < range.q_end && !(p.q_mask && p.q_mask[b * p.q_tokens + i]);
    int64_t position = i + shift;
    if (!p.is_causal && p.q_tokens != p.k_tokens && live[r])
      position = slot * length / (int64_t(range.q_end) - range.q_first);
    live[r] = live[r] && !(p.is_causal && position < 0);
    if (!live[r]) {
      for (int64_t e = 0; e < depth; ++e) query[e] = 0;
      continue;
    }
    const float* row = p.q.at<const float>(b, h, i);
    BlockVec square{};
    for (int64_t e = 0; e < p.head_pad; e += kBlockWidth) {
      const BlockVec q = load_lanes<kBlockWidth>(row + e) * p.scale;
      square += q * q;
    }
    for (int64_t e = 0; e < p.head_dim; ++e) query[e] = row[e] * p.scale * unit_of_score;
    query[p.head_dim] = sum_lanes<float, kBlockWidth>(square) * (0.5f / float(p.head_dim)) * unit_of_score;
    if (p.is_causal) {
      const int64_t start = position - p.window + 1;
      low[r] = (start > 0 ? start : 0) / kBranch;
      high[r] = position / kBranch + 1;
    } else {
      const int64_t start = position - p.window / 2, end = position + p.window / 2;
      low[r] = (start > 0 ? start : 0) / kBranch;
      // Without a window no block is forced into the list.
      high[r] = p.window < 2 ? low[r] : -floor_div(-(end < length ? end : length), kBranch);
    }
    low[r] = clamp_to(low[r], 0, count), high[r] = clamp_to(high[r], low[r], count);
    first[r] = p.is_causal ? clamp_to(sink_blocks, 0, high[r]) : clamp_to(sink_blocks, 0, count);
    supers[r] = p.is_causal ? low[r] / kBranch : all_supers;
    choose = choose || supers[r] > kept;
  }

  // 2. The best superblocks of each query, and always the one that the window's start cuts.
  if (choose)
    for (int64_t lane = 0; lane < all_supers * kPools; lane += kLeaf)
      gemm<float, kWidth<float>, false>(
          kRoutedQueries, kLeaf, depth, Strided<float>{w.query, depth, 1},
          DenseRows<const float>{panels + p.level_offset[1] + lane / kLeaf * panel_size, kLeaf},
          DenseRows<float>{w.super_score + lane, w.lanes});
  const BlockVec never = splat<float, kBlockWidth>(-__builtin_inff());
  for (int r = 0; r < kRoutedQueries; ++r) {
    if (!live[r]) continue;
    const uint16_t bit = uint16_t(1u << r);
    if (supers[r] <= kept) {
      for (int64_t s = 0; s < supers[r]; ++s) w.wanted[s] |= bit;
    } else {
      const int64_t padded = pad_to(supers[r], kSupersOfPanel);
      for (int64_t s = 0; s < padded; s += kBlockWidth) {
        const BlockInts unit = lane_numbers<kBlockWidth>() + int32_t(s);
        const int64_t of_panel = s / kSupersOfPanel, lane = s % kSupersOfPanel;
        const float* keys_behind =
            panels + p.level_offset[1] + of_panel * panel_size + (p.panel_rows - 1) * kLeaf + lane;
        const BlockInts eligible = (unit < int32_t(supers[r])) & (load_lanes<kBlockWidth>(keys_behind) > 0.0f);
        const BlockVec score =
            score_of<kPools>(w.super_score + r * w.lanes + of_panel * kLeaf + lane, keys_behind, kSupersOfPanel);
        store_ints<kBlockWidth>(w.key + s, sortable<kBlockWidth>(eligible ? score : never));
      }
      const int64_t taken = take_top(w.key, padded, kept, w.taken, w.guess[0]);
      for (int64_t i = 0; i < taken; ++i) w.wanted[w.taken[i]] |= bit;
    }
    if (p.is_causal && low[r] % kBranch) w.wanted[low[r] / kBranch] |= bit;
  }

  // 3. Blocks of every superblock that some query wants, a few queries at a time.
  constexpr int kLanes = kPools == 2 ? kRouteWidth : kBlockWidth, kVectors = kBlockLanes / kLanes,
                kTogether = 8 / kVectors;
  for (int64_t s = 0; s < all_supers; ++s) {
    if (!w.wanted[s]) continue;
    const float* panel = panels + s * p.panel_rows * kBlockLanes;
    int rows[kRoutedQueries], n = 0;
    for (uint32_t bits = w.wanted[s]; bits; bits &= bits - 1) rows[n++] = __builtin_ctz(bits);
    for (int at = 0; at < n; at += kTogether) {
      const float* queries[kTogether];
      float score[kTogether * kBlockLanes];
      for (int i = 0; i < kTogether; ++i) queries[i] = w.query + rows[at + i < n ? at + i : at] * depth;
      micro<float, kLanes, kTogether, kVectors, false>(
          0, 0, depth, AcrossSteps<float, PointedRows<const float>>{{queries}},
          DenseRows<const float>{panel, kBlockLanes}, DenseRows<float>{score, kBlockLanes});
      for (int i = 0; i < kTogether && at + i < n; ++i) {
        const int r = rows[at + i];
        for (int lane = 0; lane < kBranch; lane += kBlockWidth) {
          const BlockInts unit = lane_numbers<kBlockWidth>() + int32_t(s * kBranch + lane);
          const BlockInts outside =
              p.is_causal ? unit < int32_t(low[r]) : (unit < int32_t(low[r])) | (unit >= int32_t(high[r]));
          const float* keys_behind = panel + (p.panel_rows - 1) * kBlockLanes + lane;
          const BlockInts eligible =
              outside & (unit >= int32_t(first[r])) & (load_lanes<kBlockWidth>(keys_behind) > 0.0f);
          const BlockVec of_block = score_of<kPools>(score + i * kBlockLanes + lane, keys_behind, kBranch);
          store_ints<kBlockWidth>(w.candidate + (r * w.width + lists[r]) * kBranch + lane,
                                  sortable<kBlockWidth>(eligible ? of_block : never));
        }
        w.chosen[r * w.width + lists[r]++] = int32_t(s);
      }
    }
  }

  // 4. The list: the sinks' blocks, then the best blocks with the window's blocks between them.
  for (int r = 0; r < kRoutedQueries; ++r) {
    if (!live[r]) continue;
    int32_t* candidate = w.candidate + r * w.width * kBranch;
    int64_t candidates = lists[r] * kBranch;
    for (; candidates % kRouteWidth; candidates += kBranch)
      for (int i = 0; i < kBranch; ++i) candidate[candidates + i] = kNever;
    const int64_t taken = take_top(candidate, candidates, routed, w.taken, w.guess[1]);
    const int64_t list = (b * p.q_heads + h) * p.blocks + group * kRoutedQueries + r;
    int32_t* out = p.index + list * p.capacity;
    int64_t n = 0, i = 0;
    const auto unit = [&](int64_t at) {
      return w.chosen[r * w.width + w.taken[at] / kBranch] * kBranch + w.taken[at] % kBranch;
    };
    const auto append = [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block)
        if (panels[(block / kBranch * p.panel_rows + p.panel_rows - 1) * kBlockLanes + block % kBranch] > 0)
          out[n++] = int32_t(block);
    };
    append(0, first[r]);
    for (; i < taken && unit(i) < low[r]; ++i) out[n++] = unit(i);
    append(low[r] > first[r] ? low[r] : first[r], high[r]);
    for (; i < taken; ++i) out[n++] = unit(i);
    p.count[list] = int32_t(n);
  }
}

}  // namespace sb::SB_ISA
