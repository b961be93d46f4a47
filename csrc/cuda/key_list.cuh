// Query slots, and the keys that a query lists: sinks, a span, and listed blocks of keys. Positions of a list are
// looked up one by one, so lists need no room. Keys count from the row's first key.
#pragma once
#include "../math/edges.h"
#include "device.h"

namespace sb::cuda {

// The query of a slot of the row; any number where an order says so.
SB_DEVICE int64_t query_of_slot(const ForwardParams& p, const RowRange& range, int64_t b, int64_t h, int64_t slot) {
  if (!p.order) return range.q_first + slot;
  return load(p.order + (b * p.order_heads + h * p.order_heads / p.q_heads) * p.q_tokens + slot);
}

// [lo, hi), at most span_keys long.
struct Span {
  int64_t lo, hi;
  SB_DEVICE Span(const ForwardParams& p, const RowRange& range, int64_t b, int64_t block) {
    const int32_t* span = p.span + b * p.span_batch + block * 2;
    lo = int64_t(load(span)) - range.k_first, hi = int64_t(load(span + 1)) - range.k_first;
    hi = hi > lo + p.span_keys ? lo + p.span_keys : hi;
  }
};

// The first position of `count` ascending entries with `wanted` or more.
SB_DEVICE int64_t lower_bound(const int32_t* entries, int64_t count, int64_t wanted) {
  int64_t begin = 0, end = count;
  while (begin < end) {
    const int64_t middle = (begin + end) / 2;
    if (load(entries + middle) < wanted)
      begin = middle + 1;
    else
      end = middle;
  }
  return begin;
}

// The list of a block of queries, of which entries in use may still name no key.
struct BlockList {
  const int32_t* entries;
  int64_t count;
  SB_DEVICE BlockList(const ForwardParams& p, int64_t b, int64_t list_head, int64_t block) {
    const int64_t row = (b * p.list_heads + list_head) * p.blocks + block, used = load(p.count + row);
    entries = p.index + row * p.capacity;
    count = used < 0 ? 0 : used > p.capacity ? p.capacity : used;
  }
  // Entry i, -1 if a search for it ends elsewhere: of equal entries in a list that does not ascend, at most one counts.
  SB_DEVICE int64_t entry(int64_t i) const {
    const int64_t here = load(entries + i);
    return lower_bound(entries, count, here) == i ? here : -1;
  }
};

// The row's keys from `first` to an edge that are not ignored, at positions begin to end. Where few of many are not, as
// little time goes to the others.
struct ValidKeys {
  const int32_t* keys;
  int64_t begin, end;
  SB_DEVICE ValidKeys(const ForwardParams& p, int64_t b, int64_t first, int64_t edge)
      : keys(p.valid_keys ? p.valid_keys + b * p.k_tokens : nullptr), begin(first), end(edge + 1) {
    if (!keys) return;
    const int64_t all = load(p.valid_before + b * p.slots + p.slots - 1);
    begin = first > 0 ? lower_bound(keys, all, first) : 0, end = lower_bound(keys, all, edge + 1);
  }
  // -1 behind the last.
  SB_DEVICE int64_t at(int64_t i) const { return i >= end ? -1 : keys ? load(keys + i) : i; }
};

struct KeyList {
  int64_t edge, sinks, lo, hi;
  const int32_t* entries;
  int64_t count, block_k;
  const uint8_t* mask;

  // Of query slot `slot` with its edge. Entries of any content are safe: what no key matches lists nothing.
  SB_DEVICE KeyList(const ForwardParams& p, const RowRange& range, int64_t b, int64_t h, int64_t slot, int64_t edge)
      : edge(edge),
        sinks(0),
        lo(0),
        hi(0),
        entries(nullptr),
        count(0),
        block_k(p.block_k),
        mask(p.k_mask ? p.k_mask + b * p.k_tokens + range.k_first : nullptr) {
    const int64_t block = slot / p.block_q;
    if (p.span) {
      const Span span(p, range, b, block);
      sinks = p.span_sinks > edge + 1 ? edge + 1 : p.span_sinks;
      lo = span.lo < sinks ? sinks : span.lo;
      hi = span.hi > edge + 1 ? edge + 1 : span.hi;
      hi = hi < lo ? lo : hi;
    }
    if (p.index) {
      const BlockList list(p, b, h * p.list_heads / p.q_heads, block);
      entries = list.entries, count = list.count;
    }
  }

  SB_DEVICE int64_t positions() const { return sinks + (hi - lo) + block_positions(); }

  // The key at a position; -1 where there is none, it is ignored, or another position has it.
  SB_DEVICE int64_t key_at(int64_t position) const {
    if (position < sinks) return valid_or_none(position);
    position -= sinks;
    if (position < hi - lo) return valid_or_none(lo + position);
    return key_of_blocks(position - (hi - lo));
  }

  // The same of the listed blocks alone.
  SB_DEVICE int64_t block_positions() const { return count * keys_of_entry(); }
  SB_DEVICE int64_t key_of_blocks(int64_t position) const {
    const int64_t keys = keys_of_entry();
    if (position >= count * keys) return -1;
    const int64_t i = position / keys, entry = load(entries + i), key = entry * block_k + position % keys;
    if (entry < 0 || key > edge || key < sinks || (key >= lo && key < hi)) return -1;
    if (i > 0 && load(entries + i - 1) >= entry) return -1;
    return valid_or_none(key);
  }

  // Whether key_at has `key`, which is at most `edge`, at any position; entries ascend.
  SB_DEVICE bool lists(int64_t key) const {
    if (key < sinks || (key >= lo && key < hi)) return true;
    const int64_t wanted = key / block_k;
    const int64_t begin = lower_bound(entries, count, wanted);
    return begin < count && load(entries + begin) == wanted;
  }

  // Blocks may be longer than rows: then only the first has keys, and not more than there are.
  SB_DEVICE int64_t keys_of_entry() const { return block_k > edge + 1 ? edge + 1 : block_k; }
  SB_DEVICE int64_t valid_or_none(int64_t key) const { return mask && load(mask + key) ? -1 : key; }
};

}  // namespace sb::cuda
