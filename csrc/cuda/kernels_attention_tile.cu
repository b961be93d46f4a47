#include "attention_tile.cuh"

#include "launch.h"

namespace sb::cuda {
namespace {

constexpr int kThreads = 128;
// What a block may have on every device.
constexpr int64_t kMostShared = 96 << 10;

template <class E, int D, LowRank kKind>
void launch_tiles(const TileParams& p, Stream stream) {
  const int64_t bytes = TileLayout<D, kKind>::bytes(p);
  int warps = kMostTileThreads / kWarp;
  while (warps > 1 && kFeatureTable + warps * bytes > kMostShared) warps /= 2;
  launch(stream, "attention_tile", ceil_div(p.batch * p.q_heads * ceil_div(p.q_tokens, kTile), warps), warps * kWarp,
         kFeatureTable + warps * bytes, attention_tile<E, D, kKind>, p);
}

template <class E, LowRank kKind>
void launch_operands(const TileParams& p, Stream stream) {
  const int64_t heads = p.batch * p.kv_heads, lanes = heads * p.features_padded * kWarp;
  launch(stream, "tile_state", blocks_for(lanes / 16 * p.value_chunks, kThreads), kThreads, 0, tile_state, p);
  launch(stream, "tile_keys", blocks_for(heads * p.k_tokens, kThreads), kThreads, 0, tile_keys<kKind>, p);
  if constexpr (kKind == LowRank::kCentroid)
    launch(stream, "tile_clusters", blocks_for(lanes / 8 * p.head_steps, kThreads), kThreads, 0, tile_clusters<E>, p);
}

template <class E, LowRank kKind>
void launch_kind(const TileParams& p, Stream stream) {
  p.head_dim <= 64 && p.value_pad <= 64 ? launch_tiles<E, 64, kKind>(p, stream)
                                        : launch_tiles<E, 128, kKind>(p, stream);
}

}  // namespace

void launch_tile_operands(const TileParams& p, Element element, Stream stream) {
  with_element(element, [&](auto* e) {
    using E = std::remove_pointer_t<decltype(e)>;
    if constexpr (sizeof(E) == 2) {
      if (p.low_rank == LowRank::kQuadratic) launch_operands<E, LowRank::kQuadratic>(p, stream);
      if (p.low_rank == LowRank::kCentroid) launch_operands<E, LowRank::kCentroid>(p, stream);
    }
  });
}

void launch_attention_tile(const TileParams& p, Element element, Stream stream) {
  launch_tile_operands(p, element, stream);
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
