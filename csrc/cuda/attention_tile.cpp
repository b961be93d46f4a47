#include "attention_tile.h"

#include <algorithm>

#include "../math/low_rank_kernels.h"

namespace sb::cuda {

namespace {

// Lists of few queries are merged where an entry is several keys that stand side by side.
bool merges(const AttentionArguments& a) { return a.block_q % 16 != 0 && (!a.index || a.block_k % 8 == 0); }

// A list of a single key per entry has a stage for itself.
constexpr int64_t kFewestQueries = 4;

// Whether there is a kernel, but for the type of the tokens.
bool has_tiles(const AttentionArguments& a) {
  const int64_t head_dim = a.query.size(3), value_dim = a.value.size(3);
  if (!merges(a) && a.block_q < kFewestQueries) return false;
  if (head_dim % 8 != 0 || head_dim < kNarrowHead || head_dim > kWidestTile) return false;
  if (value_dim % 8 != 0 || value_dim == 0 || value_dim > kWidestTile) return false;
  switch (static_cast<LowRank>(a.low_rank)) {
    case LowRank::kNone: return true;
    case LowRank::kQuadratic:
      return feature_count(LowRank::kQuadratic, a.packed_rank ? a.packed_rank : a.query_map->size(3) - 1) <=
             kTileFeatures;
    case LowRank::kCentroid: return a.representatives->size(2) <= kMostTileClusters;
    default: return false;
  }
}

}  // namespace

bool fits_tiles(const AttentionArguments& a) { return a.query.element_size() == 2 && has_tiles(a); }
bool fits_float_tiles(const AttentionArguments& a) {
  return a.query.scalar_type() == ScalarType::Float && has_tiles(a);
}

TileParams tile_params(const ForwardParams& of_call, const AttentionArguments& a, Call& call, bool has_state) {
  TileParams p{};
  static_cast<ForwardParams&>(p) = of_call;
  p.by_groups = merges(a);
  p.key_row_bytes = uint32_t(p.k.row * 2), p.value_row_bytes = uint32_t(p.v.row * 2);
  p.head_steps = ceil_div(p.head_dim, 16), p.value_chunks = p.value_pad / 8;
  if (!p.has_low_rank()) return p;
  p.features_padded = pad_to(p.features, 16);
  const auto floats = [&](std::initializer_list<int64_t> sizes) {
    return static_cast<float*>(call.write(call.empty(sizes, ScalarType::Float)));
  };
  const auto words = [&](std::initializer_list<int64_t> sizes) {
    return static_cast<FourWords*>(call.write(call.empty(sizes, ScalarType::Int)));
  };
  const int64_t heads = p.batch * p.kv_heads;
  p.key_log = floats({heads, p.k_tokens});
  if (a.query.scalar_type() == ScalarType::Float) {
    if (!p.has_clusters()) p.key_rows = floats({heads, p.k_tokens, 16});
    return p;
  }
  if (has_state) {
    p.state_operand = words({heads, p.operand_slots(), p.features_padded / 16, p.value_chunks, 32, 4});
    p.state_sums = floats({heads, p.operand_slots(), p.features_padded});
  }
  if (p.has_clusters())
    p.cluster_operand = words({heads, p.features_padded / 8, p.head_steps, 32, 8});
  else
    p.key_coordinates = static_cast<Bfloat16*>(call.write(call.empty({heads, p.k_tokens, 32}, ScalarType::BFloat16)));
  return p;
}

}  // namespace sb::cuda
