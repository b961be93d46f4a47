// What the rows of a tile of query slots list and see where they are not all alike: lists of fewer than 16 queries, and
// causal edges. A stage is a group of kStage keys, of which a pattern of 16 bits says for every row what it lists, so
// that a row's sums do not depend on the lists of others: their keys have weight 0 for it, at places that it does not
// choose. Lane l knows row l % kTile. Keys count from the row's first key.
#pragma once
#include "tile_memory.cuh"

namespace sb::cuda {

// Bits [low, high) of a pattern.
SB_DEVICE uint32_t bits_between(int32_t low, int32_t high) {
  low = low < 0 ? 0 : low, high = high > kStage ? kStage : high;
  return low < high ? (1u << high) - (1u << low) : 0;
}
// Over the rows; every lane gets the result.
SB_DEVICE int32_t least_of_rows(int32_t value) {
  SB_UNROLL
  for (int mask = kTile / 2; mask > 0; mask /= 2) {
    const int32_t other = shuffle_xor(value, mask);
    value = other < value ? other : value;
  }
  return value;
}
SB_DEVICE uint32_t any_of_rows(uint32_t pattern) {
  SB_UNROLL
  for (int mask = kTile / 2; mask > 0; mask /= 2) pattern |= shuffle_xor(pattern, mask);
  return pattern;
}

// Keys before state_end are in the state that the tile reads, or listed by rows that see them all; keys from there to
// seen_end are weighed pair by pair. Without a causal edge all keys are of the first kind; with one state_end is a
// multiple of kStage, so that no group of listed keys has keys of both.
struct TileEdges {
  int32_t first;  // the edge of row 0: row r sees keys to first + r, of those before seen_end
  int32_t state_end, seen_end;
  int32_t state_slot;

  TileEdges() = default;

  // By positions and shapes alone, and no later row has a say. Early tiles read no state: their complements are small.
  SB_DEVICE TileEdges(const ForwardParams& p, const RowRange& range, int64_t first_slot) {
    const int64_t last = int64_t(range.k_end) - range.k_first - 1;
    first = first_of(p, range, first_slot);
    int64_t edge = first;
    const int64_t seen = edge + kTile - 1 < last ? edge + kTile : last + 1;
    edge = edge < -1 ? -1 : edge;
    state_slot = int32_t(kv_state_of_edge(p, edge));
    if (!p.is_causal) {
      state_end = seen_end = int32_t(last + 1);
      return;
    }
    if (p.has_low_rank()) {
      if (state_slot * kChunk <= kByKeyLimit + p.longest_list) state_slot = 0;
      state_end = state_slot * int32_t(kChunk);
    } else {
      state_end = edge < 0 ? 0 : int32_t(edge) / kStage * kStage;
    }
    seen_end = int32_t(seen);
  }
  SB_DEVICE static int32_t first_of(const ForwardParams& p, const RowRange& range, int64_t first_slot) {
    const int64_t last = int64_t(range.k_end) - range.k_first - 1,
                  edge = p.is_causal ? int64_t(range.q_first) + first_slot + range.offset - range.k_first : last;
    return int32_t(edge < -kTile ? -kTile : edge > last ? last : edge);
  }
  // Which keys from `begin` on row `row` sees.
  SB_DEVICE uint32_t seen_by(int row, int32_t begin) const { return bits_between(0, first + row + 1 - begin); }
};

// A stage: this lane's key, or -1 for none; the first key of the group; and the pattern of this lane's row.
struct StageKeys {
  int32_t key, begin;
  uint32_t pattern;
};

class TileRows {
 public:
  // `has_query`: whether this lane's row has one.
  SB_DEVICE TileRows(const ForwardParams& p, const TileEdges& edges, const RowRange& range, int32_t b, int32_t h,
                     int32_t first_slot, bool has_query)
      : p(p),
        edges(edges),
        row(lane_index() % kTile),
        first_slot(first_slot),
        slots(int32_t(slots_of_row(p, range))),
        b(b),
        first_key(range.k_first) {
    const int32_t slot = first_slot + row;
    if (slot >= slots || (p.by_groups && !has_query)) return;
    const int64_t block = slot / p.block_q;
    if (p.span) {
      const Span span(p, range, b, block);
      const int64_t end = edges.seen_end;
      sinks = int32_t(p.span_sinks < end ? p.span_sinks : end);
      lo = int32_t(span.lo < sinks ? sinks : span.lo > end ? end : span.lo);
      hi = int32_t(span.hi < lo ? lo : span.hi > end ? end : span.hi);
    }
    if (p.index) {
      const int64_t of_heads = b * p.list_heads + h * p.list_heads / p.q_heads;
      const BlockList list(p, b, h * p.list_heads / p.q_heads, block);
      entries = (of_heads * p.blocks + block) * p.capacity, count = int32_t(list.count);
    }
  }

  // The next stage of listed keys before state_end; false behind the last.
  SB_DEVICE bool next_listed(StageKeys& to) { return p.by_groups ? next_group(to) : next_positions(to); }

  // Before the first call of next_seen.
  SB_DEVICE void enter_seen() {
    if (!p.by_groups && p.index) at = int32_t(lower_bound(p.index + entries, count, edges.state_end / p.block_k));
    group = edges.state_end;
  }
  // The next stage of the keys from state_end to seen_end.
  SB_DEVICE bool next_seen(StageKeys& to) {
    if (group >= edges.seen_end) return false;
    to.begin = group, group += kStage;
    to.pattern = (bits_of_span(to.begin) | bits_of_list(to.begin)) & edges.seen_by(row, to.begin);
    const int32_t key = to.begin + row;
    to.key = key < edges.seen_end && is_valid(key) ? key : -1;
    if (!p.has_low_rank() && !(any_of_rows(to.pattern) >> row & 1)) to.key = -1;
    return true;
  }

 private:
  SB_DEVICE bool is_valid(int32_t key) const {
    return !(p.k_mask && load(p.k_mask + b * p.k_tokens + first_key + key));
  }

  // -------------------- patterns of this lane's row

  SB_DEVICE uint32_t bits_of_span(int32_t begin) const {
    return bits_between(-begin, sinks - begin) | bits_between(lo - begin, hi - begin);
  }
  // Calls come with ascending `begin`; entries ascend.
  SB_DEVICE uint32_t bits_of_list(int32_t begin) {
    uint32_t bits = 0;
    for (; at < count; ++at) {
      const int64_t key = int64_t(load(p.index + entries + at)) * p.block_k - begin, end = key + p.block_k;
      if (key >= kStage) break;
      if (key >= -int64_t(begin) && end > 0)
        bits |= bits_between(key < 0 ? 0 : int32_t(key), end > kStage ? kStage : int32_t(end));
      if (end > kStage) break;
    }
    return bits;
  }
  // The first group of kStage keys at or behind `begin` of which the list has keys.
  SB_DEVICE int32_t next_of_list(int32_t begin) {
    for (; at < count; ++at) {
      const int64_t entry = load(p.index + entries + at), key = entry * p.block_k;
      if (entry < 0 || key + p.block_k <= begin) continue;
      if (key >= edges.state_end) break;
      return (key < begin ? begin : int32_t(key)) / kStage * kStage;
    }
    return kNoGroup;
  }

  // -------------------- stages of groups: all rows together

  SB_DEVICE bool next_group(StageKeys& to) {
    for (;;) {
      if (phase < kLists && group >= group_end) {
        ++phase;
        if (phase == kSinks) {
          group = 0, group_end = int32_t(p.span_sinks < edges.state_end ? p.span_sinks : edges.state_end);
        } else if (phase == kSpans) {
          // Groups begin where the first span does.
          group = least_of_rows(lo < hi ? lo : kNoGroup);
          group_end = -least_of_rows(lo < hi ? -hi : 0);
          if (group_end > edges.state_end) group_end = edges.state_end;
        } else {
          group = 0;
        }
        continue;
      }
      if (phase == kLists) {
        group = least_of_rows(next_of_list(group));
        if (group >= edges.state_end) return false;
      }
      to.begin = group, group += kStage;
      to.pattern = phase == kSinks   ? bits_between(-to.begin, sinks - to.begin)
                   : phase == kSpans ? bits_between(lo - to.begin, hi - to.begin)
                                     : bits_of_list(to.begin) & ~bits_of_span(to.begin);
      to.pattern &= bits_between(0, edges.state_end - to.begin);
      const uint32_t any = any_of_rows(to.pattern);
      if (any == 0) {
        if (phase == kSpans) skip_to_span();
        continue;
      }
      const int32_t key = to.begin + row;
      to.key = any >> row & 1 && is_valid(key) ? key : -1;
      return true;
    }
  }

  // To the next group of which a span has keys, so that spans far from each other take no time between them.
  SB_DEVICE void skip_to_span() {
    const int32_t next = least_of_rows(lo < hi && hi > group ? (lo > group ? lo : group) : kNoGroup);
    group = next >= group_end ? group_end : group + (next - group) / kStage * kStage;
  }

  // -------------------- stages of positions: block after block of queries, each with all rows of its list

  SB_DEVICE bool next_positions(StageKeys& to) {
    for (;;) {
      const int32_t left = slots - first_slot;
      if (block_row >= kTile || block_row >= left) return false;
      const auto block_q = uint32_t(p.block_q < INT32_MAX ? p.block_q : INT32_MAX);
      const int64_t next_block = int64_t(uint32_t(first_slot + block_row) / block_q + 1) * block_q - first_slot;
      const int32_t rows_end = next_block < kTile ? int32_t(next_block) : kTile, end = edges.state_end,
                    of_sinks = shuffle_from(sinks, block_row), first = shuffle_from(lo, block_row),
                    behind = shuffle_from(hi, block_row), all = shuffle_from(count, block_row);
      const int32_t* list = p.index + shuffle_from(entries, block_row);
      const int32_t in_sinks = of_sinks < end ? of_sinks : end, in_span = (behind < end ? behind : end) - first;
      const auto dense = uint32_t(in_sinks + (in_span > 0 ? in_span : 0)),
                 keys = uint32_t(p.block_k < end ? p.block_k : end);
      // Entries ascend, so that no more than these have keys before the end.
      if (position == 0 && p.index && end > 0) {
        const auto most = int64_t((uint32_t(end) - 1) / keys + 1);
        at = int32_t(lower_bound(list, all < most ? all : most, ceil_div(end, p.block_k)));
      }
      const uint32_t positions = dense + (p.index ? uint32_t(at) * keys : 0u);
      if (position >= positions) {
        block_row = rows_end, position = 0;
        continue;
      }
      const uint32_t here = position + uint32_t(row);
      position += kStage;
      to.begin = 0, to.pattern = row >= block_row && row < rows_end ? (1u << kStage) - 1 : 0, to.key = -1;
      if (here < uint32_t(in_sinks)) {
        to.key = int32_t(here);
      } else if (here < dense) {
        to.key = first + int32_t(here) - in_sinks;
      } else if (here < positions) {
        const uint32_t i = (here - dense) / keys;
        const int32_t entry = load(list + i);
        const int64_t key = entry * p.block_k + (here - dense) % keys;
        const bool is_new = entry >= 0 && key < end && key >= of_sinks && !(key >= first && key < behind) &&
                            !(i > 0 && load(list + i - 1) >= entry);
        if (is_new) to.key = int32_t(key);
      }
      if (to.key >= 0 && !is_valid(to.key)) to.key = -1;
      return true;
    }
  }

  static constexpr int32_t kNoGroup = INT32_MAX;
  static constexpr int kSinks = 0, kSpans = 1, kLists = 2;

  const ForwardParams& p;
  const TileEdges& edges;
  const int row;
  const int32_t first_slot, slots;
  const int32_t b, first_key;
  int32_t sinks = 0, lo = 0, hi = 0, count = 0;  // of the row's span, and of its entries
  int64_t entries = 0;                           // where these begin
  int32_t at = 0;                                // the first entry with keys that are not yet in a stage
  int phase = -1;
  int32_t group = 0, group_end = 0;
  int32_t block_row = 0;  // the first row of a block of queries
  uint32_t position = 0;
};

}  // namespace sb::cuda
