#include "attention_backward_shares.cuh"

#include "launch.h"

namespace sb::cuda {
namespace {

// What a block may have on every device.
constexpr int64_t kMostShared = 96 << 10;

template <int kWords>
void launch_sums(const BackwardSharesParams& p, Stream stream) {
  const int64_t of_head = p.q_heads / p.kv_heads * p.tiles(),
                heads = ceil_div(p.end_tile, of_head) - p.first_tile / of_head;
  launch(stream, "sum_shares", ceil_div(heads * p.k_tokens, kSharesThreads / kWarp), kSharesThreads, 0,
         sum_shares<kWords>, p);
}

template <class E, int D, LowRank kKind>
void launch_tiles(BackwardSharesParams p, Stream stream) {
  const int64_t bytes = SharesLayout<D, kKind>::bytes(p), all = p.batch * p.q_heads * p.tiles();
  int warps = kSharesThreads / kWarp;
  while (warps > 1 && warps * bytes > kMostShared) warps /= 2;
  for (int64_t first = 0; first < all; first += p.round_tiles) {
    p.first_tile = first, p.end_tile = std::min(first + p.round_tiles, all);
    launch(stream, "attention_backward_shares", ceil_div(p.end_tile - first, warps), warps * kWarp, warps * bytes,
           attention_backward_shares<E, D, kKind>, p);
    launch_sums<D / 32>(p, stream);
  }
}

template <class E, LowRank kKind>
void launch_kind(const BackwardSharesParams& p, Stream stream) {
  p.head_dim <= 64 && p.value_pad <= 64 ? launch_tiles<E, 64, kKind>(p, stream)
                                        : launch_tiles<E, 128, kKind>(p, stream);
}

}  // namespace

void launch_attention_backward_shares(const BackwardSharesParams& p, Element element, Stream stream) {
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
