// The lists of a tile of 16 query slots as one, where they are several: what any block of queries in the tile lists, in
// ascending order, and which slots do. A warp per tile merges the lists, a lane each, in time linear in their entries.
#pragma once
#include "attention_tile_rows.cuh"

namespace sb::cuda {

inline constexpr int kUnionThreads = 128;

class UnionOfLists {
 public:
  SB_DEVICE UnionOfLists(const UnionListsParams& p, int64_t row, int64_t tile)
      : p(p), b(row / p.list_heads), list_head(row % p.list_heads), tile(tile) {}

  SB_DEVICE void run() {
    find_list();
    const int64_t here = (b * p.list_heads + list_head) * p.tiles + tile;
    const auto all = int32_t(ceil_div(p.k_tokens, p.block_k));
    int32_t last = -1, in_union = 0;
    for (;; ++in_union) {
      // This lane's next entry; what does not ascend lists nothing.
      int32_t named = all;
      for (; position < count; ++position) {
        named = load(entries + position);
        if (named > last) break;
        named = all;
      }
      last = least_of_warp(named);
      if (last >= all) break;
      const int32_t listing = warp_total(named == last ? slots : 0);
      if (lane_index() != 0) continue;
      store(p.entries + here * p.most + in_union, last);
      store(p.slots_of_entries + here * p.most + in_union, listing);
    }
    if (lane_index() == 0) store(p.counts + here, in_union);
  }

 private:
  // The list of this lane's block of queries, counted from that of the tile's first slot; none behind the last slot.
  SB_DEVICE void find_list() {
    const RowRange range = load(p.rows + b);
    const int64_t first_slot = tile * kTile, behind = slots_of_row(p, range) - first_slot,
                  block = first_slot / p.block_q + lane_index(), first = block * p.block_q - first_slot,
                  end = first + p.block_q < behind ? first + p.block_q : behind;
    slots = int32_t(bits_between(first < kTile ? int32_t(first) : kTile, end < kTile ? int32_t(end) : kTile));
    if (slots == 0) return;
    const BlockList list(p, b, list_head, block);
    entries = list.entries, count = list.count;
  }
  SB_DEVICE static int32_t least_of_warp(int32_t value) {
    SB_UNROLL
    for (int mask = kWarp / 2; mask > 0; mask /= 2) {
      const int32_t other = shuffle_xor(value, mask);
      value = other < value ? other : value;
    }
    return value;
  }

  const UnionListsParams& p;
  const int64_t b, list_head, tile;
  const int32_t* entries = nullptr;
  int64_t count = 0, position = 0;
  int32_t slots = 0;
};

SB_KERNEL union_lists(UnionListsParams p) {
  const int64_t all = p.batch * p.list_heads * p.tiles, warps = kUnionThreads / kWarp;
  for_each_task(ceil_div(all, warps), [&](int64_t task) {
    const int64_t at = task * warps + warp_index();
    if (at < all) UnionOfLists(p, at / p.tiles, at % p.tiles).run();
  });
}

}  // namespace sb::cuda
