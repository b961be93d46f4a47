// Which query slots have pairs with a tile of 16 keys, where lists are shared by other than a multiple of 16 queries or
// states are causal: stages of 16 slots, the tiles of the kernels of queries. Lane l knows slot l % kTile of a stage,
// by a pattern of the tile's keys. Keys count from the row's first key.
#pragma once
#include "attention_tile_rows.cuh"
#include "naming_blocks.cuh"

namespace sb::cuda {

struct StageSlots {
  int32_t slot = 0, state_slot = 0;  // the first one, and what all of them read
  // Of this lane's slot: the keys that its window or sinks list, and from bit kTile on those that it sees and no list
  // of it has, of keys behind its state.
  uint32_t pattern = 0;
};

class TileSlots {
 public:
  // `keys`: of the tile, those that count.
  SB_DEVICE TileSlots(const BackwardTileKeysParams& p, int32_t b, int32_t first, uint32_t keys)
      : p(p), row(lane_index() % kTile), b(b), first(first), keys(keys) {}

  // Before the first call of next_behind, and that before levels of the transposed lists.
  SB_DEVICE void enter_head(int32_t of_head) {
    h = of_head, slot = state_begin = int32_t(first_slot_seeing(p, range(), first) / kTile * kTile);
  }
  // The next slots whose state ends before the tile; false behind the last.
  SB_DEVICE bool next_behind(StageSlots& to) {
    while (slot < slots()) {
      const TileEdges edges(p, range(), slot);
      if (edges.state_end > first) break;
      to.slot = slot, to.state_slot = edges.state_slot, slot += kTile;
      const int32_t own = to.slot + row;
      const uint32_t seen = own < slots() ? seen_by(edges) : 0,
                     window = seen ? bits_of_sinks() | bits_of_window(own) : 0;
      to.pattern = (seen & window) | (seen & ~window & ~(seen ? bits_of_list(own) : 0)) << kTile;
      if (any_of_rows(to.pattern) != 0) return true;
    }
    state_begin = slot;
    return false;
  }

  // Before the first call of next_listed.
  SB_DEVICE void enter_level(int64_t level) {
    const NamingBlocks naming(p, p.of_span, b, h, first, level);
    blocks = naming.blocks, count = int32_t(naming.count), at = 0, next_slot = state_begin;
    slot = level == 0 && first < sinks() ? state_begin : slots();
  }
  // The next of the other slots: with the first level those that see sinks; then those of the blocks whose window
  // touches the tile.
  SB_DEVICE bool next_listed(StageSlots& to) {
    while (slot < slots()) {
      to.slot = slot, slot += kTile;
      if (has_pattern(to, to.slot + row < slots() ? bits_of_sinks() : 0)) return true;
    }
    while (at < count) {
      const int64_t block = at + row < count ? load(blocks + at + row) : p.blocks;
      const bool is_block = block >= 0 && block < p.blocks;
      const int32_t from = is_block ? inside(block * p.block_q, slots()) : slots(),
                    end = is_block ? inside((block + 1) * p.block_q, slots()) : INT32_MAX;
      // Blocks ascend: those that are done come first.
      const int32_t done = bits_set(ballot(end <= next_slot) & kRows);
      if (done > 0) {
        at += done;
        continue;
      }
      const int32_t first_from = shuffle_from(from, 0) / kTile * kTile;
      to.slot = first_from > next_slot ? first_from : next_slot, next_slot = to.slot + kTile;
      if (to.slot >= slots()) break;
      const int32_t first_block = quotient(to.slot, p.block_q), own_block = quotient(to.slot + row, p.block_q);
      const bool is_named = from < (next_slot < slots() ? next_slot : slots());
      const uint32_t named = any_of_rows(is_named ? 1u << (int32_t(block) - first_block) : 0);
      const bool has_window = to.slot + row < slots() && (named >> (own_block - first_block) & 1);
      if (has_pattern(to, has_window ? bits_of_window(to.slot + row) : 0)) return true;
    }
    return false;
  }

 private:
  static constexpr uint32_t kRows = (1u << kTile) - 1;

  SB_DEVICE static int32_t inside(int64_t value, int32_t most) {
    return value < 0 ? 0 : value > most ? most : int32_t(value);
  }
  // Loaded and found where they are needed, since registers are few.
  SB_DEVICE RowRange range() const { return load(p.rows + b); }
  SB_DEVICE int32_t slots() const { return int32_t(slots_of_row(p, range())); }
  SB_DEVICE int32_t sinks() const {
    const RowRange of_row = range();
    const int32_t length = of_row.k_end - of_row.k_first;
    return !p.span ? 0 : p.span_sinks < length ? int32_t(p.span_sinks) : length;
  }
  SB_DEVICE uint32_t seen_by(const TileEdges& edges) const { return edges.seen_by(row, first) & keys; }
  SB_DEVICE bool has_pattern(StageSlots& to, uint32_t bits) const {
    const TileEdges edges(p, range(), to.slot);
    to.state_slot = edges.state_slot, to.pattern = bits & seen_by(edges);
    return any_of_rows(to.pattern) != 0;
  }

  // -------------------- patterns of this lane's slot

  SB_DEVICE uint32_t bits_of_sinks() const { return bits_between(0, sinks() - first); }
  SB_DEVICE uint32_t bits_of_window(int32_t own) const {
    if (!p.span) return 0;
    const Span span(p, range(), b, quotient(own, p.block_q));
    const int64_t lo = span.lo < sinks() ? sinks() : span.lo;
    return bits_between(inside(lo - first, kTile), inside(span.hi - first, kTile));
  }
  SB_DEVICE uint32_t bits_of_list(int32_t own) const {
    if (!p.index) return 0;
    const BlockList list(p, b, quotient(h * p.list_heads, p.q_heads), quotient(own, p.block_q));
    uint32_t bits = 0;
    for (int64_t i = lower_bound(list.entries, list.count, quotient(first, p.block_k)); i < list.count; ++i) {
      const int64_t key = int64_t(load(list.entries + i)) * p.block_k - first;
      if (key >= kTile) break;
      bits |= bits_between(inside(key, kTile), inside(key + p.block_k, kTile));
    }
    return bits;
  }

  const BackwardTileKeysParams& p;
  const int row;
  const int32_t b, first;
  const uint32_t keys;
  int32_t h = 0, slot = 0;
  int32_t state_begin = 0;  // from here on slots see the tile, and the state holds it
  const int32_t* blocks = nullptr;
  int32_t count = 0, at = 0, next_slot = 0;
};

}  // namespace sb::cuda
