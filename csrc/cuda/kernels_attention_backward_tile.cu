#include "attention_backward_tile.cuh"

#include "launch.h"

namespace sb::cuda {
namespace {

constexpr int kThreads = 128;
// What a block may have on every device.
constexpr int64_t kMostShared = 96 << 10;

void launch_operands(const BackwardTileParams& p, Stream stream) {
  OperandParams state{};
  state.batch = p.batch, state.heads = state.given_heads = p.kv_heads, state.rows = p.value_pad;
  state.columns = p.features;
  state.data = static_cast<const float*>(p.kv_state) + (p.slots - 1) * p.slot_size;
  state.of_head = p.slots * p.slot_size, state.of_batch = p.kv_heads * state.of_head;
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

template <class E, int D, LowRank kKind>
void launch_tiles(const BackwardTileParams& p, Stream stream) {
  const int64_t bytes = BackwardTileLayout<D, kKind>::bytes(p);
  int warps = kBackwardTileThreads / kWarp;
  while (warps > 1 && warps * bytes > kMostShared) warps /= 2;
  launch(stream, "attention_backward_tile", ceil_div(p.batch * p.q_heads * ceil_div(p.q_tokens, kTile), warps),
         warps * kWarp, warps * bytes, attention_backward_tile<E, D, kKind>, p);
}

template <class E, LowRank kKind>
void launch_kind(const BackwardTileParams& p, Stream stream) {
  if constexpr (kKind != LowRank::kNone) launch_operands(p, stream);
  p.head_dim <= 64 && p.value_pad <= 64 ? launch_tiles<E, 64, kKind>(p, stream)
                                        : launch_tiles<E, 128, kKind>(p, stream);
}

}  // namespace

void launch_right_operand(const OperandParams& p, Stream stream) {
  launch(stream, "right_operand", blocks_for(p.batch * p.heads * p.row_steps * p.column_chunks * kWarp, kThreads),
         kThreads, 0, right_operand, p);
}

void launch_attention_backward_tile(const BackwardTileParams& p, Element element, Stream stream) {
  with_element(element, [&](auto* e) {
    using E = std::remove_pointer_t<decltype(e)>;
    if constexpr (sizeof(E) == 2) {
      switch (p.low_rank) {
        case LowRank::kNone: return launch_kind<E, LowRank::kNone>(p, stream);
        case LowRank::kQuadratic: return launch_kind<E, LowRank::kQuadratic>(p, stream);
        default: return launch_kind<E, LowRank::kCentroid>(p, stream);
      }
    }
  });
}

}  // namespace sb::cuda
