// Which blocks of queries name a key: a stable counting sort of what blocks list, in linear time. A warp takes the
// places of its part's lists 32 at a time, in order; lanes that name the same entry find each other by ballots.
#pragma once
#include "key_list.cuh"

namespace sb::cuda {

inline constexpr int kTransposeThreads = 128, kScanThreads = 512;

struct TransposeParams : BackwardParams {
  bool is_of_span;
  SB_HD const TransposedLists& result() const { return is_of_span ? of_span : of_index; }
};

// The entries of blocks: those of their lists, or the fewest runs of all levels that cover what their spans touch. Few,
// however long spans are, and those of a key name no block that is far from it.
struct Entries {
  const TransposeParams& p;
  const RowRange range;
  const int64_t b, head;

  // Places of a block's list, at most.
  SB_DEVICE int64_t places() const { return p.is_of_span ? 2 * p.of_span.levels : p.capacity; }
  // What a block names at a place; -1 for nothing.
  SB_DEVICE int64_t at(int64_t block, int64_t place) const {
    const TransposedLists& to = p.result();
    if (p.is_of_span) return of_span(to, Span(p, range, b, block), place);
    const BlockList list(p, b, head, block);
    const int64_t entry = place < list.count ? list.entry(place) : -1;
    return entry < to.entries ? entry : -1;
  }

 private:
  // Of every level the first and the last run that the span covers where the next level's do not hold them: the first
  // if it is odd, and the last if it is even.
  SB_DEVICE int64_t of_span(const TransposedLists& to, const Span& span, int64_t place) const {
    const int64_t keys = int64_t(range.k_end) - range.k_first, lo = span.lo < 0 ? 0 : span.lo,
                  hi = span.hi > keys ? keys : span.hi;
    if (lo >= hi) return -1;
    const int64_t begin = lo / to.width, end = (hi - 1) / to.width + 1, level = place / 2,
                  first = (begin + (int64_t(1) << level) - 1) >> level, behind = end >> level;
    const bool is_last = place % 2 == 1;
    if (first >= behind || (is_last ? behind : first) % 2 == 0) return -1;
    return (to.first >> level) + (is_last ? behind - 1 : first);
  }
};

// What this lane names, and where: the lanes that name the same entry, itself among them.
struct NamedEntry {
  int64_t entry, block, place;
  uint32_t peers;
  SB_DEVICE bool is_first() const { return entry >= 0 && peers_before() == 0; }
  SB_DEVICE int peers_before() const { return bits_set(peers & ((1u << lane_index()) - 1)); }
};

// By a warp for every part: begin(cursor of its entry 0), and then body(what this lane names, the cursor, blocks) for
// the places of its lists in order, 32 at a time.
template <class Begin, class Body>
SB_DEVICE void for_each_part(const TransposeParams& p, const Begin& begin, const Body& body) {
  const TransposedLists& to = p.result();
  const int64_t tasks = p.batch * to.heads * to.parts, warps = kTransposeThreads / kWarp;
  for_each_task(ceil_div(tasks, warps), [&](int64_t task) {
    const int64_t at = task * warps + warp_index();
    if (at >= tasks) return;
    const int64_t row = at / to.parts, part = at % to.parts, b = row / to.heads;
    const Entries entries{p, load(p.rows + b), b, row % to.heads};
    int32_t* cursor = to.cursor + row * to.entries * to.parts + part;
    begin(cursor);
    const int64_t first = part * to.part, last = first + to.part < p.blocks ? first + to.part : p.blocks,
                  places = entries.places(), count = (last - first) * places;
    for (int64_t i = lane_index(); i - lane_index() < count; i += kWarp) {
      NamedEntry named{-1, 0, 0, 0};
      if (i < count) {
        const int64_t block = quotient(i, places);
        named.block = first + block, named.place = i - block * places;
        named.entry = entries.at(named.block, named.place);
      }
      named.peers = ballot(named.entry >= 0);
      if (named.peers == 0) continue;
      for (int64_t bit = 1; bit < to.entries; bit *= 2) {
        const bool is_set = (named.entry & bit) != 0;
        const uint32_t set = ballot(is_set);
        named.peers &= is_set ? set : ~set;
      }
      body(named, cursor, to.blocks + row * to.room);
    }
  });
}

// 1. How often a part names an entry.
SB_KERNEL transpose_count(TransposeParams p) {
  const TransposedLists& to = p.result();
  for_each_part(
      p,
      [&](int32_t* cursor) {
        for (int64_t e = lane_index(); e < to.entries; e += kWarp) store(cursor + e * to.parts, 0);
        sync_warp();
      },
      [&](const NamedEntry& named, int32_t* cursor, int32_t*) {
        int32_t* at = cursor + named.entry * to.parts;
        if (named.is_first()) store(at, load(at) + int32_t(bits_set(named.peers)));
        sync_warp();
      });
}

// 2. Where the blocks of an entry and part begin: a block of threads per row and head.
SB_KERNEL transpose_scan(TransposeParams p) {
  const TransposedLists& to = p.result();
  const auto sums = shared_array<int32_t>(0);
  const int thread = thread_index();
  for_each_task(p.batch * to.heads, [&](int64_t row) {
    int32_t* cursor = to.cursor + row * to.entries * to.parts;
    const int64_t size = to.entries * to.parts, share = ceil_div(size, kScanThreads), first = thread * share,
                  end = first + share < size ? first + share : size;
    int32_t sum = 0;
    for (int64_t i = first; i < end; ++i) sum += load(cursor + i);
    sums.set(thread, sum);
    sync_block();
    int32_t before = 0;
    for (int t = 0; t < thread; ++t) before += sums.get(t);
    for (int64_t i = first; i < end; ++i) {
      const int32_t count = load(cursor + i);
      store(cursor + i, before);
      before += count;
    }
    sync_block();
  });
}

// 3. The blocks themselves; a cursor ends behind the last of its entry and part.
SB_KERNEL transpose_place(TransposeParams p) {
  const TransposedLists& to = p.result();
  for_each_part(
      p, [](int32_t*) {},
      [&](const NamedEntry& named, int32_t* cursor, int32_t* blocks) {
        int32_t* next = cursor + named.entry * to.parts;
        const int32_t at = named.entry >= 0 ? load(next) + int32_t(named.peers_before()) : 0;
        sync_warp();
        if (named.is_first()) store(next, at + int32_t(bits_set(named.peers)));
        if (named.entry >= 0 && at < to.room) {  // lists that do not ascend may count too few
          store(blocks + at, int32_t(named.block));
          if (to.positions) store(to.positions + (blocks - to.blocks) + at, int32_t(named.place));
        }
        sync_warp();
      });
}

// The slots of a head that sum every key by itself, ascending: a block of threads per head.
SB_KERNEL collect_by_key(BackwardParams p) {
  const auto sums = shared_array<int32_t>(0);
  const int thread = thread_index();
  for_each_task(p.batch * p.q_heads, [&](int64_t row) {
    const SlotKind* kinds = p.kinds + row * p.q_tokens;
    const int64_t share = ceil_div(p.q_tokens, kTransposeThreads), first = thread * share,
                  end = first + share < p.q_tokens ? first + share : p.q_tokens;
    int32_t count = 0;
    for (int64_t slot = first; slot < end; ++slot) count += load(kinds + slot) == SlotKind::kByKey;
    sums.set(thread, count);
    sync_block();
    int32_t before = 0;
    for (int t = 0; t < thread; ++t) before += sums.get(t);
    for (int64_t slot = first; slot < end; ++slot)
      if (load(kinds + slot) == SlotKind::kByKey) store(p.by_key + row * p.q_tokens + before++, int32_t(slot));
    if (thread == kTransposeThreads - 1) store(p.by_key_count + row, before);
    sync_block();
  });
}

}  // namespace sb::cuda
