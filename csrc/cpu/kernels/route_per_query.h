// Routing per query: a list of blocks of kBranch keys, and a window.
#pragma once
#include "arena.h"
#include "gemm.h"
#include "route_groups.h"
#include "route_windows.h"

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
  const QueryWindows windows(p, b, h, group);
  const int64_t panel_size = p.panel_rows * kLeaf, kept = candidate_superblocks(p.keys, p.window, kPools),
                depth = p.head_dim + 1, all_supers = ceil_div(windows.count, kBranch);
  constexpr int kSupersOfPanel = kLeaf / kPools, kBlockLanes = kBranch * kPools;
  // Logs of two groups are added in base 2.
  const float unit_of_score = kPools == 2 ? float(kLog2e) : 1.0f;
  int64_t supers[kRoutedQueries], lists[kRoutedQueries] = {};
  bool choose = false;
  for (int64_t s = 0; s < all_supers; ++s) w.wanted[s] = 0;

  // 1. Scaled queries, and superblocks that may be listed from.
  for (int r = 0; r < kRoutedQueries; ++r) {
    const float* row = windows.row[r];
    float* query = w.query + r * depth;
    if (!row) {
      for (int64_t e = 0; e < depth; ++e) query[e] = 0;
      continue;
    }
    BlockVec square{};
    for (int64_t e = 0; e < p.head_pad; e += kBlockWidth) {
      const BlockVec q = load_lanes<kBlockWidth>(row + e) * p.scale;
      square += q * q;
    }
    for (int64_t e = 0; e < p.head_dim; ++e) query[e] = row[e] * p.scale * unit_of_score;
    query[p.head_dim] = sum_lanes<float, kBlockWidth>(square) * (0.5f / float(p.head_dim)) * unit_of_score;
    supers[r] = p.is_causal ? windows.low[r] / kBranch : all_supers;
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
    if (!windows.row[r]) continue;
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
    if (p.is_causal && windows.low[r] % kBranch) w.wanted[windows.low[r] / kBranch] |= bit;
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
          const float* keys_behind = panel + (p.panel_rows - 1) * kBlockLanes + lane;
          const BlockInts eligible =
              windows.may_choose(p, r, s * kBranch + lane) & (load_lanes<kBlockWidth>(keys_behind) > 0.0f);
          const BlockVec of_block = score_of<kPools>(score + i * kBlockLanes + lane, keys_behind, kBranch);
          store_ints<kBlockWidth>(w.candidate + (r * w.width + lists[r]) * kBranch + lane,
                                  sortable<kBlockWidth>(eligible ? of_block : never));
        }
        w.chosen[r * w.width + lists[r]++] = int32_t(s);
      }
    }
  }

  // 4. The lists, from the best blocks.
  for (int r = 0; r < kRoutedQueries; ++r) {
    if (!windows.row[r]) continue;
    int32_t* candidate = w.candidate + r * w.width * kBranch;
    int64_t candidates = lists[r] * kBranch;
    for (; candidates % kRouteWidth; candidates += kBranch)
      for (int i = 0; i < kBranch; ++i) candidate[candidates + i] = kNever;
    const int64_t taken = take_top(candidate, candidates, windows.routed, w.taken, w.guess[1]);
    windows.write_list(
        p, b, h, group, r, taken,
        [&](int64_t i) {
          return w.chosen[r * w.width + w.taken[i] / kBranch] * int64_t(kBranch) + w.taken[i] % kBranch;
        },
        [&](int64_t block) {
          return panels[(block / kBranch * p.panel_rows + p.panel_rows - 1) * kBlockLanes + block % kBranch] > 0;
        });
  }
}

}  // namespace sb::SB_ISA
