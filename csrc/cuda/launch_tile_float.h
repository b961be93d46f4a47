// Starts attention_tile_float. Included by .cu files alone.
#pragma once
#include "attention_tile_float.cuh"
#include "launch.h"

namespace sb::cuda {

template <int D, LowRank kKind, bool kIsRagged>
void launch_float_tiles(const TileParams& p, Stream stream) {
  const int64_t bytes = FloatTileLayout<D, kKind>::bytes(p);
  int warps = kMostFloatTileThreads / kWarp;
  while (warps > 1 && kFeatureTable + warps * bytes > kMostShared) warps /= 2;
  launch(stream, "attention_tile_float", ceil_div(p.batch * p.q_heads * ceil_div(p.q_tokens, kTile), warps),
         warps * kWarp, kFeatureTable + warps * bytes, attention_tile_float<D, kKind, kIsRagged>, p);
}

template <LowRank kKind, bool kIsRagged>
void launch_float_kind(const TileParams& p, Stream stream) {
  p.head_dim <= 64 && p.value_pad <= 64 ? launch_float_tiles<64, kKind, kIsRagged>(p, stream)
                                        : launch_float_tiles<128, kKind, kIsRagged>(p, stream);
}

template <bool kIsRagged>
void launch_float_tile_kernel(const TileParams& p, Stream stream) {
  with_element(Element::kFloat, [&](auto* e) {
    if constexpr (std::is_same_v<decltype(e), float*>) {
      switch (p.low_rank) {
        case LowRank::kNone: return launch_float_kind<LowRank::kNone, kIsRagged>(p, stream);
        case LowRank::kQuadratic: return launch_float_kind<LowRank::kQuadratic, kIsRagged>(p, stream);
        default: return launch_float_kind<LowRank::kCentroid, kIsRagged>(p, stream);
      }
    }
  });
}

}  // namespace sb::cuda
