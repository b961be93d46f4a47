#include "launch_backward_tile_keys.h"
#include "tile_queries.cuh"

namespace sb::cuda {

void launch_backward_tile_keys_operands(const BackwardTileKeysParams& p, Stream stream) {
  if (!p.has_maps()) return;
  constexpr int kThreads = 128;
  const int64_t blocks = blocks_for(p.batch * p.q_heads * p.q_tokens, kThreads);
  if (p.query_rows) return launch(stream, "tile_query_rows", blocks, kThreads, 0, tile_query_rows, p);
  launch(stream, "tile_queries", blocks, kThreads, 0, tile_queries, p);
  if (p.has_ragged_stages()) return;
  OperandParams state{};
  state.batch = p.batch, state.heads = state.given_heads = p.kv_heads;
  state.data = static_cast<const float*>(p.d_kv_state);
  state.of_head = p.q_heads / p.kv_heads * p.query_segments * p.slot_size;
  state.of_batch = p.kv_heads * state.of_head;
  OperandParams by_value = state, by_feature = state;
  by_value.rows = p.value_pad, by_value.columns = p.features, by_value.of_row = 1;
  by_value.of_column = p.value_pad + 1, by_value.row_steps = p.value_steps;
  by_value.column_chunks = p.features_padded / 8, by_value.operand = p.state_by_value;
  by_feature.rows = p.features, by_feature.columns = p.value_pad, by_feature.of_row = p.value_pad + 1;
  by_feature.of_column = 1, by_feature.row_steps = p.features_padded / 16;
  by_feature.column_chunks = p.value_pad / 8, by_feature.operand = p.state_by_feature;
  launch_right_operand(by_value, stream), launch_right_operand(by_feature, stream);
}

void launch_attention_backward_tile_keys(const BackwardTileKeysParams& p, Element element, Stream stream) {
  launch_backward_tile_keys_kernel<false>(p, element, stream);
}

}  // namespace sb::cuda
