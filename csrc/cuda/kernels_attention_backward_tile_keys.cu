#include "attention_backward_tile_keys.cuh"

#include "launch.h"

namespace sb::cuda {
namespace {

constexpr int kThreads = 128;
// What a block may have on every device.
constexpr int64_t kMostShared = 96 << 10;

// The gradient of the state, by rows of values and by rows of features.
void launch_operands(const BackwardTileKeysParams& p, Stream stream) {
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
  launch(stream, "tile_queries", blocks_for(p.batch * p.q_heads * p.q_tokens, kThreads), kThreads, 0, tile_queries, p);
}

template <class E, int D, bool kHasQuadratic>
void launch_tiles(const BackwardTileKeysParams& p, Stream stream) {
  constexpr int64_t kBytes = TileKeysLayout<D, kHasQuadratic>::kBytes;
  int warps = kTileKeysThreads / kWarp;
  while (warps > 1 && warps * kBytes > kMostShared) warps /= 2;
  launch(stream, "attention_backward_tile_keys",
         ceil_div(2 * p.batch * p.kv_heads * ceil_div(p.k_tokens, kTile), warps), warps * kWarp, warps * kBytes,
         attention_backward_tile_keys<E, D, kHasQuadratic>, p);
}

template <class E, bool kHasQuadratic>
void launch_kind(const BackwardTileKeysParams& p, Stream stream) {
  if constexpr (kHasQuadratic) launch_operands(p, stream);
  if constexpr (kHasQuadratic)
    launch_tiles<E, 64, true>(p, stream);
  else
    p.head_dim <= 64 && p.value_pad <= 64 ? launch_tiles<E, 64, false>(p, stream)
                                          : launch_tiles<E, 128, false>(p, stream);
}

}  // namespace

void launch_attention_backward_tile_keys(const BackwardTileKeysParams& p, Element element, Stream stream) {
  with_element(element, [&](auto* e) {
    using E = std::remove_pointer_t<decltype(e)>;
    if constexpr (sizeof(E) == 2)
      p.low_rank == LowRank::kQuadratic ? launch_kind<E, true>(p, stream) : launch_kind<E, false>(p, stream);
  });
}

}  // namespace sb::cuda
