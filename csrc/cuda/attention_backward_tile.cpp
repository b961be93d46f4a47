#include "attention_backward_tile.h"

#include "attention_tile.h"

namespace sb::cuda {

bool fits_backward_tiles(const AttentionArguments& a) { return fits_tiles(a); }

BackwardTileParams backward_tile_params(const BackwardParams& of_call, const TileParams& operands, Call& call) {
  BackwardTileParams p{};
  static_cast<BackwardParams&>(p) = of_call;
  p.head_steps = ceil_div(p.head_dim, 16), p.value_steps = ceil_div(p.value_pad, 16);
  p.features_padded = operands.features_padded;
  p.cluster_operand = operands.cluster_operand, p.key_log = operands.key_log;
  p.key_coordinates = operands.key_coordinates;
  p.by_groups = operands.by_groups, p.longest_list = operands.longest_list;
  if (!p.has_low_rank()) return p;
  const auto words = [&](std::initializer_list<int64_t> sizes) {
    return static_cast<FourWords*>(call.write(call.empty(sizes, ScalarType::Int)));
  };
  p.state_operand = words({p.batch, p.kv_heads, p.operand_slots(), p.value_steps, p.features_padded / 8, 32, 4});
  if (p.has_clusters())
    p.map_operand = words({p.batch, p.kv_heads, p.features_padded / 16, p.head_dim / 8, 32, 4});
  else if (p.query_weight.data)
    p.map_operand = words({p.batch, p.q_heads, 1, p.head_dim / 8, 32, 4});
  return p;
}

bool fits_backward_tiles_of_keys(const AttentionArguments& a) {
  const auto kind = static_cast<LowRank>(a.low_rank);
  const bool is_narrow = a.query.size(3) <= 64 && a.value.size(3) <= 64;
  return fits_backward_tiles(a) && ((kind == LowRank::kQuadratic && is_narrow) || (kind == LowRank::kNone && a.span));
}

BackwardTileKeysParams backward_tile_keys_params(const BackwardParams& of_call, const TileParams& operands,
                                                 Call& call) {
  BackwardTileKeysParams p{};
  static_cast<BackwardParams&>(p) = of_call;
  p.head_steps = ceil_div(p.head_dim, 16), p.value_steps = ceil_div(p.value_pad, 16);
  p.features_padded = operands.features_padded;
  p.key_log = operands.key_log, p.key_coordinates = operands.key_coordinates;
  p.by_groups = operands.by_groups, p.longest_list = operands.longest_list;
  if (!p.has_low_rank()) return p;
  p.query_coordinates =
      static_cast<Bfloat16*>(call.write(call.empty({p.batch, p.q_heads, p.q_tokens, 32}, ScalarType::BFloat16)));
  if (p.has_ragged_stages()) return p;
  const auto words = [&](int64_t steps, int64_t chunks) {
    return static_cast<FourWords*>(
        call.write(call.empty({p.batch, p.kv_heads, steps, chunks, 32, 4}, ScalarType::Int)));
  };
  p.state_by_value = words(p.value_steps, p.features_padded / 8);
  p.state_by_feature = words(p.features_padded / 16, p.value_pad / 8);
  return p;
}

}  // namespace sb::cuda
