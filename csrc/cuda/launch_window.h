// Starts attention_window, and says for which calls. Included by .cu files alone.
#pragma once
#include "attention_window.cuh"
#include "launch.h"

namespace sb::cuda {

// Whether tiles share their keys. The windows of a block's 64 queries begin at most 64 - block_q keys apart, where
// there are about as many keys as queries. They share them where windows are at least twice as wide as that: then the
// stream is at most half as long again as a window, so that a warp finds something to weigh in two of three stages, and
// of keys a block reads three eighths or less of what its tiles would read one by one. By widths alone, as fits_tiles.
inline bool shares_keys(const TileParams& p) {
  constexpr int64_t kSlots = kWindowThreads / kWarp * kTile;
  if (!p.span || p.index || p.block_q % kTile != 0) return false;
  if (p.block_q < kSlots ? kSlots % p.block_q != 0 : p.block_q % kSlots != 0) return false;
  return p.span_keys >= 2 * (kSlots - std::min(p.block_q, kSlots));
}

template <class E, int D, LowRank kKind, bool kIsRagged>
void launch_windows(const TileParams& p, Stream stream) {
  const int64_t bytes = WindowLayout<D, kKind, kIsRagged>::bytes(p);
  int warps = kWindowThreads / kWarp;
  while (warps > 1 && kFeatureTable + warps * bytes > kMostShared) warps /= 2;
  launch(stream, "attention_window", p.batch * p.q_heads * ceil_div(p.q_tokens, warps * kTile), warps * kWarp,
         kFeatureTable + warps * bytes, attention_window<E, D, kKind, kIsRagged>, p);
}

// False where it does not take the call.
template <bool kIsRagged>
bool launch_if_shared(const TileParams& p, Element element, Stream stream) {
  if (!shares_keys(p)) return false;
  with_element(element, [&](auto* e) {
    using E = std::remove_pointer_t<decltype(e)>;
    if constexpr (sizeof(E) == 2) {
      const auto launch_kind = [&](auto kind) {
        p.head_dim <= 64 && p.value_pad <= 64 ? launch_windows<E, 64, kind.value, kIsRagged>(p, stream)
                                              : launch_windows<E, 128, kind.value, kIsRagged>(p, stream);
      };
      if (p.low_rank == LowRank::kNone) return launch_kind(std::integral_constant<LowRank, LowRank::kNone>());
      if (p.low_rank == LowRank::kQuadratic) return launch_kind(std::integral_constant<LowRank, LowRank::kQuadratic>());
      // Clusters have no causal calls.
      if constexpr (!kIsRagged) launch_kind(std::integral_constant<LowRank, LowRank::kCentroid>());
    }
  });
  return true;
}

}  // namespace sb::cuda
