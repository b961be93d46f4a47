// The keys that neighbouring tiles of 16 query slots share where each lists one window and the same sinks
// (attention_window.cuh): cells of kStage keys, first those of the sinks, then from the first key of any of the windows
// on. A round has a cell for every warp of the block to copy, and each warp weighs what its own tile needs of them: of
// causal calls with a low-rank part also the keys between the tile's state and its last query, which may lie far behind
// the window.
// Keys count from the row's first key.
#pragma once
#include "attention_tile_rows.cuh"

namespace sb::cuda {

// Shared memory of a warp: which cells it needs; and what it leaves of its own cell for the others besides rows, for
// each of two buffers.
template <LowRank kKind>
struct SharedKeys {
  static constexpr int kCells = 0, kWindow = 64, kNumbers = 80, kLogs = 16,
                       kClusters = kLogs + (kKind == LowRank::kNone ? 0 : kStage * 4),
                       kBuffer = kClusters + (kKind == LowRank::kCentroid ? kStage * 4 : 0),
                       kBytes = kNumbers + 2 * kBuffer;
};

// Which cells there are, and what this warp's tile needs of each. Places of cells depend on where windows lie and on
// nothing that padding or later queries change: without a causal edge they are steps from the first key of the block's
// first window, so that windows as far apart as their queries lie on cells; with one they are multiples of kStage, so
// that no cell has keys on both sides of a tile's state.
template <bool kIsRagged>
class WindowCells {
  typedef SharedKeys<LowRank::kNone> Place;  // the same of every kind

 public:
  // At byte `base` of shared memory, since tiles need registers.
  SB_DEVICE WindowCells(const TileParams& p, int base) : p(p), base(base) {}

  SB_DEVICE void find(const RowRange& range, int32_t b, int32_t first_of_block) const {
    // Every lane looks at the tile of one warp.
    const int32_t slot = first_of_block + lane_index() % warps() * kTile, before = of_sinks() * kStage;
    int32_t low = 0, high = 0;
    Range listed, behind;
    if (slot < slots_of_row(p, range)) {
      const TileEdges edges(p, range, slot);
      const Span span(p, range, b, slot / p.block_q);
      const int64_t seen = edges.seen_end < 0 ? 0 : edges.seen_end, sinks = p.span_sinks < seen ? p.span_sinks : seen;
      low = int32_t(span.lo < sinks ? sinks : span.lo > seen ? seen : span.lo);
      high = int32_t(span.hi < low ? low : span.hi > seen ? seen : span.hi);
      listed = {low, high};
      if (kIsRagged && p.has_low_rank()) behind = {edges.state_end, int32_t(seen)};
      if (listed.to >= behind.from && behind.from < behind.to) {  // one range, so that no cell is of both
        listed.to = behind.to;
        if (low >= high || behind.from < low) listed.from = behind.from;
        behind = {};
      }
      if (listed.from < before) listed.from = before;
      if (behind.from < before) behind.from = before;
    }
    const int32_t origin = kIsRagged ? 0 : shuffle_from(low, 0);
    // Without any cell of its own a block has those of the sinks, and all others begin behind them.
    int32_t from = listed.is_empty() ? INT32_MAX : cell_of(listed.from - origin);
    if (!behind.is_empty() && cell_of(behind.from - origin) < from) from = cell_of(behind.from - origin);
    const int32_t least = least_of_warps(from), first = least == INT32_MAX ? of_sinks() : least;
    const int32_t shift = origin + (first - of_sinks()) * kStage;
    const int32_t lo = shuffle_from(low, warp_index()), hi = shuffle_from(high, warp_index());
    if (lane_index() < warps()) cells().set(lane_index(), Cells{cells_of(listed, shift), cells_of(behind, shift)});
    if (lane_index() == 0)
      shared_array<Window>(base + Place::kWindow).set(0, Window{shift, lo, hi, range.k_end - range.k_first});
    sync_warp();
  }

  static constexpr int32_t kNoRound = INT32_MAX;
  // The first round from `round` on of which any tile needs a cell.
  SB_DEVICE int32_t next_round(int32_t round) const {
    const int32_t cell = round * warps();
    if (cell < of_sinks()) return round;
    const Cells of_tile = cells().get(lane_index() % warps());
    const Range of_cells = kIsRagged && cell >= of_tile.listed.to ? of_tile.behind : of_tile.listed;
    if (cell >= of_cells.to)
      round = kNoRound;
    else if (cell < of_cells.from)
      round = round_of(of_cells.from);
    return least_of_warps(round);
  }
  SB_DEVICE int32_t round_of(int32_t cell) const { return cell >> warps() / 2; }  // of 4 warps, 2 or 1
  SB_DEVICE bool is_needed_by_any(int32_t cell) const {
    const Cells of_tile = cells().get(lane_index() % warps());
    return ballot(cell < of_sinks() || of_tile.listed.has(cell) || (kIsRagged && of_tile.behind.has(cell))) != 0;
  }

  // A cell, and what this warp's tile lists of it.
  struct Cell {
    int32_t begin, lo, hi, sinks, keys_of_row;  // hi and sinks: the first key behind
    SB_DEVICE bool lists_any() const { return begin < sinks || (lo < hi && begin < hi && begin + kStage > lo); }
    SB_DEVICE bool lists(int32_t key) const { return (key >= lo && key < hi) || key < sinks; }
    // The same as a pattern.
    SB_DEVICE uint32_t pattern() const { return bits_between(lo - begin, hi - begin) | bits_between(0, sinks - begin); }
  };
  SB_DEVICE Cell cell(int32_t at) const {
    const Window window = shared_array<Window>(base + Place::kWindow).get(0);
    const bool is_of_sinks = at < of_sinks();
    Cell cell{at * kStage, window.lo, window.hi, 0, window.keys_of_row};
    if (is_of_sinks)
      cell.sinks = int32_t(p.span_sinks);
    else
      cell.begin += window.shift;
    // Cells of a window may begin within those of the sinks, which have these keys.
    if (!kIsRagged && !is_of_sinks && cell.lo < of_sinks() * kStage) cell.lo = of_sinks() * kStage;
    return cell;
  }

  SB_DEVICE int32_t warps() const { return block_threads() / kWarp; }
  SB_DEVICE int32_t of_sinks() const { return int32_t((p.span_sinks + kStage - 1) / kStage); }  // so many cells

 private:
  struct Range {
    int32_t from = 0, to = 0;
    SB_DEVICE bool is_empty() const { return from >= to; }
    SB_DEVICE bool has(int32_t at) const { return at >= from && at < to; }
  };
  // Of a tile, in ascending order where both are there.
  struct alignas(16) Cells {
    Range listed, behind;
  };
  struct alignas(16) Window {
    int32_t shift, lo, hi, keys_of_row;  // shift: from a cell's number times kStage to its first key, behind the sinks
  };
  SB_DEVICE Shared<Cells> cells() const { return shared_array<Cells>(base + Place::kCells); }  // of the warps' tiles

  SB_DEVICE static Range cells_of(const Range& keys, int32_t shift) {
    return keys.is_empty() ? Range{} : Range{cell_of(keys.from - shift), cell_of(keys.to - 1 - shift) + 1};
  }
  SB_DEVICE static int32_t cell_of(int32_t key) { return key >> 4; }
  static_assert(kStage == 1 << 4);
  // Over the lanes of the warps' tiles: four at most, or two or one of them again and again.
  SB_DEVICE static int32_t least_of_warps(int32_t value) {
    SB_UNROLL
    for (int mask = 1; mask <= 2; mask *= 2) {
      const int32_t other = shuffle_xor(value, mask);
      value = other < value ? other : value;
    }
    return value;
  }

  const TileParams& p;
  const int base;
};

}  // namespace sb::cuda
