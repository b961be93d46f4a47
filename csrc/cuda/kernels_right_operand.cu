#include "launch.h"
#include "right_operand.cuh"

namespace sb::cuda {

void launch_right_operand(const OperandParams& p, Stream stream) {
  constexpr int kThreads = 128;
  launch(stream, "right_operand", blocks_for(p.batch * p.heads * p.row_steps * p.column_chunks * kWarp, kThreads),
         kThreads, 0, right_operand, p);
}

void launch_backward_tile_operands(const BackwardTileParams& p, Stream stream) {
  if (!p.has_low_rank()) return;
  const int64_t slots = p.operand_slots();  // the last ones
  OperandParams state{};
  state.batch = p.batch, state.heads = state.given_heads = p.kv_heads * slots, state.rows = p.value_pad;
  state.columns = p.features;
  state.data = static_cast<const float*>(p.kv_state) + (p.state_slots - slots) * p.slot_size;
  state.of_head = p.state_slots / slots * p.slot_size, state.of_batch = p.kv_heads * p.state_slots * p.slot_size;
  state.of_row = 1, state.of_column = p.value_pad + 1;
  state.row_steps = p.value_steps, state.column_chunks = p.features_padded / 8, state.operand = p.state_operand;
  launch_right_operand(state, stream);

  if (!p.map_operand) return;
  OperandParams map{};
  map.batch = p.batch, map.columns = map.of_row = p.head_dim, map.of_column = 1;
  map.column_chunks = p.head_dim / 8, map.operand = p.map_operand;
  if (p.has_clusters()) {
    map.heads = map.given_heads = p.kv_heads, map.rows = p.rank, map.row_steps = p.features_padded / 16;
    map.data = static_cast<const float*>(p.given_representatives);
    map.of_head = p.rank * p.head_dim, map.of_batch = p.kv_heads * map.of_head;
  } else {
    map.heads = p.q_heads, map.given_heads = p.query_weight.heads, map.rows = p.rank + 1, map.row_steps = 1;
    map.data = static_cast<const float*>(p.query_weight.data);
    map.of_head = map.rows * p.head_dim, map.of_batch = p.query_weight.batch;
  }
  launch_right_operand(map, stream);
}

}  // namespace sb::cuda
