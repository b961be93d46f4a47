// Starts attention_backward_tile_keys. Included by .cu files alone.
#pragma once
#include "attention_backward_tile_keys.cuh"
#include "launch.h"

namespace sb::cuda {

template <class E, int D, bool kHasQuadratic, bool kIsRagged>
void launch_tiles_of_keys(const BackwardTileKeysParams& p, Stream stream) {
  constexpr int64_t kMostShared = 96 << 10;  // what a block may have on every device
  typedef TileKeysLayout<E, D, kHasQuadratic> Layout;
  constexpr int64_t kBytes = Layout::kBytes;
  int warps = kTileKeysThreads / kWarp;
  while (warps > 1 && warps * kBytes > kMostShared) warps /= 2;
  launch(stream, "attention_backward_tile_keys",
         ceil_div(Layout::kTasks * p.batch * p.kv_heads * ceil_div(p.k_tokens, kTile), warps), warps * kWarp,
         warps * kBytes, attention_backward_tile_keys<E, D, kHasQuadratic, kIsRagged>, p);
}

template <bool kIsRagged>
void launch_float_backward_tile_keys_kernel(const BackwardTileKeysParams& p, Stream stream) {
  with_element(Element::kFloat, [&](auto* e) {
    if constexpr (std::is_same_v<decltype(e), float*>) {
      if (p.low_rank == LowRank::kQuadratic)
        launch_tiles_of_keys<float, 64, true, kIsRagged>(p, stream);
      else
        launch_tiles_of_keys<float, 64, false, kIsRagged>(p, stream);
    }
  });
}

template <bool kIsRagged>
void launch_backward_tile_keys_kernel(const BackwardTileKeysParams& p, Element element, Stream stream) {
  with_element(element, [&](auto* e) {
    using E = std::remove_pointer_t<decltype(e)>;
    if constexpr (sizeof(E) == 2) {
      const bool is_narrow = p.head_dim <= 64 && p.value_pad <= 64, has_quadratic = p.low_rank == LowRank::kQuadratic;
      if (is_narrow)
        has_quadratic ? launch_tiles_of_keys<E, 64, true, kIsRagged>(p, stream)
                      : launch_tiles_of_keys<E, 64, false, kIsRagged>(p, stream);
      else
        has_quadratic ? launch_tiles_of_keys<E, 128, true, kIsRagged>(p, stream)
                      : launch_tiles_of_keys<E, 128, false, kIsRagged>(p, stream);
    }
  });
}

}  // namespace sb::cuda
