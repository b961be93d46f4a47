// The backward pass of the queries of one unit; attention_backward_tile.h has the mathematics.
#pragma once
#include "attention_backward_tile.h"
#include "dkdv_scatter_per_query.h"

namespace sb::SB_ISA {

// Backward pass of the tiles of one unit. Each tile has record_bytes of `records`. Where they are kept the caller
// scatters them later, in the order of units and tiles, key range by key range; else every tile reuses the first slab
// and is scattered at once.
template <class E, int kLanes, bool kShared, bool kBitmask>
struct BackwardVisitor {
  static constexpr bool kNeedsLists = true;
  static constexpr int kRecords = kShared ? 1 : kLanes;
  const AttentionParams& p;
  char* records;
  int64_t record_bytes, tiles;
  bool keep;
  BackwardScratch<E, kLanes> s;
  BlockScatter<E> blocks;
  TilePrefetcher<E, kLanes, true> prefetcher;
  Bitmasks<kBitmask> bitmask{};
  void operator()(QueryTile<E, kLanes>& tile, const QueryTile<E, kLanes>* next) {
    if constexpr (kBitmask) collect_bitmask<E, kLanes>(p, tile, bitmask.of_key);
    Arena arena{records + (keep ? tiles * record_bytes : 0), 0};
    ScatterRecord<E>* r = take_records<E, kLanes, kShared>(p, arena);
    if constexpr (kShared) prefetcher.look_ahead(tile, next);
    backward_tile<E, kLanes, kShared>(p, tile, s, r, prefetcher);
    ++tiles;
    if (keep) return;
    scatter(tile.b, tile.kv, r, 0, p.k_tokens);
  }
  SB_INLINE void scatter(int64_t b, int64_t kv, const ScatterRecord<E>* r, int64_t key_begin, int64_t key_end) {
    if constexpr (kShared)
      dkdv_scatter_shared<E>(p, b, kv, r[0], key_begin, key_end);
    else
      dkdv_scatter_per_query<E>(p, b, kv, r, kRecords, key_begin, key_end, blocks);
  }
};
template <class E, int kLanes>
struct CountVisitor {
  static constexpr bool kNeedsLists = false;
  int64_t tiles;
  void operator()(const QueryTile<E, kLanes>&, const QueryTile<E, kLanes>*) { ++tiles; }
};

template <class E, int kLanes, bool kShared, bool kBitmask = false>
void backward_unit_of(const AttentionParams& p, BackwardTask& task) {
  constexpr int kRecords = kShared ? 1 : kLanes;
  Arena size{nullptr, 0};
  take_records<E, kLanes, kShared>(p, size);
  task.record_bytes = size.used;

  Arena arena{static_cast<char*>(task.scratch), 0};
  BackwardVisitor<E, kLanes, kShared, kBitmask> visitor{
      p, static_cast<char*>(task.records), size.used, 0, task.keep, {}, {}, TilePrefetcher<E, kLanes, true>(p)};
  allocate_backward<E, kLanes>(p, arena, visitor.s);
  QueryTile<E, kLanes> tile[2];
  allocate_tiles<E, kLanes>(p, arena, tile);
  if constexpr (!kShared) allocate_block_scatter<E>(p, arena, visitor.blocks);
  task.scratch_bytes = arena.used;
  if (task.stage == BackwardTask::kMeasure) return;
  if (task.stage == BackwardTask::kCountTiles) {
    CountVisitor<E, kLanes> count{0};
    for_each_tile<E, kLanes, kShared && !kBitmask>(p, task.b, task.h, task.unit, task.zero_row, tile, count);
    task.tiles = count.tiles;
  } else if (task.stage == BackwardTask::kCountKeys || task.stage == BackwardTask::kScatter) {
    for (int64_t i = 0; i < task.tiles; ++i) {
      const ScatterRecord<E>* r =
          reinterpret_cast<const ScatterRecord<E>*>(static_cast<char*>(task.records) + i * size.used);
      if (task.stage == BackwardTask::kScatter)
        visitor.scatter(task.b, p.kv_head(task.h), r, task.key_begin, task.key_end);
      else
        for (int record = 0; record < kRecords; ++record) count_keys_of_record<E>(r[record], task.keys_of_chunk);
    }
  } else {
    if (p.has_clusters() && !p.sums_by_key) {
      AccType<E>* d = d_representatives_slot<AccType<E>>(p, task.b * p.q_heads + task.h, task.unit);
      for (int64_t i = 0; i < p.rank * p.head_pad; ++i) d[i] = 0;
    }
    if (p.has_low_rank() && p.uses_kv_state && !p.sums_by_key) {
      const KVState<AccType<E>> d = d_kv_state_slot<AccType<E>>(p, task.b * p.q_heads + task.h, task.unit);
      for (int64_t i = 0; i < p.slot_size; ++i) d.H[i] = 0;
    }
    for_each_tile<E, kLanes, kShared && !kBitmask>(p, task.b, task.h, task.unit, task.zero_row, tile, visitor);
    task.tiles = visitor.tiles;
  }
}

// One stage of the backward pass on the queries of one unit.
template <class E>
void backward_unit(const AttentionParams& p, BackwardTask& task) {
  if (p.block_q == 1) {
    const bool measure = task.stage == BackwardTask::kMeasure;
    BackwardTask of_bitmask = task;
    if (measure) backward_unit_of<E, kBackwardLanes, true, true>(p, of_bitmask);
    if (!measure && uses_bitmask(p, p.rows[task.b])) return backward_unit_of<E, kBackwardLanes, true, true>(p, task);
    backward_unit_of<E, kBackwardLanes, false>(p, task);
    if (measure && of_bitmask.scratch_bytes > task.scratch_bytes) task.scratch_bytes = of_bitmask.scratch_bytes;
    if (measure && of_bitmask.record_bytes > task.record_bytes) task.record_bytes = of_bitmask.record_bytes;
    return;
  }
  if (p.block_q <= 8) return backward_unit_of<E, 8, true>(p, task);
  return backward_unit_of<E, kBackwardLanes, true>(p, task);
}

}  // namespace sb::SB_ISA
