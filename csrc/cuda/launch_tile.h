// Starts attention_tile. Included by .cu files alone.
#pragma once
#include "attention_tile.cuh"
#include "launch.h"

namespace sb::cuda {

template <class E, int D, LowRank kKind, bool kIsRagged>
void launch_tiles(const TileParams& p, Stream stream) {
  const int64_t bytes = TileLayout<D, kKind, kIsRagged>::bytes(p);
  int warps = kTileThreads<D> / kWarp;
  while (warps > 1 && kFeatureTable + warps * bytes > kMostShared) warps /= 2;
  launch(stream, "attention_tile", ceil_div(p.batch * p.q_heads * ceil_div(p.q_tokens, kTile), warps), warps * kWarp,
         kFeatureTable + warps * bytes, attention_tile<E, D, kKind, kIsRagged>, p);
}

template <class E, LowRank kKind, bool kIsRagged>
void launch_kind(const TileParams& p, Stream stream) {
  p.head_dim <= 64 && p.value_pad <= 64 ? launch_tiles<E, 64, kKind, kIsRagged>(p, stream)
                                        : launch_tiles<E, 128, kKind, kIsRagged>(p, stream);
}

template <bool kIsRagged>
void launch_tile_kernel(const TileParams& p, Element element, Stream stream) {
  with_element(element, [&](auto* e) {
    using E = std::remove_pointer_t<decltype(e)>;
    if constexpr (sizeof(E) == 2) {
      switch (p.low_rank) {
        case LowRank::kNone: return launch_kind<E, LowRank::kNone, kIsRagged>(p, stream);
        case LowRank::kQuadratic: return launch_kind<E, LowRank::kQuadratic, kIsRagged>(p, stream);
        default: return launch_kind<E, LowRank::kCentroid, kIsRagged>(p, stream);
      }
    }
  });
}

}  // namespace sb::cuda
