// Key lists: the keys that a query tile, or one query, evaluates, in the three parts of docs/algorithm.md, section 7.
#pragma once
#include "../../math/edges.h"
#include "gathered_rows.h"
#include "held_keys.h"

namespace sb::SB_ISA {

struct KeyList {
  int32_t* key;  // absolute
  int64_t n_chunk, n_listed, n;
  bool uses_kv_state;  // the state holds keys that are neither listed nor in the third part
  // Of a list that holds every valid key of a short row: bit q of bitmask[i] says whether query q of the tile lists key
  // i. Else null.
  const uint32_t* bitmask = nullptr;
};

// Appends ranges of keys that are not masked; positions count from the row's first key.
struct KeyAppender {
  int32_t* key;
  const uint8_t* mask;
  int64_t first, chunk_first, n, from_chunk;
  SB_INLINE void append(int64_t begin, int64_t end) {
    if (!mask && begin < end) {
      for (int64_t j = begin; j < end; ++j) key[n + j - begin] = int32_t(first + j);
      n += end - begin;
      if (end > chunk_first) from_chunk += end - (begin > chunk_first ? begin : chunk_first);
      return;
    }
    for (int64_t j = begin; j < end; ++j) {
      if (mask && mask[j]) continue;
      key[n++] = int32_t(first + j);
      from_chunk += j >= chunk_first;
    }
  }
};

// Appends the keys in [begin, end), counted from the row's first key, that are neither masked nor among the ascending
// list.key[listed, listed_end). Masked keys take no time: few may be left of a long row.
SB_INLINE void append_unlisted(const AttentionParams& p, int64_t b, KeyList& list, int64_t begin, int64_t end,
                               int64_t listed, int64_t listed_end) {
  const int64_t first = p.rows[b].k_first;
  const auto append = [&](int32_t key) SB_INLINE_LAMBDA {
    if (listed < listed_end && list.key[listed] == key)
      ++listed;
    else
      list.key[list.n++] = key;
  };
  if (!p.valid_keys) {
    for (int64_t j = begin; j < end; ++j) append(int32_t(first + j));
    return;
  }
  const int32_t* valid = p.valid_keys + b * p.k_tokens;
  const int64_t n = p.valid_before[(b + 1) * p.slots - 1];
  for (int64_t i = lower_bound_key(valid, 0, n, first + begin); i < n && valid[i] < first + end; ++i) append(valid[i]);
}

// Number of the ascending keys that are held.
SB_INLINE int64_t count_held(const int32_t* key, int64_t n, const KeyRange& held) {
  int64_t count = 0;
  for (int64_t i = 0, at = 0; i < n && at < held.n;)
    if (key[i] == held.key[at])
      ++count, ++i, ++at;
    else
      key[i] < held.key[at] ? ++i : ++at;
  return count;
}

// Moves the held ones of the n keys at the end of list.key[0, from_chunk + n) in front of all.
SB_INLINE void held_to_front(KeyList& list, int64_t from_chunk, int64_t n, const KeyRange& held) {
  int32_t front[kMostHeld];
  int32_t* key = list.key;
  int64_t count = 0, at = 0, to = from_chunk + n;
  for (int64_t i = n - 1, end = held.n; i >= 0; --i) {  // from behind: what stays moves up
    const int32_t j = key[from_chunk + i];
    while (end > 0 && held.key[end - 1] > j) --end;
    if (end > 0 && held.key[end - 1] == j)
      front[count++] = j;
    else
      key[--to] = j;
  }
  for (int64_t i = from_chunk - 1; i >= 0; --i) key[--to] = key[i];
  while (count > 0) key[at++] = front[--count];
}

// Fills the list of query slots first_slot .. last_slot, which lie in one query block.
SB_INLINE void collect_keys(const AttentionParams& p, int64_t b, int64_t h, int64_t first_slot, int64_t last_slot,
                            KeyList& list) {
  const RowRange& range = p.rows[b];
  const int64_t length = range.k_end - range.k_first, block = first_slot / p.block_q;
  const int64_t edge = edge_of_slot(p, range, last_slot);
  const int64_t slot = kv_state_of_edge(p, edge_of_slot(p, range, first_slot));
  const int64_t chunk_first = p.is_causal ? slot * kChunk : length;
  const uint8_t* mask = p.k_mask ? p.k_mask + b * p.k_tokens + range.k_first : nullptr;

  int64_t lo = 0, hi = 0, sinks = 0;
  if (p.span) {
    const int32_t* span = p.span + b * p.span_batch + block * 2;
    lo = span[0] - range.k_first, hi = span[1] - range.k_first;
    sinks = p.span_sinks > edge + 1 ? edge + 1 : p.span_sinks;
    lo = lo < sinks ? sinks : lo;
    hi = hi > edge + 1 ? edge + 1 : hi;
  }
  const int32_t *entry = nullptr, *entry_end = nullptr;
  if (p.index) {
    const int64_t row = (b * p.list_heads + h * p.list_heads / p.q_heads) * p.blocks + block;
    entry = p.index + row * p.capacity;
    entry_end = entry + p.count[row];
  }

  // The sinks, then an ascending merge of the span and the listed blocks; what is in more than one of them counts once.
  KeyAppender to{list.key, mask, range.k_first, chunk_first, 0, 0};
  to.append(0, sinks);
  bool span_done = lo >= hi;
  if (p.block_k == 1 && !mask && span_done && !p.is_causal && sinks == 0) {  // single keys need no merge
    for (; entry != entry_end; ++entry) list.key[to.n++] = int32_t(range.k_first + *entry);
  }
  for (; entry != entry_end; ++entry) {
    int64_t begin = int64_t(*entry) * p.block_k, end = begin + p.block_k;
    if (begin > edge) break;
    end = end > edge + 1 ? edge + 1 : end;
    begin = begin < sinks ? sinks : begin;
    if (lo < hi && begin < hi && end > lo) {
      to.append(begin, lo < end ? lo : end);
      if (!span_done) to.append(lo, hi), span_done = true;
      to.append(begin > hi ? begin : hi, end);
      continue;
    }
    if (!span_done && begin >= hi) to.append(lo, hi), span_done = true;
    to.append(begin, end);
  }
  if (!span_done) to.append(lo, hi);

  int32_t* key = list.key;
  const int64_t n = to.n, from_chunk = to.from_chunk;
  // The merge left [before the chunk | in the chunk]; the list starts with the chunk's keys.
  const int64_t before = n - from_chunk;
  list.n_chunk = from_chunk, list.n_listed = list.n = n, list.uses_kv_state = false;
  if (from_chunk > 0 && before > 0) {
    int32_t moved[2 * kChunk + 32];
    for (int64_t i = 0; i < from_chunk; ++i) moved[i] = key[before + i];
    for (int64_t i = before - 1; i >= 0; --i) key[from_chunk + i] = key[i];
    for (int64_t i = 0; i < from_chunk; ++i) key[i] = moved[i];
  }
  if (!p.has_low_rank()) return;
  const KeyRange held = held_keys(p, b, p.kv_head(h), slot);
  const int64_t held_listed = count_held(key + from_chunk, before, held),
                unlisted = p.valid_before[b * p.slots + slot] - before, in_state = unlisted - (held.n - held_listed);
  // A complement of few keys is summed key by key: cheaper than the state's features, and nothing cancels.
  list.uses_kv_state = in_state > by_key_limit(p, range);
  if (!list.uses_kv_state) {
    if (unlisted > 0) append_unlisted(p, b, list, 0, chunk_first < length ? chunk_first : length, from_chunk, n);
  } else if (held.n > 0) {
    held_to_front(list, from_chunk, before, held);
    list.n_chunk += held_listed;
    for (int64_t i = 0, at = 0; i < held.n; ++i) {
      while (at < held_listed && key[at] < held.key[i]) ++at;
      if (at == held_listed || key[at] != held.key[i]) key[list.n++] = held.key[i];
    }
  }
  if (p.is_causal) append_unlisted(p, b, list, chunk_first, edge + 1, list.n_chunk - from_chunk, list.n_chunk);
}

// First entry whose x.y is needed.
SB_INLINE int64_t first_low_rank(const KeyList& list) {
  return list.bitmask ? 0 : list.uses_kv_state ? list.n_chunk : list.n_listed;
}

// Smallest and largest key of a list.
SB_INLINE int64_t first_key(const KeyList& list) {
  const int64_t part[4] = {0, list.n_chunk, list.n_listed, list.n};
  int64_t first = INT64_MAX;
  SB_EACH (i, 3)
    if (part[i] < part[i + 1] && list.key[part[i]] < first) first = list.key[part[i]];
  return first;
}
SB_INLINE int64_t last_key(const KeyList& list) {
  const int64_t part[4] = {0, list.n_chunk, list.n_listed, list.n};
  int64_t last = -1;
  SB_EACH (i, 3)
    if (part[i] < part[i + 1] && list.key[part[i + 1] - 1] > last) last = list.key[part[i + 1] - 1];
  return last;
}

}  // namespace sb::SB_ISA
