// Starts attention_backward_tile_keys. Included by .cu files alone.
#pragma once
#include "attention_backward_tile_keys.cuh"
#include "launch.h"

namespace sb::cuda {

template <class E, int D, LowRank kKind, bool kIsRagged>
void launch_tiles_of_keys(const BackwardTileKeysParams& p, Stream stream) {
  constexpr int64_t kMostShared = 96 << 10;  // what a block may have on every device
  typedef TileKeysLayout<E, D, kKind> Layout;
  constexpr int64_t kBytes = Layout::kBytes;
  int warps = kTileKeysThreads / kWarp;
  while (warps > 1 && warps * kBytes > kMostShared) warps /= 2;
  launch(stream, "attention_backward_tile_keys",
         ceil_div(Layout::kTasks * p.batch * p.kv_heads * ceil_div(p.k_tokens, kTile), warps), warps * kWarp,
         warps * kBytes, attention_backward_tile_keys<E, D, kKind, kIsRagged>, p);
}

template <bool kIsRagged>
void launch_float_backward_tile_keys_kernel(const BackwardTileKeysParams& p, Stream stream) {
  with_element(Element::kFloat, [&](auto* e) {
    if constexpr (std::is_same_v<decltype(e), float*>) {
      switch (p.low_rank) {
        case LowRank::kNone: return launch_tiles_of_keys<float, 64, LowRank::kNone, kIsRagged>(p, stream);
        case LowRank::kQuadratic: return launch_tiles_of_keys<float, 64, LowRank::kQuadratic, kIsRagged>(p, stream);
        default: return launch_tiles_of_keys<float, 64, LowRank::kCentroid, kIsRagged>(p, stream);
      }
    }
  });
}

template <class E, LowRank kKind, bool kIsRagged>
void launch_tiles_of_keys_of_kind(const BackwardTileKeysParams& p, Stream stream) {
  p.head_dim <= 64 && p.value_pad <= 64 ? launch_tiles_of_keys<E, 64, kKind, kIsRagged>(p, stream)
                                        : launch_tiles_of_keys<E, 128, kKind, kIsRagged>(p, stream);
}

template <bool kIsRagged>
void launch_backward_tile_keys_kernel(const BackwardTileKeysParams& p, Element element, Stream stream) {
  with_element(element, [&](auto* e) {
    using E = std::remove_pointer_t<decltype(e)>;
    if constexpr (sizeof(E) == 2) {
      switch (p.low_rank) {
        case LowRank::kNone: return launch_tiles_of_keys_of_kind<E, LowRank::kNone, kIsRagged>(p, stream);
        case LowRank::kQuadratic: return launch_tiles_of_keys_of_kind<E, LowRank::kQuadratic, kIsRagged>(p, stream);
        default: return launch_tiles_of_keys_of_kind<E, LowRank::kCentroid, kIsRagged>(p, stream);
      }
    }
  });
}

}  // namespace sb::cuda
