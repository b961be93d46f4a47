// The list that all queries of a tile share, by stages of kStage positions. A lane goes from its position in one stage
// to that in the next, so that no position is divided; what it only reads waits in the warp's shared memory, since
// tiles need registers. Keys count from the row's first key.
#pragma once
#include "tile_memory.cuh"

namespace sb::cuda {

class TileList {
 public:
  static constexpr int kBytes = 4 * 16;  // of shared memory, from `base` on

  // `position`: that of this lane in a stage.
  SB_DEVICE TileList(const KeyList& list, int base, int32_t position) : base(base), at(uint32_t(position)) {
    const auto edge = uint32_t(list.edge), keys = uint32_t(list.keys_of_entry()), sinks = uint32_t(list.sinks),
               lo = uint32_t(list.lo), in_span = uint32_t(list.hi - list.lo), count = keys ? uint32_t(list.count) : 0u;
    if (count > 0) {
      // Positions behind the span: the first of this lane.
      const uint32_t first = (at - sinks - in_span) % kStage;
      entry = first / keys, offset = first % keys;
    }
    const auto entries = uint64_t(reinterpret_cast<uintptr_t>(list.entries)),
               mask = uint64_t(reinterpret_cast<uintptr_t>(list.mask));
    if (lane_index() == 0) {
      put(kBefore, sinks, sinks + in_span, lo - sinks, count);
      if (count > 0) put(kSteps, keys, kStage / keys, kStage % keys, edge / keys);
      put(kLimits, edge, sinks, lo, in_span);
      put(kMemory, uint32_t(entries), uint32_t(entries >> 32), uint32_t(mask), uint32_t(mask >> 32));
    }
    sync_warp();
  }

  // This lane's key of the next stage, or -1 where there is none, it is ignored, or another position has it; false
  // behind the last.
  SB_DEVICE bool next(int32_t& to) {
    const FourWords before = get(kBefore);
    const uint32_t sinks = before.at[0], end = before.at[1], from_sinks_to_span = before.at[2], count = before.at[3];
    const bool is_before = at < end, is_listed = !is_before && entry < count;
    if (ballot(is_before || is_listed) == 0) return false;
    const FourWords memory = get(kMemory);
    to = -1;
    if (is_before) {
      to = int32_t(at < sinks ? at : at + from_sinks_to_span);
      at += kStage;
    }
    if (is_listed) {
      // Entries of any content are safe: what no key matches lists nothing.
      const FourWords steps = get(kSteps), limits = get(kLimits);
      const int32_t* here = pointer<int32_t>(memory.at[0], memory.at[1]) + entry;
      const auto named = uint32_t(load(here));
      const uint32_t key = named * steps.at[0] + offset;
      bool is_new =
          named <= steps.at[3] && key <= limits.at[0] && key >= limits.at[1] && key - limits.at[2] >= limits.at[3];
      if (entry > 0) is_new = is_new && load(here - 1) < int32_t(named);
      if (is_new) to = int32_t(key);
      entry += steps.at[1], offset += steps.at[2];
      if (offset >= steps.at[0]) offset -= steps.at[0], ++entry;
    }
    const uint8_t* mask = pointer<uint8_t>(memory.at[2], memory.at[3]);
    if (mask && to >= 0 && load(mask + to)) to = -1;
    return true;
  }

 private:
  static constexpr int kBefore = 0, kSteps = 1, kLimits = 2, kMemory = 3;
  SB_DEVICE FourWords get(int i) const { return shared_array<FourWords>(base).get(i); }
  SB_DEVICE void put(int i, uint32_t a, uint32_t b, uint32_t c, uint32_t d) const {
    shared_array<FourWords>(base).set(i, FourWords{{a, b, c, d}});
  }
  template <class T>
  SB_DEVICE static const T* pointer(uint32_t low, uint32_t high) {
    return reinterpret_cast<const T*>(uintptr_t(uint64_t(high) << 32 | low));
  }

  const int base;
  uint32_t at;                     // this lane's next position in sinks and span
  uint32_t entry = 0, offset = 0;  // behind them
};

}  // namespace sb::cuda
