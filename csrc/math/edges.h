// Causal edges, and which state a query reads (docs/algorithm.md, section 4). A slot is a query's place in its row:
// position s of the order where the call has one, else query first + s. Edges count from the row's first key.
#pragma once
#include "../params.h"

namespace sb {

// Number of query slots of a row.
SB_HD int64_t slots_of_row(const AttentionParams& p, const RowRange& range) {
  return p.order ? p.q_tokens : int64_t(range.q_end) - range.q_first;
}

// The last key that query slot `slot` sees, -1 for none; the row's last key without a causal edge.
SB_HD int64_t edge_of_slot(const AttentionParams& p, const RowRange& range, int64_t slot) {
  const int64_t last = range.k_end - range.k_first - 1;
  if (!p.is_causal) return last;
  const int64_t edge = int64_t(range.q_first) + slot + range.offset - range.k_first;
  return edge < -1 ? -1 : edge > last ? last : edge;
}

// The first query slot that sees key `key`; slots_of_row if none does.
SB_HD int64_t first_slot_seeing(const AttentionParams& p, const RowRange& range, int64_t key) {
  const int64_t slots = slots_of_row(p, range);
  if (key > range.k_end - range.k_first - 1) return slots;
  if (!p.is_causal) return 0;
  const int64_t slot = key + range.k_first - range.q_first - range.offset;
  return slot < 0 ? 0 : slot > slots ? slots : slot;
}

// The state slot that a query with this edge reads: the sum over every whole chunk before the edge's own, or over all
// keys without a causal edge.
SB_HD int64_t kv_state_of_edge(const AttentionParams& p, int64_t edge) {
  return p.is_causal ? (edge < 0 ? 0 : edge / kChunk) : p.slots - 1;
}

}  // namespace sb
