// Starts attention_backward_tile. Included by .cu files alone.
#pragma once
#include "attention_backward_tile.cuh"
#include "launch.h"

namespace sb::cuda {

template <class E, int D, LowRank kKind, bool kIsRagged>
void launch_backward_tiles(const BackwardTileParams& p, Stream stream) {
  constexpr int64_t kMostShared = 96 << 10;  // what a block may have on every device
  const int64_t bytes = BackwardTileLayout<E, D, kKind>::bytes(p);
  int warps = kBackwardTileThreads / kWarp;
  while (warps > 1 && warps * bytes > kMostShared) warps /= 2;
  launch(stream, "attention_backward_tile", ceil_div(p.batch * p.q_heads * ceil_div(p.q_tokens, kTile), warps),
         warps * kWarp, warps * bytes, attention_backward_tile<E, D, kKind, kIsRagged>, p);
}

template <class E, LowRank kKind, bool kIsRagged>
void launch_backward_kind(const BackwardTileParams& p, Stream stream) {
  p.head_dim <= 64 && p.value_pad <= 64 ? launch_backward_tiles<E, 64, kKind, kIsRagged>(p, stream)
                                        : launch_backward_tiles<E, 128, kKind, kIsRagged>(p, stream);
}

template <bool kIsRagged>
void launch_float_backward_tile_kernel(const BackwardTileParams& p, Stream stream) {
  with_element(Element::kFloat, [&](auto* e) {
    if constexpr (std::is_same_v<decltype(e), float*>) {
      switch (p.low_rank) {
        case LowRank::kNone: return launch_backward_tiles<float, 64, LowRank::kNone, kIsRagged>(p, stream);
        case LowRank::kQuadratic: return launch_backward_tiles<float, 64, LowRank::kQuadratic, kIsRagged>(p, stream);
        default: return launch_backward_tiles<float, 64, LowRank::kCentroid, kIsRagged>(p, stream);
      }
    }
  });
}

template <bool kIsRagged>
void launch_backward_tile_kernel(const BackwardTileParams& p, Element element, Stream stream) {
  with_element(element, [&](auto* e) {
    using E = std::remove_pointer_t<decltype(e)>;
    if constexpr (sizeof(E) == 2) {
      switch (p.low_rank) {
        case LowRank::kNone: return launch_backward_kind<E, LowRank::kNone, kIsRagged>(p, stream);
        case LowRank::kQuadratic: return launch_backward_kind<E, LowRank::kQuadratic, kIsRagged>(p, stream);
        default: return launch_backward_kind<E, LowRank::kCentroid, kIsRagged>(p, stream);
      }
    }
  });
}

}  // namespace sb::cuda
