#include "attention_backward_tile.h"

#include "attention_tile.h"

namespace sb::cuda {

namespace {

bool is_narrow(const AttentionArguments& a) { return a.query.size(3) <= 64 && a.value.size(3) <= 64; }

// Queries and keys of float32 go the same way, or weights of a key would differ from those that its slots add up. Not
// windows alone of fewer keys than a stage, where most of a product is of no use, and the few terms of a sum round less
// than its parts. Lists of blocks have no say: how wide their index is may depend on padding.
constexpr int64_t kFewestKeys = 16;
bool fits_float_backward_tiles(const AttentionArguments& a) {
  const auto kind = static_cast<LowRank>(a.low_rank);
  return fits_float_tiles(a) && is_narrow(a) &&
         (kind == LowRank::kNone ? a.index || (a.span && a.span_keys >= kFewestKeys) : kind != LowRank::kFeatures);
}

}  // namespace

bool fits_backward_tiles(const AttentionArguments& a) { return fits_tiles(a) || fits_float_backward_tiles(a); }

BackwardTileParams backward_tile_params(const BackwardParams& of_call, const TileParams& operands, Element element,
                                        Call& call) {
  BackwardTileParams p{};
  static_cast<BackwardParams&>(p) = of_call;
  p.head_steps = ceil_div(p.head_dim, 16), p.value_steps = ceil_div(p.value_pad, 16);
  p.features_padded = operands.features_padded;
  p.cluster_operand = operands.cluster_operand, p.key_log = operands.key_log;
  p.key_coordinates = operands.key_coordinates, p.key_rows = operands.key_rows;
  p.by_groups = operands.by_groups;
  if (!p.has_low_rank() || element == Element::kFloat) return p;  // matrices of float32 are read as they are
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
  return fits_backward_tiles(a) && (kind == LowRank::kNone ? a.span.has_value() : kind != LowRank::kFeatures);
}

BackwardTileKeysParams backward_tile_keys_params(const BackwardParams& of_call, const TileParams& operands,
                                                 Call& call) {
  BackwardTileKeysParams p{};
  static_cast<BackwardParams&>(p) = of_call;
  p.head_steps = ceil_div(p.head_dim, 16), p.value_steps = ceil_div(p.value_pad, 16);
  p.features_padded = operands.features_padded;
  p.key_log = operands.key_log, p.key_coordinates = operands.key_coordinates, p.key_rows = operands.key_rows;
  p.by_groups = operands.by_groups;
  if (!p.has_maps()) return p;
  if (p.key_rows) {
    p.query_rows = static_cast<float*>(call.write(call.empty({p.batch, p.q_heads, p.q_tokens, 16}, ScalarType::Float)));
    return p;
  }
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
