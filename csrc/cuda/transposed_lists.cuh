// Which blocks of queries name a key: a stable counting sort of what blocks list, in linear time. Entries of one list
// differ, so a warp counts or places those of a list at once; it takes the lists of its part one by one, and so blocks
// of an entry ascend.
#pragma once
#include "key_list.cuh"

namespace sb::cuda {

inline constexpr int kTransposeThreads = 128;

struct TransposeParams : BackwardParams {
  bool is_of_span;
  SB_HD const TransposedLists& result() const { return is_of_span ? of_span : of_index; }
};

// The entries of a block: those of its list, or the fewest runs of all levels that cover what its span touches. Few,
// however long spans are, and those of a key name no block that is far from it.
struct Entries {
  const TransposeParams& p;
  const RowRange range;
  const int64_t b, head;

  // Calls visit(entry, position in the list) once for every entry of a block that names keys, each by another lane.
  template <class Visit>
  SB_DEVICE void visit(int64_t block, const Visit& visit) const {
    const TransposedLists& to = p.result();
    if (p.is_of_span) return visit_span(to, Span(p, range, b, block), visit);
    const BlockList list(p, b, head, block);
    for (int64_t i = lane_index(); i < list.count; i += kWarp) {
      const int64_t entry = list.entry(i);
      if (entry >= 0 && entry < to.entries) visit(entry, i);
    }
  }
  // Of every level the first and the last run that the span covers where the next level's do not hold them: the first
  // if it is odd, and the last if it is even.
  template <class Visit>
  SB_DEVICE void visit_span(const TransposedLists& to, const Span& span, const Visit& visit) const {
    const int64_t keys = int64_t(range.k_end) - range.k_first, lo = span.lo < 0 ? 0 : span.lo,
                  hi = span.hi > keys ? keys : span.hi;
    if (lo >= hi) return;
    const int64_t begin = lo / to.width, end = (hi - 1) / to.width + 1;
    for (int64_t i = lane_index(); i < 2 * to.levels; i += kWarp) {
      const int64_t level = i / 2, first = (begin + (int64_t(1) << level) - 1) >> level, behind = end >> level;
      const bool is_last = i % 2 == 1;
      if (first < behind && (is_last ? behind : first) % 2 == 1)
        visit((to.first >> level) + (is_last ? behind - 1 : first), i);
    }
  }
};

// Calls body(entries, part, cursor of the part's entry 0, blocks) for every part, by a warp.
template <class Body>
SB_DEVICE void for_each_part(const TransposeParams& p, const Body& body) {
  const TransposedLists& to = p.result();
  const int64_t tasks = p.batch * to.heads * to.parts, warps = kTransposeThreads / kWarp;
  for_each_task(ceil_div(tasks, warps), [&](int64_t task) {
    const int64_t at = task * warps + warp_index();
    if (at >= tasks) return;
    const int64_t row = at / to.parts, part = at % to.parts, b = row / to.heads;
    body(Entries{p, load(p.rows + b), b, row % to.heads}, part, to.cursor + row * to.entries * to.parts + part,
         to.blocks + row * to.room);
  });
}

// 1. How often a part names an entry.
SB_KERNEL transpose_count(TransposeParams p) {
  const TransposedLists& to = p.result();
  for_each_part(p, [&](const Entries& entries, int64_t part, int32_t* cursor, int32_t*) {
    for (int64_t e = lane_index(); e < to.entries; e += kWarp) store(cursor + e * to.parts, 0);
    sync_warp();
    for (int64_t block = part * to.part; block < (part + 1) * to.part && block < p.blocks; ++block) {
      entries.visit(block, [&](int64_t e, int64_t) { store(cursor + e * to.parts, load(cursor + e * to.parts) + 1); });
      sync_warp();
    }
  });
}

// 2. Where the blocks of an entry and part begin: a block of threads per row and head.
SB_KERNEL transpose_scan(TransposeParams p) {
  const TransposedLists& to = p.result();
  const auto sums = shared_array<int32_t>(0);
  const int thread = thread_index();
  for_each_task(p.batch * to.heads, [&](int64_t row) {
    int32_t* cursor = to.cursor + row * to.entries * to.parts;
    const int64_t size = to.entries * to.parts, share = ceil_div(size, kTransposeThreads), first = thread * share,
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
  for_each_part(p, [&](const Entries& entries, int64_t part, int32_t* cursor, int32_t* blocks) {
    for (int64_t block = part * to.part; block < (part + 1) * to.part && block < p.blocks; ++block) {
      entries.visit(block, [&](int64_t e, int64_t position) {
        const int32_t at = load(cursor + e * to.parts);
        store(cursor + e * to.parts, at + 1);
        if (at >= to.room) return;  // lists that do not ascend may count too few
        store(blocks + at, int32_t(block));
        if (to.positions) store(to.positions + (blocks - to.blocks) + at, int32_t(position));
      });
      sync_warp();
    }
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
