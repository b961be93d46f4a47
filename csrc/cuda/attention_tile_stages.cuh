// How a tile goes through its keys, stage by stage: what gives the stages, and the copies of one under way while the
// one before is computed. Forward and backward tiles, of lists that all rows share and of ragged ones
// (attention_tile_rows.cuh).
#pragma once
#include <type_traits>

#include "attention_tile_rows.cuh"

namespace sb::cuda {

// Stages of a list that all rows share, by positions (attention_tile_list.cuh goes on by additions).
class StagesOfList {
 public:
  SB_DEVICE StagesOfList(const ForwardParams& p, const RowRange& range, int64_t b, int64_t h, int64_t first_slot)
      : list(p, range, b, h, first_slot, edge_of_slot(p, range, first_slot)) {}
  // The next stage; false behind the last.
  SB_DEVICE bool next(StageKeys& keys) {
    if (position >= list.positions()) return false;
    const int64_t here = position + lane_index() % kStage;
    keys.key = here < list.positions() ? int32_t(list.key_at(here)) : -1;
    position += kStage;
    return true;
  }

 private:
  const KeyList list;
  int64_t position = 0;
};

// Calls add(is_behind, next_stage) for the keys of ragged rows before the edge of the tile's state, then for those
// behind it, which clusters have none of.
template <LowRank kKind, class Add>
SB_DEVICE void go_through_rows(TileRows& rows, const Add& add) {
  add(std::false_type{}, [&](StageKeys& keys) SB_INLINE_LAMBDA { return rows.next_listed(keys); });
  if constexpr (kKind != LowRank::kCentroid) {
    rows.enter_seen();
    add(std::true_type{}, [&](StageKeys& keys) SB_INLINE_LAMBDA { return rows.next_seen(keys); });
  }
}

// next_stage(keys) gives the next stage, or false behind the last. Of every one calls fetch(keys, buffer), which starts
// to copy its rows, and once they are there add(keys, buffer); in between the next one is fetched into the other of two
// buffers.
template <class Fetched, class Next, class Fetch, class Add>
SB_DEVICE void for_each_stage(const Next& next_stage, const Fetch& fetch, const Add& add) {
  Fetched next;
  bool has_next = next_stage(next);
  if (!has_next) return;
  fetch(next, 0);
  commit_copies();
  for (int buffer = 0; has_next; buffer = 1 - buffer) {
    const Fetched of_lane = next;
    has_next = next_stage(next);
    if (has_next) fetch(next, 1 - buffer);
    commit_copies();
    wait_copies<1>();
    sync_warp();
    add(of_lane, buffer);
    sync_warp();  // before the buffer is filled again
  }
  wait_copies<0>();
}

// -------------------- values that are no numbers

// Bit k: whether a stage's row k of `count` places has what is no number, as is_number(k, place) says.
template <class IsNumber>
SB_DEVICE uint32_t keys_without_numbers(int count, const IsNumber& is_number) {
  uint32_t bad = 0;
  SB_NO_UNROLL
  for (int key = 0; key < kStage; ++key) {
    bool is_good = true;
    SB_NO_UNROLL
    for (int i = lane_index(); i < count; i += kWarp) is_good = is_good && is_number(key, i);
    if (ballot(!is_good) != 0) bad |= 1u << key;
  }
  return bad;
}
// Calls clear(k, place) for all places of the rows `bad`, once all lanes are done with them.
template <class Clear>
SB_DEVICE void clear_keys(uint32_t bad, int count, const Clear& clear) {
  sync_warp();
  SB_NO_UNROLL
  for (int key = 0; key < kStage; ++key) {
    SB_NO_UNROLL
    for (int i = lane_index(); i < count; i += kWarp)
      if (bad >> key & 1) clear(key, i);
  }
  sync_warp();
}

}  // namespace sb::cuda
