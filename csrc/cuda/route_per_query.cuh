// Routing per query (docs/algorithm.md, section 3): a block of threads chooses blocks of kBranch keys for a query.
#pragma once
#include "route_runs.cuh"

namespace sb::cuda {

struct PerQueryMemory {
  static SB_HD int64_t bytes(const RoutingParams& p) {
    return (p.head_dim + 1) * int64_t(sizeof(float)) + RouteBlock::bytes();
  }
  Shared<float> query;  // scaled, and the factor of the spread
  RouteBlock block;
  SB_DEVICE explicit PerQueryMemory(const RoutingParams& p)
      : query(shared_array<float>(0)), block((p.head_dim + 1) * int64_t(sizeof(float))) {}
};

// In global memory.
struct PerQueryScratch {
  static SB_HD int64_t words(int64_t units) { return 3 * units; }
  int32_t *key, *super, *taken;  // sortable scores; chosen superblocks; positions taken
  SB_DEVICE PerQueryScratch(const RoutingParams& p) {
    key = p.scratch + block_index() * p.scratch_words, super = key + p.units, taken = super + p.units;
  }
};

// In blocks of keys: the window [low, high) of a query, `first`, before which are the sinks, and how many to choose.
struct QueryWindow {
  int64_t low, high, first, wanted;
  // Of a head. position: of the query, in the keys of its row.
  SB_DEVICE QueryWindow(const RoutingParams& p, int64_t h, int64_t length, int64_t position) {
    const int64_t sinks = ceil_div(p.sinks, kBranch), blocks = ceil_div(length, kBranch);
    if (p.is_causal) {
      const int64_t start = position - p.window + 1;
      low = (start > 0 ? start : 0) / kBranch, high = position / kBranch + 1;
    } else {
      const int64_t start = position - p.window / 2, end = position + p.window / 2;
      low = (start > 0 ? start : 0) / kBranch;
      // Without a window no block is forced into the list.
      high = p.window < 2 ? low : ceil_div(end < length ? end : length, kBranch);
    }
    low = clamped(low, 0, blocks), high = clamped(high, low, blocks);
    first = clamped(sinks, 0, p.is_causal ? high : blocks);
    wanted = (keys_of(p, h) - p.window) / kBranch - sinks;
  }

 private:
  static SB_DEVICE int64_t clamped(int64_t value, int64_t low, int64_t high) {
    return value < low ? low : value > high ? high : value;
  }
};
// Of the query i at a slot of its row, in the keys of the row; a causal one before them all sees none.
SB_DEVICE int64_t position_of(const RoutingParams& p, const RouteRow& row, const RowRange& range, int64_t i,
                              int64_t slot) {
  if (!p.is_causal && p.q_tokens != p.k_tokens) return slot * row.length / (int64_t(range.q_end) - range.q_first);
  return i + (p.is_causal ? range.offset : 0) - range.k_first;
}

// Writes the list of a query: the sinks' blocks, then the `taken` chosen ones, block_of(i) ascending, with the window's
// blocks between them. Blocks that have no key are left out.
template <class BlockOf, class HasKeys>
SB_DEVICE void write_query_list(const RoutingParams& p, const RouteBlock& threads, const QueryWindow& window,
                                int64_t list, int64_t taken, const BlockOf& block_of, const HasKeys& has_keys) {
  const int thread = thread_index();
  int32_t *const begin = p.index + list * p.capacity, *out = begin;
  int32_t before = 0;
  for (int64_t i = thread; i < taken; i += kRouteThreads) before += block_of(i) < window.low ? 1 : 0;
  before = threads.sum(before);
  out += threads.write_wanted(0, window.first, has_keys, out);
  for (int64_t i = thread; i < before; i += kRouteThreads) store(out + i, int32_t(block_of(i)));
  out += before;
  out += threads.write_wanted(window.low > window.first ? window.low : window.first, window.high, has_keys, out);
  for (int64_t i = before + thread; i < taken; i += kRouteThreads) store(out + i - before, int32_t(block_of(i)));
  if (thread == 0) store(p.count + list, int32_t(out - begin + (taken - before)));
  sync_block();
}

template <class E>
class RoutedQuery {
 public:
  SB_DEVICE RoutedQuery(const RoutingParams& p, const PerQueryMemory& memory, const PerQueryScratch& scratch, int64_t b,
                        int64_t h, int64_t slot)
      : p(p),
        m(memory),
        w(scratch),
        b(b),
        h(h),
        slot(slot),
        row(p, b * p.kv_heads + h / (p.q_heads / p.kv_heads)),
        range(load(p.rows + b)),
        blocks(ceil_div(row.length, kBranch)) {}

  SB_DEVICE void run() {
    const int64_t i = range.q_first + slot;
    if (i >= range.q_end || (p.q_mask && load(p.q_mask + b * p.q_tokens + i))) return;
    const int64_t position = position_of(p, row, range, i, slot);
    if (p.is_causal && position < 0) return;
    const QueryWindow window(p, h, row.length, position);
    low = window.low, high = window.high, first = window.first, wanted = window.wanted;
    read_query(i);
    const int64_t supers = choose_supers(), taken = take_blocks(supers), list = (b * p.q_heads + h) * p.blocks + slot;
    write_query_list(
        p, m.block, window, list, taken, [&](int64_t at) { return block_at(load(w.taken + at)); },
        [&](int64_t block) { return has_keys(fine(block)); });
  }

 private:
  SB_DEVICE void read_query(int64_t i) const {
    const E* q = p.q.at<const E>(b, h, i);
    float square = 0;
    sync_block();  // the last query is done with it
    for (int64_t e = thread; e < p.head_dim; e += kRouteThreads) {
      const float value = float(widened(load(q + e))) * p.scale;
      m.query.set(e, value * unit_of_score(p));
      square += value * value;
    }
    square = m.block.sum(square);
    if (thread == 0) m.query.set(p.head_dim, square * (0.5f / float(p.head_dim)) * unit_of_score(p));
    sync_block();
  }
  SB_DEVICE float product(const float* run) const {
    float sum = 0;
    for (int64_t e = 0; e <= p.head_dim; ++e) sum += m.query.get(e) * load(run + e);
    return sum;
  }
  SB_DEVICE float score(const float* run) const {
    if (!p.has_groups()) return product(run);
    const GroupColumns of(p);
    const float* other = run + of.width;
    return log2_of_sum(load(run + of.count), product(run), load(other + of.count), product(other));
  }
  SB_DEVICE const float* fine(int64_t block) const { return p.fine + (row.head * p.fine_runs + block) * p.run_width; }
  SB_DEVICE bool has_keys(const float* run) const {
    return load(run + (p.has_groups() ? GroupColumns(p).count : RunColumns(p).count)) > 0.0f;
  }

  // Writes the superblocks that are searched to w.super, ascending, and returns how many they are. The one that the
  // causal window cuts always is.
  SB_DEVICE int64_t choose_supers() {
    const int64_t supers = p.is_causal ? low / kBranch : ceil_div(blocks, kBranch),
                  kept = candidate_superblocks(p.keys, p.window, p.pools);
    int64_t chosen = supers;
    if (supers <= kept) {
      for (int64_t s = thread; s < supers; s += kRouteThreads) store(w.super + s, int32_t(s));
    } else {
      for (int64_t s = thread; s < supers; s += kRouteThreads) {
        const float* run = p.coarse + (row.head * p.coarse_runs + s) * p.run_width;
        store(w.key + s, has_keys(run) ? sortable(score(run)) : kNever);
      }
      sync_block();
      chosen = m.block.take_top(w.key, supers, kept, w.super);
    }
    if (p.is_causal && low % kBranch) {
      if (thread == 0) store(w.super + chosen, int32_t(low / kBranch));
      ++chosen;
    }
    sync_block();
    return chosen;
  }
  SB_DEVICE int64_t block_at(int64_t candidate) const {
    return load(w.super + candidate / kBranch) * int64_t(kBranch) + candidate % kBranch;
  }
  SB_DEVICE int64_t take_blocks(int64_t supers) const {
    for (int64_t i = thread; i < supers * kBranch; i += kRouteThreads) {
      const int64_t block = block_at(i);
      const bool is_outside = block >= first && block < blocks && (block < low || (!p.is_causal && block >= high));
      store(w.key + i, is_outside && has_keys(fine(block)) ? sortable(score(fine(block))) : kNever);
    }
    sync_block();
    return m.block.take_top(w.key, supers * kBranch, wanted, w.taken);
  }

  const RoutingParams& p;
  const PerQueryMemory& m;
  const PerQueryScratch& w;
  const int64_t b, h, slot;
  const RouteRow row;
  const RowRange range;
  const int64_t blocks;
  const int thread = thread_index();
  // The window [low, high) in blocks; the blocks before `first` hold the sinks; blocks to choose.
  int64_t low = 0, high = 0, first = 0, wanted = 0;
};

template <class E>
SB_KERNEL route_per_query(RoutingParams p) {
  const PerQueryMemory memory(p);
  const PerQueryScratch scratch(p);
  for_each_task(p.batch * p.q_heads * p.q_tokens, [&](int64_t task) {
    const int64_t head = task / p.q_tokens;
    RoutedQuery<E>(p, memory, scratch, head / p.q_heads, head % p.q_heads, task % p.q_tokens).run();
  });
}

}  // namespace sb::cuda
