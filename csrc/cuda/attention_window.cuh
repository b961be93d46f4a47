// Forward pass on tensor cores where neighbouring tiles of query slots list windows that overlap: the warps of a block
// share one stream of keys. The same sums as attention_tile.cuh's, of the same rows and operands. A round of the stream
// has a stage of kStage keys for every warp to copy, into its own two buffers as there; behind one barrier of the block
// each warp goes through all stages of the round and weighs what its own tile lists or sees of them. So a warp looks up
// and copies one stage where it weighs as many as the block has warps.
//
// Stages hold keys of other tiles, too. Their weight is 0, and 0 times what is no number is no number: a tile whose
// sums are not finite goes once more, alone, through the same stages with its own keys in them, so that the bits of its
// rows are those that they would have without the others.
#pragma once
#include "attention_tile.cuh"
#include "attention_window_keys.cuh"

namespace sb::cuda {

// How many blocks of four warps a multiprocessor runs at once as far as registers go: of 65536.
inline constexpr int kWindowThreads = 128;
template <int D, LowRank kKind, bool kIsRagged>
inline constexpr int kWindowBlocks = 65536 / kWindowThreads /
                                     (kIsRagged || D > 64       ? 255
                                      : kKind == LowRank::kNone ? 128
                                                                : 168);

template <int D, LowRank kKind, bool kIsRagged>
using WindowLayout = TileLayout<D, kKind, kIsRagged, SharedKeys<kKind>::kBytes>;

template <class E, int D, LowRank kKind, bool kIsRagged>
class WindowTile : Tile<E, D, kKind, kIsRagged, SharedKeys<kKind>::kBytes> {
  typedef Tile<E, D, kKind, kIsRagged, SharedKeys<kKind>::kBytes> Base;
  typedef typename Base::Layout Layout;
  typedef typename Base::Fetched Fetched;
  typedef SharedKeys<kKind> Numbers;
  typedef typename WindowCells<kIsRagged>::Cell Cell;
  using Base::base, Base::b, Base::h, Base::p, Base::edges, Base::lane, Base::first_slot, Base::state_slot;
  static constexpr bool kHasClusters = kKind == LowRank::kCentroid, kHasLowRank = kKind != LowRank::kNone;

 public:
  using Base::clear_columns;
  SB_DEVICE WindowTile(const TileParams& p, int base, int32_t b, int32_t h, int32_t first_of_block)
      : Base(p, base, b, h, first_of_block + warp_index() * kTile), cells(p, base + Layout::kList) {}

  SB_DEVICE void run() {
    const RowRange range = load(p.rows + b);
    const int32_t first_of_block = first_slot - warp_index() * kTile;
    if (first_of_block >= slots_of_row(p, range)) return;  // all warps together
    const bool has_queries = find_queries(p, range, b, h, first_slot, this->queries());
    this->find_keys(range);
    cells.find(range, b, first_of_block);
    if (kIsRagged) {
      edges = TileEdges(p, range, first_slot);
      state_slot = edges.state_slot;
      if (lane == 0) this->queries().set(Base::kSlotOfState, state_slot);
      sync_warp();
    } else {
      state_slot = int32_t(p.slots - 1);
    }
    do {
      if (has_queries) this->begin();
      go_through_cells(has_queries);
      if (!this->is_careful) sync_block();  // all are done with this warp's keys
    } while (has_queries && !this->finish());
  }

 private:
  // Round by round with the other warps, or where this one is careful by itself, cell by cell.
  SB_DEVICE void go_through_cells(bool has_queries) {
    Fetched next;
    int32_t round = next_round(0);
    if (round != cells.kNoRound) fetch(round, 0, next);
    for (int buffer = 0; round != cells.kNoRound; buffer = 1 - buffer) {
      const int32_t here = round;
      round = next_round(here + 1);
      wait_copies<0>();
      put_numbers(next, buffer);
      // The round is there, and all are done with the one before.
      if (this->is_careful)
        sync_warp();
      else
        sync_block();
      if (round != cells.kNoRound) fetch(round, 1 - buffer, next);
      if (!has_queries) continue;
      int32_t at = this->is_careful ? here : here * cells.warps();
      const int32_t end = this->is_careful ? at + 1 : at + cells.warps();
      int of_warp = this->is_careful ? base : int(kFeatureTable);
      SB_NO_UNROLL
      for (; at < end; ++at, of_warp += int(Layout::bytes(p))) add_cell(cells.cell(at), of_warp, buffer);
    }
  }
  SB_DEVICE int32_t next_round(int32_t from) const {
    if (!this->is_careful) return cells.next_round(from);
    const int32_t round = cells.next_round(cells.round_of(from)), first = round * cells.warps();
    return round == cells.kNoRound ? round : first < from ? from : first;
  }

  // The key of a stage that this lane looks up.
  SB_DEVICE int place_of_lane() const { return kIsRagged ? lane % kStage : this->key_of_lane(); }
  SB_DEVICE bool is_key(const Cell& cell, int32_t key) const {
    return uint32_t(key) < uint32_t(cell.keys_of_row) &&
           !(p.k_mask && load(p.k_mask + b * p.k_tokens + this->first_key + key));
  }

  // This warp's stage of a round.
  SB_DEVICE void fetch(int32_t round, int buffer, Fetched& of_lane) {
    const int32_t at = this->is_careful ? round : round * cells.warps() + warp_index();
    const Cell cell = cells.cell(at);
    const bool is_behind = kIsRagged && cell.begin >= edges.state_end;
    if (this->is_careful ? needs(cell, is_behind) : cells.is_needed_by_any(at)) {
      const int32_t key = cell.begin + place_of_lane();
      bool is_wanted = true;
      if (this->is_careful) is_wanted = is_behind && kHasLowRank ? key < edges.seen_end : cell.lists(key);
      of_lane.key = is_wanted && is_key(cell, key) ? key : -1;
      Base::fetch(of_lane, buffer);
    }
    commit_copies();
    sync_warp();  // lanes that copy nothing go on together with those that do
  }
  SB_DEVICE static int numbers_at(int base, int buffer) {
    return base + Layout::kList + Numbers::kNumbers + buffer * Numbers::kBuffer;
  }
  SB_DEVICE void put_numbers(const Fetched& of_lane, int buffer) const {
    const int to = numbers_at(base, buffer), key = this->key_of_lane();
    if (kHasLowRank && lane % 8 < 4) {  // the others have the same keys
      shared_array<float>(to + Numbers::kLogs).set(key, of_lane.log);
      if (kHasClusters) shared_array<int32_t>(to + Numbers::kClusters).set(key, of_lane.cluster);
    }
    if (lane == 0) {
      shared_array<uint32_t>(to).set(0, of_lane.valid);
      if (kIsRagged) shared_array<uint32_t>(to).set(1, of_lane.in_order);
    }
  }

  // What this warp's tile needs of the stage that another, whose shared memory is at `of_warp`, has copied.
  SB_DEVICE void add_cell(const Cell& cell, int of_warp, int buffer) {
    const bool is_behind = kIsRagged && cell.begin >= edges.state_end;
    if (!needs(cell, is_behind)) return;
    const int numbers = numbers_at(of_warp, buffer), rows = of_warp + buffer * Layout::kStageBytes;
    const int key = this->key_of_lane();
    Fetched of_lane;
    if (kHasLowRank) of_lane.log = shared_array<float>(numbers + Numbers::kLogs).get(key);
    if (kIsRagged && is_behind) {
      of_lane.in_order = shared_array<uint32_t>(numbers).get(1);
      of_lane.begin = cell.begin, of_lane.pattern = cell.pattern() & edges.seen_by(lane % kTile, cell.begin);
      this->template add_stage<true>(of_lane, rows);
      return;
    }
    if (kHasClusters) of_lane.cluster = shared_array<int32_t>(numbers + Numbers::kClusters).get(key);
    const uint32_t valid = shared_array<uint32_t>(numbers).get(0);
    const bool is_listed = cell.lists(cell.begin + key) && (valid >> lane & 1);
    of_lane.valid = ballot(is_listed);
    if (!is_listed) of_lane.log = float(kLowestLog);
    this->template add_stage<false>(of_lane, rows);
  }
  // Behind the tile's state all keys have a weight that it does not list.
  SB_DEVICE bool needs(const Cell& cell, bool is_behind) const {
    if (!is_behind) return cell.lists_any();
    return cell.begin < edges.seen_end && (kHasLowRank || cell.lists_any());
  }

  const WindowCells<kIsRagged> cells;
};

// Calls body(base, b, h, first_slot) for the neighbouring tiles that the warps of a block take, all warps together;
// else as for_each_tile.
template <class Layout, class Body>
SB_DEVICE void for_each_block_of_tiles(const TileParams& p, const Body& body) {
  const auto slots = [] { return uint32_t(block_threads() / kWarp * kTile); };
  const auto blocks = [&] { return uint32_t(ceil_div(p.q_tokens, slots())); };
  const auto all = [&] { return uint32_t(p.batch * p.q_heads) * blocks(); };
  const auto base = [&] { return int(kFeatureTable + warp_index() * Layout::bytes(p)); };
  const auto kept = [&] { return shared_array<uint32_t>(base() + Layout::kTask); };
  SB_NO_UNROLL
  for (auto task = uint32_t(block_index()); task < all(); task = kept().get(0) + uint32_t(grid_blocks())) {
    sync_warp();  // all lanes have read the last one
    if (lane_index() == 0) kept().set(0, task);
    sync_warp();
    const uint32_t row = task / blocks(), heads = uint32_t(p.q_heads);
    body(base(), int32_t(row / heads), int32_t(row % heads), int32_t(task % blocks() * slots()));
  }
}

template <class E, int D, LowRank kKind, bool kIsRagged>
SB_KERNEL SB_THREADS_AND_BLOCKS(kWindowThreads, (kWindowBlocks<D, kKind, kIsRagged>)) attention_window(TileParams p) {
  if (kKind == LowRank::kQuadratic) write_feature_table(p);
  typedef WindowLayout<D, kKind, kIsRagged> Layout;
  typedef WindowTile<E, D, kKind, kIsRagged> WindowTile;
  WindowTile::clear_columns(p, int(kFeatureTable + warp_index() * Layout::bytes(p)));
  for_each_block_of_tiles<Layout>(
      p, [&](int base, int32_t b, int32_t h, int32_t first_slot) { WindowTile(p, base, b, h, first_slot).run(); });
}

}  // namespace sb::cuda
