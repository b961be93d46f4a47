// Routing per query of tokens of 16 bits on tensor cores: as route_per_query.cuh, but four queries of a block of
// threads meet superblocks in one product, and a warp makes the list of one of them, with the scores in its registers.
#pragma once
#include "route_per_query.cuh"
#include "route_tile.cuh"

namespace sb::cuda {

struct QueryTileMemory {
  static SB_HD int64_t queries(const RoutingParams& p) { return kGroup * (p.head_dim + 1) * int64_t(sizeof(float)); }
  static SB_HD int64_t bytes(const RoutingParams& p) {
    return queries(p) + PoolOperand::bytes(p.head_dim) + kGroup * int64_t(sizeof(int32_t));
  }
  Shared<float> query;  // scaled, and the factor of the spread; of four queries
  PoolOperand operand;
  Shared<int32_t> supers;  // that a query chooses from
  SB_DEVICE explicit QueryTileMemory(const RoutingParams& p)
      : query(shared_array<float>(0)),
        operand(queries(p)),
        supers(shared_array<int32_t>(queries(p) + PoolOperand::bytes(p.head_dim))) {}
};

// In global memory, of a query.
class QueryTileScratch {
 public:
  static SB_HD int64_t words(int64_t units) { return kGroup * kArrays * units; }
  SB_DEVICE QueryTileScratch(const RoutingParams& p, int query)
      : begin(p.scratch + block_index() * p.scratch_words + query * kArrays * p.units), units(p.units) {}
  SB_DEVICE int32_t* key() const { return begin; }                // sortable scores
  SB_DEVICE int32_t* super() const { return begin + units; }      // chosen superblocks
  SB_DEVICE int32_t* block() const { return begin + 2 * units; }  // candidates, then the chosen ones
  SB_DEVICE int32_t* next_key() const { return begin + 3 * units; }
  SB_DEVICE int32_t* next() const { return begin + 4 * units; }

 private:
  static constexpr int kArrays = 5;
  int32_t* const begin;
  const int64_t& units;
};

template <class E>
class QueryTiles {
  // Rows of 32 superblocks or blocks in the registers of a warp.
  static constexpr int kRows = int(kMostRouteRows / 2);

 public:
  SB_DEVICE QueryTiles(const RoutingParams& p, const QueryTileMemory& memory, int64_t b, int64_t h, int64_t group)
      : p(p),
        m(memory),
        b(int(b)),
        h(int(h)),
        row(p, b * p.kv_heads + h / (p.q_heads / p.kv_heads)),
        range(load(p.rows + b)),
        slot(int(group) * kGroup + warp) {}

  SB_DEVICE void run() const {
    const int64_t i = int64_t(range.q_first) + slot;
    bool is_live = i < range.q_end && !(p.q_mask && load(p.q_mask + b * p.q_tokens + i));
    const int64_t position = is_live ? position_of(p, row, range, i, slot) : 0;
    if (p.is_causal && position < 0) is_live = false;
    const QueryWindow window(p, h, row.length, position);
    read_query(i, is_live);
    // Those that the query may see. It chooses where they are more than it keeps.
    const int64_t kept = candidate_superblocks(p.keys, p.window, p.pools),
                  supers = p.is_causal ? window.low / kBranch : ceil_div(row.length, kBranch * kBranch);
    const bool is_searched = is_live && supers > kept;
    if (lane == 0) m.supers.set(warp, is_searched ? int32_t(supers) : 0);
    sync_block();
    m.operand.write<Bfloat16>(
        p.head_dim, [&](int g, int64_t e) { return e < p.head_dim ? m.query.get(g * (p.head_dim + 1) + e) : 0.0f; });
    sync_block();
    score_supers();
    sync_block();
    if (is_live) {
      const QueryTileScratch w(p, warp);
      for (int s = lane; s < supers; s += kWarp) store(w.super() + s, s);
      sync_warp();
      int chosen = int(supers);
      if (is_searched) chosen = take_in_turn<kRows>(w.key(), w.super(), chosen, kept, w.next_key(), w.next());
      if (p.is_causal && window.low % kBranch) {  // the one that the window cuts
        if (lane == 0) store(w.super() + chosen, int32_t(window.low / kBranch));
        ++chosen;
      }
      sync_warp();
      write_list(w, window, take_blocks(w, window, chosen));
    }
    sync_block();
  }

 private:
  SB_DEVICE void read_query(int64_t i, bool is_live) const {
    const E* q = p.q.at<const E>(b, h, is_live ? i : 0);
    float square = 0;
    for (int64_t e = lane; e < p.head_dim; e += kWarp) {
      const float value = is_live ? float(widened(load(q + e))) * p.scale : 0.0f;
      m.query.set(warp * (p.head_dim + 1) + e, value * unit_of_score(p));
      square += value * value;
    }
    square = warp_sum(square);
    if (lane == 0)
      m.query.set(warp * (p.head_dim + 1) + p.head_dim, square * (0.5f / float(p.head_dim)) * unit_of_score(p));
  }
  // Puts scores of the runs that own names (-1: none) to put(query, row, score), a row each.
  template <class Put>
  SB_DEVICE void score_runs(int level, int own, const Put& put) const {
    const RowNumbers numbers = RowNumbers::of_runs(p, level, row.head);
    const auto units = uint32_t(kRouteParts * p.head_dim / PoolOperand::kUnit);
    const int query = PoolOperand::pool();
    const float of_spread = m.query.get(query * (p.head_dim + 1) + p.head_dim);
    // The two groups of a run are neighbours among the 32 rows of a turn.
    const int groups = int(p.groups_of_run()), runs = kWarp / groups;
    const auto row_of = [&](int run, int i) { return uint32_t(run * groups + i % groups); };
    SB_NO_UNROLL
    for (int turn = 0; turn < groups; ++turn) {
      float product[4];
      m.operand.multiply<kRouteParts, Bfloat16>(
          int(p.head_dim),
          p.run_parts[level] + row.head * (level ? p.coarse_runs : p.fine_runs) * groups * kRouteParts * p.head_dim,
          [&](int i) {
            const int run = shuffle_from(own, turn * runs + i / groups);
            return run >= 0 ? row_of(run, i) * units : PoolOperand::kNoRow;
          },
          product);
      SB_UNROLL
      for (int n = 0; n < 4; ++n) {
        const int i = 8 * n + PoolOperand::kept_row(), at = turn * runs + i / groups, run = shuffle_from(own, at);
        float score = product[n];
        if (run >= 0) score += of_spread * numbers.get(row_of(run, i), RowNumbers::kSquare);
        if (groups == 2) {
          const float keys = run >= 0 ? numbers.count(row_of(run, i)) : 1.0f;
          // kept_row() of that lane is the other group's.
          const float others = shuffle_xor(keys, kWarp / 2), other = shuffle_xor(score, kWarp / 2);
          score = log2_of_sum(keys, score, others, other);
        }
        if (run >= 0 && i % groups == 0) put(query, at, score);
      }
    }
  }
  // The run, or -1 where it has no keys.
  SB_DEVICE int with_keys(int level, int run, bool is_run) const {
    return is_run && RowNumbers::of_runs(p, level, row.head).count(uint32_t(run * p.groups_of_run())) > 0.0f ? run : -1;
  }

  // The superblocks that any query chooses from, for all four.
  SB_DEVICE void score_supers() const {
    int most = 0;
    for (int g = 0; g < kGroup; ++g) most = m.supers.get(g) > most ? m.supers.get(g) : most;
    SB_NO_UNROLL
    for (int first = warp * kWarp; first < most; first += kRouteWarps * kWarp) {
      const int own = with_keys(1, first + lane, first + lane < most);
      if (first + lane < most && own < 0)
        for (int g = 0; g < kGroup; ++g) store(QueryTileScratch(p, g).key() + first + lane, kNever);
      score_runs(1, own, [&](int query, int at, float score) {
        store(QueryTileScratch(p, query).key() + first + at, sortable(score));
      });
    }
  }

  // By a warp: the best blocks of the chosen superblocks; returns how many.
  SB_DEVICE int take_blocks(const QueryTileScratch& w, const QueryWindow& window, int chosen) const {
    const int count = chosen * kBranch, blocks = int(ceil_div(row.length, kBranch));
    SB_NO_UNROLL
    for (int first = 0; first < count; first += kWarp) {
      const int unit = first + lane;
      const int block = unit < count ? load(w.super() + unit / kBranch) * kBranch + unit % kBranch : -1;
      const bool is_outside = block >= window.first && block >= 0 && block < blocks &&
                              (block < window.low || (!p.is_causal && block >= window.high));
      const int own = with_keys(0, block, is_outside);
      if (unit < count) store(w.block() + unit, block);
      if (unit < count && own < 0) store(w.key() + unit, kNever);
      score_runs(0, own, [&](int query, int at, float score) {
        if (query == warp) store(w.key() + first + at, sortable(score));
      });
    }
    sync_warp();
    return take_in_turn<kRows>(w.key(), w.block(), count, window.wanted, w.next_key(), w.next());
  }

  // The sinks' blocks, then the best blocks with the window's blocks between them.
  SB_DEVICE void write_list(const QueryTileScratch& w, const QueryWindow& window, int taken) const {
    const int64_t list = (int64_t(b) * p.q_heads + h) * p.blocks + slot;
    int32_t *const begin = p.index + list * p.capacity, *out = begin;
    int before = 0;
    for (int i = lane; i < taken; i += kWarp) before += load(w.block() + i) < window.low ? 1 : 0;
    before = warp_total(before);
    out += write_blocks(0, window.first, out);
    for (int i = lane; i < before; i += kWarp) store(out + i, load(w.block() + i));
    out += before;
    out += write_blocks(window.low > window.first ? window.low : window.first, window.high, out);
    for (int i = before + lane; i < taken; i += kWarp) store(out + i - before, load(w.block() + i));
    if (lane == 0) store(p.count + list, int32_t(out - begin + (taken - before)));
  }
  // Blocks in [begin, end) that have keys; returns how many.
  SB_DEVICE int write_blocks(int64_t begin, int64_t end, int32_t* out) const {
    int found = 0;
    for (int64_t first = begin; first < end; first += kWarp) {
      const int block = with_keys(0, int(first) + lane, first + lane < end);
      const uint32_t all = ballot(block >= 0);
      if (block >= 0) store(out + found + bits_set(all & ((uint32_t(1) << lane) - 1)), block);
      found += bits_set(all);
    }
    return found;
  }

  const RoutingParams& p;
  const QueryTileMemory& m;
  const int warp = warp_index(), lane = lane_index();
  const int b, h;
  const RouteRow row;
  const RowRange range;
  const int slot;
};

template <class E>
SB_KERNEL SB_THREADS_AND_BLOCKS(kRouteThreads, 4) route_per_query_tile(RoutingParams p) {
  const QueryTileMemory memory(p);
  const int64_t groups = ceil_div(p.q_tokens, kGroup);
  for_each_task(p.batch * p.q_heads * groups, [&](int64_t task) {
    const int64_t head = task / groups;
    QueryTiles<E>(p, memory, head / p.q_heads, head % p.q_heads, task % groups).run();
  });
}

}  // namespace sb::cuda
