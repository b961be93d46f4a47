// What lists of single queries have in common: which blocks of kBranch keys lie near a query, and how a list is
// written.
#pragma once
#include "route_select.h"

namespace sb::SB_ISA {

// Of kRoutedQueries queries, in blocks of keys: the windows [low, high), and `first`, before which are the sinks.
struct QueryWindows {
  int64_t low[kRoutedQueries], high[kRoutedQueries], first[kRoutedQueries];
  const float* row[kRoutedQueries];  // of a query that has a list, else null
  int64_t count, routed;             // blocks of the row; blocks to choose

  SB_INLINE QueryWindows(const RouteParams& p, int64_t b, int64_t h, int64_t group) {
    const RowRange& range = p.rows[b];
    const int64_t length = int64_t(range.k_end) - range.k_first, sink_blocks = ceil_div(p.sinks, kBranch),
                  shift = (p.is_causal ? range.offset : 0) - int64_t(range.k_first);
    count = ceil_div(length, kBranch), routed = (keys_of(p, h) - p.window) / kBranch - sink_blocks;
    for (int r = 0; r < kRoutedQueries; ++r) {
      const int64_t slot = group * kRoutedQueries + r, i = range.q_first + slot;
      bool is_live = i < range.q_end && !(p.q_mask && p.q_mask[b * p.q_tokens + i]);
      int64_t position = i + shift;
      if (!p.is_causal && p.q_tokens != p.k_tokens && is_live)
        position = slot * length / (int64_t(range.q_end) - range.q_first);
      is_live = is_live && !(p.is_causal && position < 0);
      row[r] = is_live ? p.q.at<const float>(b, h, i) : nullptr;
      low[r] = high[r] = first[r] = 0;
      if (!is_live) continue;
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
      first[r] = clamp_to(sink_blocks, 0, p.is_causal ? high[r] : count);
    }
  }
  // Of blocks from `begin` on: whether query r may choose them.
  SB_INLINE BlockInts may_choose(const RouteParams& p, int r, int64_t begin) const {
    const BlockInts unit = lane_numbers<kBlockWidth>() + int32_t(begin);
    const BlockInts outside =
        p.is_causal ? unit < int32_t(low[r]) : (unit < int32_t(low[r])) | (unit >= int32_t(high[r]));
    return outside & (unit >= int32_t(first[r])) & (unit < int32_t(count));
  }

  // Writes the list of query r: the sinks' blocks, then the `taken` chosen ones, chosen(i) ascending, with the window's
  // blocks between them. Blocks that have no key are left out.
  template <class Chosen, class HasKeys>
  SB_INLINE void write_list(const RouteParams& p, int64_t b, int64_t h, int64_t group, int r, int64_t taken,
                            const Chosen& chosen, const HasKeys& has_keys) const {
    const int64_t list = (b * p.q_heads + h) * p.blocks + group * kRoutedQueries + r;
    int32_t* out = p.index + list * p.capacity;
    int64_t n = 0, i = 0;
    const auto append = [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block)
        if (has_keys(block)) out[n++] = int32_t(block);
    };
    append(0, first[r]);
    for (; i < taken && chosen(i) < low[r]; ++i) out[n++] = int32_t(chosen(i));
    append(low[r] > first[r] ? low[r] : first[r], high[r]);
    for (; i < taken; ++i) out[n++] = int32_t(chosen(i));
    p.count[list] = int32_t(n);
  }
};

}  // namespace sb::SB_ISA
