// Starts attention_backward_shares and sum_shares. Included by .cu files alone.
#pragma once
#include "attention_backward_shares.cuh"
#include "sum_shares.cuh"
#include "launch.h"

namespace sb::cuda {

template <int kWords, bool kIsWide>
void launch_sum_of_shares(const BackwardSharesParams& p, Stream stream) {
  const int64_t of_head = p.q_heads / p.kv_heads * p.tiles(),
                heads = ceil_div(p.end_tile, of_head) - p.first_tile / of_head;
  launch(stream, "sum_shares", ceil_div(heads * p.k_tokens, kSharesThreads / kWarp), kSharesThreads, 0,
         sum_shares<kWords, kIsWide>, p);
}

template <class E, int D, LowRank kKind, bool kIsRagged>
void launch_shares(BackwardSharesParams p, Stream stream) {
  const int64_t bytes = SharesLayout<E, D, kKind>::bytes(p), all = p.batch * p.q_heads * p.tiles();
  int warps = kSharesThreads / kWarp;
  while (warps > 1 && warps * bytes > kMostShared) warps /= 2;
  for (int64_t first = 0; first < all; first += p.round_tiles) {
    p.first_tile = first, p.end_tile = std::min(first + p.round_tiles, all);
    launch(stream, "attention_backward_shares", ceil_div(p.end_tile - first, warps), warps * kWarp, warps * bytes,
           attention_backward_shares<E, D, kKind, kIsRagged>, p);
    launch_sum_of_shares<2 * D* int(sizeof(E)) / 4 / kWarp, kIsFloat<E>>(p, stream);
  }
}

template <class E, LowRank kKind, bool kIsRagged>
void launch_shares_of_kind(const BackwardSharesParams& p, Stream stream) {
  p.head_dim <= 64 && p.value_pad <= 64 ? launch_shares<E, 64, kKind, kIsRagged>(p, stream)
                                        : launch_shares<E, 128, kKind, kIsRagged>(p, stream);
}

template <bool kIsRagged>
void launch_float_shares_kernel(const BackwardSharesParams& p, Stream stream) {
  with_element(Element::kFloat, [&](auto* e) {
    if constexpr (std::is_same_v<decltype(e), float*>) {
      switch (p.low_rank) {
        case LowRank::kNone: return launch_shares<float, 64, LowRank::kNone, kIsRagged>(p, stream);
        case LowRank::kQuadratic: return launch_shares<float, 64, LowRank::kQuadratic, kIsRagged>(p, stream);
        default: return launch_shares<float, 64, LowRank::kCentroid, kIsRagged>(p, stream);
      }
    }
  });
}

template <bool kIsRagged>
void launch_shares_kernels(const BackwardSharesParams& p, Element element, Stream stream) {
  with_element(element, [&](auto* e) {
    using E = std::remove_pointer_t<decltype(e)>;
    if constexpr (sizeof(E) == 2) {
      switch (p.low_rank) {
        case LowRank::kNone: return launch_shares_of_kind<E, LowRank::kNone, kIsRagged>(p, stream);
        case LowRank::kQuadratic: return launch_shares_of_kind<E, LowRank::kQuadratic, kIsRagged>(p, stream);
        default: return launch_shares_of_kind<E, LowRank::kCentroid, kIsRagged>(p, stream);
      }
    }
  });
}

}  // namespace sb::cuda
