#include "saved_sizes.h"

#include "../math/low_rank_kernels.h"
#include "map_rows.h"

namespace sb::cpu {

AttentionShape shape_of(const AttentionArguments& a, ScalarType dtype) {
  AttentionShape s;
  s.dtype = dtype;
  s.batch = a.query.size(0), s.q_heads = a.query.size(1), s.q_tokens = a.query.size(2), s.head_dim = a.query.size(3);
  s.kv_heads = a.key.size(1), s.k_tokens = a.key.size(2), s.value_dim = a.value.size(3);
  s.low_rank = a.low_rank, s.rank = rank_of(a);
  s.listed_keys = (a.span ? a.span_keys + a.span_sinks : 0) + (a.index ? a.index->size(3) * a.block_k : 0);
  s.block_q = a.block_q, s.is_causal = a.is_causal;
  return s;
}

StateLayout state_layout(const AttentionShape& s) {
  const int64_t segment = s.is_causal ? kChunk : kSegment, slots = ceil_div(s.k_tokens, segment) + 1;
  if (s.low_rank == int64_t(LowRank::kNone)) return {segment, slots, 0, 0};
  const int64_t features = feature_count(static_cast<LowRank>(s.low_rank), s.rank);
  return {segment, slots, features, features * pad_to(s.value_dim, kPad) + pad_to(features, kPad) + kPad};
}

ScoreLayout score_layout(const AttentionShape& s) {
  ScoreLayout layout;
  layout.lanes = s.block_q == 1 ? 1 : s.block_q <= 8 ? 8 : s.block_q < 32 ? 16 : 32;
  layout.slots = pad_to(s.q_tokens, std::max(layout.lanes, kPad));  // a block may be far larger than the row
  const bool all_keys = s.block_q == 1 && s.low_rank != int64_t(LowRank::kNone) && s.k_tokens <= kBitmaskKeys;
  const int64_t most = all_keys ? s.k_tokens : std::min(s.listed_keys, s.k_tokens);
  const int64_t keys = layout.lanes == 1 ? pad_to(most, kPad) : most;  // rows of single queries are whole vectors
  const bool full_tiles = s.block_q % layout.lanes == 0, can_save = !s.is_causal && !in_double(s) && full_tiles;
  layout.keys = can_save && (all_keys || keys <= kKeptKeys) ? keys : 0;
  const bool has_clusters = s.low_rank == int64_t(LowRank::kCentroid);
  layout.clusters = can_save && has_clusters && layout.lanes > 1 ? pad_to(s.rank, kPad) : 0;
  return layout;
}

SavedSizes saved_sizes(const AttentionShape& s) {
  SavedSizes sizes{{0}, {0}, in_double(s) ? ScalarType::Double : ScalarType::Float};
  const StateLayout state = state_layout(s);
  const ScoreLayout scores = score_layout(s);
  if (saves_state(s)) sizes.state = {s.batch, s.kv_heads, state.slots, state.slot_size};
  const int64_t rows = scores.keys + scores.clusters;
  if (rows > 0) sizes.scores = {s.batch, s.q_heads, scores.slots, rows};
  return sizes;
}

}  // namespace sb::cpu
