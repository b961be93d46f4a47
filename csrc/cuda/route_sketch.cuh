// Routing per query by sketches (docs/algorithm.md, section 3): a warp makes the sketch of a key, and a block of
// threads the list of a query, from blocks that have a key whose sketch agrees with the query's in many bits.
#pragma once
#include "../math/sketch.h"
#include "route_per_query.cuh"

namespace sb::cuda {

// The sketch of a token, by a warp, which has `value` to itself: sketch_width() floats.
template <class E>
class TokenSketch {
 public:
  bool is_finite = true;

  SB_DEVICE TokenSketch(const RoutingParams& p, const E* token, const Shared<float>& value) {
    const int lane = lane_index();
    const int64_t width = sketch_width(p.head_dim);
    for (int64_t e = lane; e < width; e += kWarp) value.set(e, e < p.head_dim ? float(widened(load(token + e))) : 0.0f);
    sync_warp();
    for (int round = 0; round < kSketchRounds; ++round) {
      for (int64_t e = lane; e < width; e += kWarp)
        if (is_sign_negative(round, e)) value.set(e, -value.get(e));
      sync_warp();
      for (int64_t half = 1; half < width; half *= 2) {
        for (int64_t i = lane; i < width / 2; i += kWarp) {
          const int64_t at = i / half * 2 * half + i % half;
          const float a = value.get(at), b = value.get(at + half);
          value.set(at, a + b), value.set(at + half, a - b);
        }
        sync_warp();
      }
    }
    float y[2], largest = 0;
    for (int i = 0; i < 2; ++i) {
      y[i] = value.get(i * kWarp + lane);
      word[i] = ballot(y[i] < 0.0f);
      is_finite = is_finite && ballot(y[i] - y[i] != 0.0f) == 0;
      largest = larger(largest, size_of(y[i]));
    }
    largest = warp_max(largest);
    for (int i = 0; i < 2; ++i) counted[i] = ballot(is_finite && size_of(y[i]) * kSmallShare > largest);
    sync_warp();
  }
  // The first lane has the first half of the bits, the second one the other.
  SB_DEVICE uint32_t of_lane() const { return lane_index() == 0 ? word[0] : word[1]; }
  // Which of those count in a query.
  SB_DEVICE uint32_t counted_of_lane() const { return lane_index() == 0 ? counted[0] : counted[1]; }

 private:
  static SB_DEVICE float size_of(float y) { return y < 0.0f ? -y : y; }
  uint32_t word[2], counted[2];
};

template <class E>
SB_KERNEL route_sketches(RoutingParams p) {
  const auto value = shared_array<float>(warp_index() * sketch_width(p.head_dim) * int64_t(sizeof(float)));
  const int64_t keys = p.batch * p.kv_heads * p.k_tokens;
  for_each_task(ceil_div(keys, kRouteWarps), [&](int64_t task) {
    const int64_t at = task * kRouteWarps + warp_index();
    if (at >= keys) return;
    const RouteRow row(p, at / p.k_tokens);
    const int64_t j = at % p.k_tokens;
    // A row of so few blocks that all are candidates is not searched.
    if (ceil_div(int64_t(row.length), kBranch) <= candidates_per_query(p.keys, p.window)) return;
    if (j < row.first || !row.is_valid(j - row.first)) return;
    const TokenSketch<E> sketch(p, p.k.at<const E>(row.b, row.kv, j), value);
    if (lane_index() < 2) store(p.sketch + 2 * at + lane_index(), sketch.of_lane());
    if (lane_index() == 0) store(p.is_finite + at, uint8_t(sketch.is_finite ? 1 : 0));
  });
}

struct SketchMemory {
  static SB_HD int64_t of_query(const RoutingParams& p) { return p.head_dim * int64_t(sizeof(float)); }
  static SB_HD int64_t of_sketch(const RoutingParams& p) {
    return (sketch_width(p.head_dim) + 4) * int64_t(sizeof(float));
  }
  static SB_HD int64_t bytes(const RoutingParams& p) { return of_query(p) + of_sketch(p) + RouteBlock::bytes(); }
  Shared<float> query, value;  // scaled, in base 2; what its sketch is made in
  Shared<uint32_t> word;       // of its sketch, two, and which of their bits count
  RouteBlock block;
  SB_DEVICE explicit SketchMemory(const RoutingParams& p)
      : query(shared_array<float>(0)),
        value(shared_array<float>(of_query(p))),
        word(shared_array<uint32_t>(of_query(p) + sketch_width(p.head_dim) * int64_t(sizeof(float)))),
        block(of_query(p) + of_sketch(p)) {}
};

template <class E>
class SketchedQuery {
 public:
  SB_DEVICE SketchedQuery(const RoutingParams& p, const SketchMemory& memory, const PerQueryScratch& scratch, int64_t b,
                          int64_t h, int64_t slot)
      : p(p),
        m(memory),
        w(scratch),
        b(b),
        h(h),
        slot(slot),
        row(p, b * p.kv_heads + h / (p.q_heads / p.kv_heads)),
        range(load(p.rows + b)) {}

  SB_DEVICE void run() const {
    const int64_t i = range.q_first + slot;
    if (i >= range.q_end || (p.q_mask && load(p.q_mask + b * p.q_tokens + i))) return;
    const int64_t position = position_of(p, row, range, i, slot);
    if (p.is_causal && position < 0) return;
    const QueryWindow window(p, h, row.length, position);
    read_query(i);
    const int64_t candidates = take_candidates(window);
    for (int64_t c = warp_index(); c < candidates; c += kRouteWarps) {
      const int32_t weight = weight_of(load(candidate + c));
      if (lane_index() == 0) store(w.key + c, weight);
    }
    sync_block();
    const int64_t taken = m.block.take_top(w.key, candidates, window.wanted, w.taken),
                  list = (b * p.q_heads + h) * p.blocks + slot;
    write_query_list(
        p, m.block, window, list, taken, [&](int64_t at) { return int64_t(load(candidate + load(w.taken + at))); },
        [&](int64_t block) { return has_keys(block); });
  }

 private:
  SB_DEVICE void read_query(int64_t i) const {
    const E* q = p.q.at<const E>(b, h, i);
    sync_block();  // the last query is done with it
    for (int64_t e = thread_index(); e < p.head_dim; e += kRouteThreads)
      m.query.set(e, float(widened(load(q + e))) * p.scale * float(kLog2e));
    if (warp_index() == 0) {
      const TokenSketch<E> sketch(p, q, m.value);
      // A negative scale turns the query around.
      if (lane_index() < 2) {
        m.word.set(lane_index(), p.scale < 0 ? ~sketch.of_lane() : sketch.of_lane());
        m.word.set(2 + lane_index(), sketch.counted_of_lane());
      }
    }
    sync_block();
  }
  SB_DEVICE bool has_keys(int64_t block) const {
    bool any = false;
    for (int i = 0; i < kBranch; ++i) any = any || row.is_valid(block * kBranch + i);
    return any;
  }
  // In how many bits the key of a block that agrees best does, or does not count; kNever where the block has none.
  SB_DEVICE int32_t agreement(int64_t block) const {
    int32_t most = kNever;
    for (int i = 0; i < kBranch; ++i) {
      if (!row.is_valid(block * kBranch + i)) continue;
      const int64_t at = int64_t(row.head) * p.k_tokens + row.first + block * kBranch + i;
      const int apart = bits_set((load(p.sketch + 2 * at) ^ m.word.get(0)) & m.word.get(2)) +
                        bits_set((load(p.sketch + 2 * at + 1) ^ m.word.get(1)) & m.word.get(3));
      const int32_t own = load(p.is_finite + at) ? kSketchBits - apart : kMostAgreement;
      most = own > most ? own : most;
    }
    return most;
  }
  // Writes the blocks that agree best to `candidate`, ascending, and returns how many they are.
  SB_DEVICE int64_t take_candidates(const QueryWindow& window) const {
    const int64_t blocks = p.is_causal ? window.low : ceil_div(row.length, kBranch),
                  kept = candidates_per_query(p.keys, p.window);
    for (int64_t block = thread_index(); block < blocks; block += kRouteThreads) {
      const bool may_choose = block >= window.first && (block < window.low || (!p.is_causal && block >= window.high));
      store(w.key + block, !may_choose ? kNever : blocks > kept ? agreement(block) : has_keys(block) ? 0 : kNever);
    }
    sync_block();
    return m.block.take_top(w.key, blocks, kept, candidate, 0, kMostAgreement + 1);
  }
  // log2 of what the query weighs the keys of a block with, sortable, by a warp: four lanes for a key.
  SB_DEVICE int32_t weight_of(int64_t block) const {
    constexpr int kShare = kWarp / kBranch;
    const int lane = lane_index(), key = lane / kShare;
    const bool is_valid = row.is_valid(block * kBranch + key);
    const E* k = p.k.at<const E>(row.b, row.kv, row.first + (is_valid ? block * kBranch + key : 0));
    float score = 0;
    for (int64_t e = lane % kShare; e < p.head_dim; e += kShare)
      score += m.query.get(e) * (is_valid ? float(widened(load(k + e))) : 0.0f);
    for (int step = 1; step < kShare; step *= 2) score += shuffle_xor(score, step);
    if (ballot(is_valid && score != score)) return kNoNumber;
    const float top = warp_max(is_valid ? score : -float(INFINITY));
    const float sum = warp_sum(is_valid && lane % kShare == 0 ? exp2_of(score - top) : 0.0f);
    return sortable(top - top != 0.0f ? top : top + log2_of(sum));
  }

  const RoutingParams& p;
  const SketchMemory& m;
  const PerQueryScratch& w;
  const int64_t b, h, slot;
  const RouteRow row;
  const RowRange range;
  int32_t* const candidate = w.super;
};

template <class E>
SB_KERNEL route_by_sketch(RoutingParams p) {
  const SketchMemory memory(p);
  const PerQueryScratch scratch(p);
  for_each_task(p.batch * p.q_heads * p.q_tokens, [&](int64_t task) {
    const int64_t head = task / p.q_tokens;
    SketchedQuery<E>(p, memory, scratch, head / p.q_heads, head % p.q_heads, task % p.q_tokens).run();
  });
}

}  // namespace sb::cuda
